"""When the discriminator joins."""

import pytest

from models.adversary_start import AdversaryStart, StartAtUpdate, StartOnPlateau

PLATEAU = StartOnPlateau(window=3, min_improvement=0.01, latest_update=1_000)


def first_start(start: AdversaryStart, losses: list[float]) -> int | None:
    """After which look it starts, counted from 1."""
    for count, loss in enumerate(losses, start=1):
        start.look(loss)
        if start.has_started(update=1):
            return count
    return None


def test_a_set_update_is_the_last_without_the_discriminator() -> None:
    start = AdversaryStart(StartAtUpdate(update=7))
    assert [start.has_started(update) for update in (1, 7, 8)] == [False, False, True]


def test_it_waits_while_the_loss_falls_and_starts_once_it_does_not() -> None:
    falling = [0.9**n for n in range(30)]
    assert first_start(AdversaryStart(PLATEAU), falling) is None
    # The last window must hold the flat part only as far as the gain is still above one per cent.
    assert first_start(AdversaryStart(PLATEAU), [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]) == 9


def test_noise_around_a_falling_loss_does_not_start_it() -> None:
    noisy = [0.9**n * (1.08 if n % 2 else 0.92) for n in range(30)]
    assert first_start(AdversaryStart(PLATEAU), noisy) is None


def test_it_starts_at_the_latest_update_in_any_case() -> None:
    start = AdversaryStart(PLATEAU)
    assert not start.has_started(1_000)
    assert start.has_started(1_001)


def test_once_started_it_never_stops() -> None:
    start = AdversaryStart(PLATEAU)
    first_start(start, [1.0] * 6)
    for _ in range(10):
        start.look(1e-3)
    assert start.has_started(1)


@pytest.mark.parametrize("cut", range(10))
def test_a_restored_state_goes_on_as_if_never_stopped(cut: int) -> None:
    losses = [1.0, 0.8, 0.7, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    whole, broken, restored = (AdversaryStart(PLATEAU) for _ in range(3))
    expected = first_start(whole, losses)
    assert expected is not None
    found = first_start(broken, losses[:cut])
    restored.load(broken.tensors())
    if found is None:
        found = cut + (first_start(restored, losses[cut:]) or 0)
    assert found == expected
    assert restored.has_started(1)

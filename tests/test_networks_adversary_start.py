"""When the discriminator joins."""

import pytest
import torch

from models.autoencoder.discriminator_start import AdversaryStart, AdversaryStartConfig, StartAtUpdate, StartOnPlateau

PLATEAU = StartOnPlateau(every=1, window=3, min_improvement=0.01, latest_update=1_000)
COUNTS, REFUSED = torch.zeros(()), torch.ones(())


def start_of(config: AdversaryStartConfig) -> AdversaryStart:
    return AdversaryStart(config, device=torch.device("cpu"))


def first_start(start: AdversaryStart, losses: list[float], *, after: int = 0) -> int | None:
    """After which update it starts, counted from 1; ``after`` were made before."""
    for update, loss in enumerate(losses, start=after + 1):
        comes = start.watch(torch.tensor(loss), update=update, refused=COUNTS)
        assert comes == start.has_started(1)
        if comes:
            return update
    return None


def test_a_set_update_is_the_last_without_the_discriminator() -> None:
    start = start_of(StartAtUpdate(update=7))
    assert [start.has_started(update) for update in (1, 7, 8)] == [False, False, True]
    assert not start.watch(torch.tensor(1.0), update=7, refused=COUNTS)


def test_it_waits_while_the_loss_falls_and_starts_once_it_does_not() -> None:
    falling = [0.9**n for n in range(30)]
    assert first_start(start_of(PLATEAU), falling) is None
    # The last window must hold the flat part only as far as the gain is still above one per cent.
    assert first_start(start_of(PLATEAU), [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]) == 9


def test_noise_around_a_falling_loss_does_not_start_it() -> None:
    noisy = [0.9**n * (1.08 if n % 2 else 0.92) for n in range(30)]
    assert first_start(start_of(PLATEAU), noisy) is None


def test_a_look_is_the_mean_of_its_updates() -> None:
    """Single losses that jump from 1 to 0 and back are flat when two make one look, and falling in the odd looks."""
    in_pairs = PLATEAU.model_copy(update={"every": 2, "window": 1})
    assert first_start(start_of(in_pairs), [1.0, 0.0, 0.0, 1.0]) == 4
    assert first_start(start_of(in_pairs), [1.0, 0.0, 0.4, 0.1, 0.2, 0.0, 0.1, 0.1]) == 8


def test_an_update_that_does_not_count_leaves_no_trace() -> None:
    """Not even in its last bit, and its loss may be NaN; the update is made again with another batch."""
    losses = [1.0, 0.8, 0.7, 0.5, *[0.4] * 8]
    config = PLATEAU.model_copy(update={"every": 2, "window": 2})
    disturbed, plain = start_of(config), start_of(config)
    for update, loss in enumerate(losses, start=1):
        assert not disturbed.watch(torch.tensor(float("nan")), update=update, refused=REFUSED)
        comes = disturbed.watch(torch.tensor(loss), update=update, refused=COUNTS)
        assert comes == plain.watch(torch.tensor(loss), update=update, refused=COUNTS)
        for name, tensor in plain.tensors().items():
            assert disturbed.tensors()[name].equal(tensor), (update, name)
    assert disturbed.has_started(1)


def test_it_starts_at_the_latest_update_in_any_case() -> None:
    start = start_of(PLATEAU)
    assert not start.has_started(1_000)
    assert start.has_started(1_001)


def test_once_started_it_never_stops() -> None:
    start = start_of(PLATEAU)
    first_start(start, [1.0] * 6)
    for update in range(7, 17):
        assert not start.watch(torch.tensor(1e-3), update=update, refused=COUNTS)  # the reason came only once
    assert start.has_started(1)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("cut", range(12))
def test_a_restored_state_goes_on_as_if_never_stopped(cut: int, every: int) -> None:
    config = PLATEAU.model_copy(update={"every": every, "window": 2})
    losses = [1.0, 0.8, 0.7, 0.5, *[0.4 + 0.001 * n for n in range(20)]]
    whole, broken, restored = (start_of(config) for _ in range(3))
    expected = first_start(whole, losses)
    assert expected is not None
    found = first_start(broken, losses[:cut])
    restored.load({name: tensor.clone() for name, tensor in broken.tensors().items()})
    if found is None:
        found = first_start(restored, losses[cut:], after=cut)
    assert found == expected
    assert restored.has_started(1)

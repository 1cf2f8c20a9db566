"""The denoiser: network, conditions and process together."""

import pytest
import torch
from torch import Tensor, nn

from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.objective import ObjectiveConfig
from models.diffusion.prediction import training_target
from models.diffusion.samplers import DDIMConfig
from models.diffusion.schedule import FlowMatchingConfig, Moment, add_noise
from models.unet import UNetConfig

NETWORK = UNetConfig(
    channels=(8, 16), blocks=(1, 1), attention=(False, True), heads=(1, 2), transformer_depth=(1, 1), norm_groups=4
)
CLASS = ClassConditionerConfig()
TEXT = TextConditionerConfig(width=6)


def build(*conditioners: ClassConditionerConfig | TextConditionerConfig, **changes: object) -> Denoiser:
    torch.manual_seed(0)
    config = DenoiserConfig(**{"network": NETWORK, "conditioners": conditioners, **changes})
    denoiser = Denoiser(config, latent_channels=3, latent_size=8, num_classes=5)
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return denoiser


def latents(count: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=draw), torch.randn(count, 3, 8, 8, generator=draw)


def conditions(count: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {
        "labels": torch.arange(count) % 5,
        "text_tokens": torch.randn(count, 4, 6, generator=draw),
        "text_pooled": torch.randn(count, 6, generator=draw),
    }


def kept(denoiser: Denoiser, count: int = 4) -> Tensor:
    return torch.zeros(count, len(denoiser.conditioners), dtype=torch.bool)


TIMES = torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_squared_error_of_the_prediction(prediction: str) -> None:
    denoiser = build(CLASS, objective=ObjectiveConfig(prediction=prediction))
    x0, noise = latents()
    loss = denoiser(x0, noise, TIMES, conditions(), kept(denoiser)).loss
    level = denoiser.process.level(TIMES, like=x0)
    output = denoiser.output(add_noise(x0, noise, level), TIMES, conditions(), kept(denoiser))
    expected = (output - training_target(x0, noise, level, prediction)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32


def test_an_estimate_explains_the_latents_that_it_was_made_from() -> None:
    denoiser = build(CLASS)
    x, _ = latents()
    for time in TIMES.tolist():
        moment = Moment(time=time, level=denoiser.process.level(torch.tensor([time]), like=x))
        estimate = denoiser.denoise(conditions(), GuidanceConfig(scale=1.0))(x, moment)
        torch.testing.assert_close(moment.level.alpha * estimate.x0 + moment.level.sigma * estimate.eps, x)


@pytest.mark.parametrize("conditioners", [(), (CLASS,), (TEXT,), (CLASS, TEXT)], ids=["none", "class", "text", "both"])
def test_the_gradient_reaches_every_parameter(conditioners: tuple) -> None:
    denoiser = build(*conditioners)
    dropped = kept(denoiser)
    dropped[0] = True
    denoiser(*latents(), TIMES, conditions(), dropped).loss.sum().backward()
    assert [key for key, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_conditions_are_dropped_per_sample_and_per_conditioner() -> None:
    denoiser = build(CLASS, TEXT)
    dropped = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).bool()
    x, _ = latents()
    before = denoiser.output(x, TIMES, conditions(), dropped)
    by_class = denoiser.output(x, TIMES, conditions() | {"labels": conditions()["labels"] + 1}, dropped)
    by_text = denoiser.output(x, TIMES, conditions() | {"text_tokens": conditions()["text_tokens"] + 1}, dropped)
    changed = [(after != before).flatten(1).any(dim=1).tolist() for after in (by_class, by_text)]
    assert changed == [[True, False, True, False], [True, True, False, False]]


def test_the_condition_gap_is_zero_exactly_where_conditions_are_ignored() -> None:
    denoiser = build(CLASS)
    x0, noise = latents()
    assert (denoiser.condition_gap(x0, noise, TIMES, conditions()) > 0).all()
    nn.init.zeros_(denoiser.conditioners[0].table.weight)
    assert (denoiser.condition_gap(x0, noise, TIMES, conditions()) == 0).all()


def draw_samples(denoiser: Denoiser, count: int = 4, **guidance: object) -> Tensor:
    return denoiser.sample(
        latents()[1][:count],
        {name: field[:count] for name, field in conditions().items()},
        sampler=DDIMConfig(num_steps=4),
        guidance=GuidanceConfig(**guidance),
        fresh_noise=lambda index: torch.zeros(count, 3, 8, 8),
    )


@pytest.mark.parametrize("conditioners", [(CLASS,), (CLASS, TEXT)], ids=["class", "both"])
def test_guidance_in_one_call_equals_guidance_in_two(conditioners: tuple) -> None:
    denoiser = build(*conditioners)
    together, apart = (draw_samples(denoiser, scale=3.0, batched=batched) for batched in (True, False))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, draw_samples(denoiser, scale=1.0), atol=1e-3)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    denoiser = build(CLASS)
    torch.testing.assert_close(
        draw_samples(denoiser, 2, scale=2.0), draw_samples(denoiser, 4, scale=2.0)[:2], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"schedule": FlowMatchingConfig()}], ids=["chain", "flow"])
def test_training_lowers_the_loss(changes: dict) -> None:
    objective = ObjectiveConfig(prediction="velocity" if changes else "v")
    denoiser = build(CLASS, objective=objective, **changes)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    x0, noise = latents()
    times = denoiser.times(torch.full((4,), 0.5), batch=0, positions=torch.arange(4), global_batch=4)
    losses = []
    for _ in range(20):
        loss = denoiser(x0, noise, times, conditions(), kept(denoiser)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_learned_variance_doubles_the_output_and_adds_a_bound() -> None:
    denoiser = build(CLASS, objective=ObjectiveConfig(variance="learned"))
    loss = denoiser(*latents(), TIMES, conditions(), kept(denoiser))
    assert loss.bound is not None
    assert denoiser.network.conv_out.out_channels == 6
    level = denoiser.process.level(torch.tensor([500]), like=latents()[0])
    predict = denoiser.denoise(conditions(), GuidanceConfig(scale=1.0))
    estimate = predict(latents()[0], Moment(time=500, level=level))
    assert estimate.log_variance_weight is not None


def test_half_precision_weights_leave_latents_and_loss_in_full_precision() -> None:
    denoiser = build(CLASS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = denoiser(*latents(), TIMES, conditions(), kept(denoiser)).loss
        output = denoiser.output(latents()[0], TIMES, conditions(), kept(denoiser))
    assert loss.dtype == output.dtype == torch.float32


def test_the_whole_training_step_is_one_graph() -> None:
    denoiser = build(CLASS, TEXT, network=NETWORK.model_copy(update={"checkpointed_levels": (0,)}))
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    given = (*latents(), TIMES, conditions(), kept(denoiser))
    torch.testing.assert_close(compiled(*given).loss, denoiser(*given).loss)


def test_latents_that_cannot_be_halved_are_refused_with_advice() -> None:
    per_level = ("channels", "blocks", "attention", "heads", "transformer_depth")
    deep = NETWORK.model_copy(
        update={name: (*getattr(NETWORK, name), getattr(NETWORK, name)[-1]) for name in per_level}
    )
    with pytest.raises(ValueError, match=r"Latents of 6x6 cannot be halved 2 times .* at most 2 entries"):
        Denoiser(DenoiserConfig(network=deep), latent_channels=3, latent_size=6, num_classes=0)


def test_only_tokens_that_are_narrower_than_others_are_projected() -> None:
    """Weights of a model with tokens of one width keep their names."""
    alike = build(TEXT, TextConditionerConfig(name="other", width=6, encoder=MiniLMConfig(max_tokens=5)))
    assert not [name for name in alike.state_dict() if "project_tokens" in name]
    denoiser = build(TEXT, TextConditionerConfig(name="wide", width=7))
    assert [name for name in denoiser.state_dict() if "project_tokens" in name] == [
        "conditioners.0.project_tokens.weight",
        "conditioners.0.project_tokens.bias",
    ]
    given = conditions() | {"wide_tokens": torch.randn(4, 3, 7), "wide_pooled": torch.randn(4, 7)}
    denoiser(*latents(), TIMES, given, torch.eye(4, 2, dtype=torch.bool)).loss.sum().backward()
    assert [key for key, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []
    narrow = denoiser.conditioners[0](given, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(narrow.tokens, denoiser.conditioners[0].project_tokens(given["text_tokens"]))


def test_two_encoders_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different encoders have the name 'text'.*name of its own"):
        build(TEXT, TextConditionerConfig(width=6, encoder=MiniLMConfig(max_tokens=5)))
    build(TEXT, TextConditionerConfig(width=6, use="pooled"))  # of one encoder they read the same features


def test_an_objective_that_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match="ends in pure noise"):
        DenoiserConfig(objective=ObjectiveConfig(prediction="eps"), schedule=FlowMatchingConfig())

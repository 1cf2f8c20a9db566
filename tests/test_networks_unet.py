"""The U-Net: what it is at initialisation, what reaches what, and what leaves its output as it is."""

import pytest
import torch
from torch import Tensor, nn

from models.layers import ConvNeXtBlock, ResidualBlock, TimeEmbedding
from models.unet import UNet, UNetConfig

SMALL = UNetConfig(
    channels=(16, 32), blocks=(1, 2), attention=(False, True), heads=(1, 4), transformer_depth=(1, 2), norm_groups=4
)
VARIANTS = {
    "plain": (SMALL, 0),
    "shift": (SMALL.model_copy(update={"time_injection": "shift"}), 0),
    "tokens": (SMALL, 12),
    "convnext": (SMALL.model_copy(update={"block": "convnext"}), 0),
    "no_middle": (SMALL.model_copy(update={"mid_attention": False, "attention": (False, False)}), 0),
}


def build(name: str = "plain", *, shake: bool = True) -> UNet:
    """A U-Net of a variant; with ``shake`` its zero-initialised layers get numbers, as after some training."""
    torch.manual_seed(0)
    config, token_width = VARIANTS[name]
    network = UNet(config, in_channels=4, out_channels=4, token_width=token_width)
    if shake:
        shake_zeros(network)
    return network


def shake_zeros(network: nn.Module) -> None:
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)


def inputs(name: str = "plain", *, batch: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    given = {
        "x": torch.randn(batch, 4, 8, 8, generator=draw),
        "time": torch.tensor([0.0, 3.5, 999.0])[:batch],
        "embedding": torch.randn(batch, 64, generator=draw),
    }
    if VARIANTS[name][1]:
        given["tokens"] = torch.randn(batch, 5, 12, generator=draw)
        given["token_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()[:batch]
    return given


@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_unet_answers_zero(name: str) -> None:
    assert not build(name, shake=False)(**inputs(name)).any()


@pytest.mark.parametrize("kind", ["residual", "convnext"])
def test_a_new_block_is_the_identity(kind: str) -> None:
    given = {"norm_eps": 1e-5, "dropout": 0.0, "embedding_width": 8, "time_injection": "scale_shift"}
    block = ResidualBlock(8, 8, norm_groups=2, **given) if kind == "residual" else ConvNeXtBlock(8, 8, **given)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    network = build(name)
    network(**inputs(name)).square().sum().backward()
    untouched = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in ("plain", "tokens") for argument in inputs(name) if argument != "token_mask"],
)
def test_every_input_changes_the_output(name: str, argument: str) -> None:
    given, network = inputs(name), build(name)
    before = network(**given)
    assert not torch.allclose(network(**given | {argument: given[argument] + 1}), before, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "tokens"])
def test_samples_of_a_batch_do_not_hear_each_other(name: str) -> None:
    network, given = build(name), inputs(name)
    changed = {key: value.clone() for key, value in given.items()}
    changed["x"][1] += 1
    torch.testing.assert_close(network(**changed)[[0, 2]], network(**given)[[0, 2]], atol=1e-6, rtol=1e-6)


def test_masked_tokens_do_not_exist() -> None:
    network, given = build("tokens"), inputs("tokens")
    hidden = given["tokens"].masked_fill(~given["token_mask"][..., None], 1e4)
    torch.testing.assert_close(network(**given | {"tokens": hidden}), network(**given))
    alone = {key: value[2:] for key, value in given.items()} | {"tokens": given["tokens"][2:, :1], "token_mask": None}
    torch.testing.assert_close(network(**alone), network(**given)[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "tokens"])
def test_checkpointed_levels_give_the_same_output_and_gradients(name: str) -> None:
    config, token_width = VARIANTS[name]
    plain = build(name)
    twice = UNet(
        config.model_copy(update={"checkpointed_levels": (0, 1)}),
        in_channels=4,
        out_channels=4,
        token_width=token_width,
    )
    twice.load_state_dict(plain.state_dict())
    outputs = [network(**inputs(name)) for network in (plain, twice)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (key, p), q in zip(plain.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


def test_a_checkpointed_level_keeps_fewer_activations() -> None:
    def kept(levels: tuple[int, ...]) -> int:
        config = SMALL.model_copy(update={"checkpointed_levels": levels})
        network = UNet(config, in_channels=4, out_channels=4)
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(**inputs())
        return sum(sizes)

    assert kept((0, 1)) < kept((0,)) < kept(())


def test_the_graph_of_convnext_blocks_does_not_break_under_compile() -> None:
    """That of residual blocks and tokens is part of the whole training step, in test_networks_denoiser."""
    config, token_width = VARIANTS["convnext"]
    # As small as it gets with every part in it, since tracing takes its time; one level is checkpointed.
    smaller = {"channels": (16, 16), "blocks": (1, 1), "transformer_depth": (1, 1), "checkpointed_levels": (0,)}
    network = UNet(config.model_copy(update=smaller), in_channels=4, out_channels=4, token_width=token_width)
    shake_zeros(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)  # raises where the graph breaks
    torch.testing.assert_close(compiled(**inputs()), network(**inputs()))


def test_half_precision_hears_every_step_of_the_time() -> None:
    embedding = TimeEmbedding(32, 16).bfloat16()
    late = embedding(torch.tensor([998.0, 999.0]))
    assert not torch.equal(late[0], late[1])


def test_time_features_are_cosines_and_sines_of_falling_frequency() -> None:
    seen = []
    embedding = TimeEmbedding(4, 8)
    embedding.linear_1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    embedding(torch.tensor([2.0]))
    phases = torch.tensor([2.0, 2.0 * 10_000**-0.5])
    torch.testing.assert_close(seen[0], torch.cat([phases.cos(), phases.sin()])[None])


def test_sizes_that_cannot_be_halved_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="Latents of 7x8 cannot be halved 1 times: use sizes that are multiples of 2"):
        build()(torch.zeros(1, 4, 7, 8), torch.zeros(1))


def test_tokens_are_needed_exactly_where_the_unet_attends_to_them() -> None:
    with pytest.raises(ValueError, match="needs tokens"):
        build("tokens")(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="without cross-attention"):
        build("plain")(torch.zeros(1, 4, 8, 8), torch.zeros(1), tokens=torch.zeros(1, 2, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2, 3)}, "blocks has 3 entries, channels has 2: give one a level"),
        ({"channels": (16, 30)}, r"channels\[1\] = 30 is not a multiple of norm_groups = 4"),
        ({"heads": (1, 5)}, r"channels\[1\] = 32 is not a multiple of heads\[1\] = 5"),
        ({"channels": (15, 32), "norm_groups": 1}, r"channels\[0\] = 15 must be even"),
        ({"checkpointed_levels": (0, 2)}, r"checkpointed_levels names \[2\], but the levels are 0 to 1"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**SMALL.model_dump() | change)

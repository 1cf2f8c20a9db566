"""The autoencoder and its adversary: their mathematics, and what may depend on what."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from models.autoencoder.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)
from models.autoencoder.objective import rank_mean_gradient
from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig, _tile_starts

JUDGE = DiscriminatorConfig(channels=8, downsamplings=1, norm_groups=4)
SMALL = VAEConfig(latent_channels=3, channels=(8, 16, 16), blocks_per_level=1, norm_groups=4)


def build(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(SMALL.model_copy(update=changes), image_channels=1)
    for parameter in vae.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return vae


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def posterior() -> Posterior:
    draw = torch.Generator().manual_seed(2)
    return Posterior(torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, 4, generator=draw))


def test_kl_is_that_of_two_gaussians() -> None:
    given = posterior()
    expected = kl_divergence(Normal(given.mean, (given.log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(given.kl(), expected.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(given.kl_per_channel(), expected.sum(dim=(2, 3)))


def test_kl_vanishes_only_at_the_standard_normal() -> None:
    zeros = torch.zeros(1, 3, 4, 4)
    assert Posterior(zeros, zeros).kl().item() == 0
    assert (posterior().kl_per_channel() > 0).all()


def test_samples_have_the_moments_of_the_posterior() -> None:
    given = posterior()
    noise = torch.randn(20_000, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = Posterior(given.mean.expand_as(noise), given.log_variance.expand_as(noise)).sample(noise)
    torch.testing.assert_close(drawn.mean(dim=0), given.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0).log(), given.log_variance, atol=0.1, rtol=0)
    assert torch.equal(given.sample(torch.zeros_like(given.mean)), given.mode())


def test_log_variance_is_clamped_before_anything_can_overflow() -> None:
    vae = build()
    with torch.no_grad():
        vae.encoder.conv_out.bias[3:] = torch.tensor([1e4, -1e4, 0.0])
    log_variance = vae.encode(images()).log_variance
    assert (log_variance[:, 0] == 20).all()
    assert (log_variance[:, 1] == -30).all()
    assert vae.encode(images()).kl().isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"quant_convs": True, "mid_attention": False}])
def test_the_gradient_reaches_every_parameter(changes: dict) -> None:
    vae = build(**changes)
    reconstruction, given = vae(images(), torch.randn(2, 3, 4, 4))
    ((reconstruction - images()).abs().mean() + given.kl().mean()).backward()
    assert [key for key, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_latents_are_smaller_by_the_factor_and_images_come_back_at_full_size() -> None:
    vae = build()
    assert vae.factor == 4
    latents = vae.encode(images(size=24)).mode()
    assert latents.shape[-2:] == (6, 6)
    assert vae.decode(latents).shape == (2, 1, 24, 24)


def test_checkpointing_changes_neither_output_nor_gradient() -> None:
    results = []
    for checkpointed in (False, True):
        vae = build(checkpointed=checkpointed)
        reconstruction, given = vae(images(), torch.ones(2, 3, 4, 4))
        (reconstruction.square().sum() + given.kl().sum()).backward()
        results.append([reconstruction, *(p.grad for p in vae.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_autoencoder_and_discriminator_are_one_graph_each() -> None:
    config = VAEConfig(latent_channels=3, channels=(8, 8), blocks_per_level=1, norm_groups=4, checkpointed=True)
    vae, judge = AutoencoderKL(config, image_channels=1), Discriminator(JUDGE, image_channels=1)
    noise = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    for network, given in ((vae, (images(), noise)), (judge, (images(),))):
        compiled = torch.compile(network, backend="eager", fullgraph=True)  # raises where the graph breaks
        found, expected = compiled(*given), network(*given)
        torch.testing.assert_close(found, expected)


def test_images_of_a_batch_do_not_hear_each_other() -> None:
    vae, noise = build(), torch.randn(2, 3, 4, 4)
    changed = images().clone()
    changed[1] += 1
    torch.testing.assert_close(vae(changed, noise)[0][0], vae(images(), noise)[0][0], atol=1e-6, rtol=1e-6)


def test_the_last_layer_is_where_the_image_is_made() -> None:
    vae = build()
    with torch.no_grad():
        vae.last_layer.zero_()
    decoded = vae.decode(torch.randn(2, 3, 4, 4))
    assert torch.equal(decoded, torch.zeros_like(decoded) + vae.decoder.conv_out.bias[:, None, None])


def test_one_tile_that_covers_everything_is_the_plain_decode() -> None:
    vae, latents = build(), torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(vae.decode_tiled(latents, tile=6, overlap=2), vae.decode(latents))


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (5, 3), (8, 4)])
def test_tiles_of_a_local_decoder_join_without_a_seam(tile: int, overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build()
    monkeypatch.setattr(vae, "decode", lambda z: F.interpolate(z[:, :1], scale_factor=4.0))
    latents = torch.randn(2, 3, 11, 17)
    torch.testing.assert_close(vae.decode_tiled(latents, tile=tile, overlap=overlap), vae.decode(latents))


def test_tiled_decoding_stays_close_to_plain_decoding() -> None:
    vae, latents = build(mid_attention=False), torch.randn(1, 3, 24, 24)
    plain = vae.decode(latents)
    error = (vae.decode_tiled(latents, tile=16, overlap=8) - plain).std() / plain.std()
    assert error < 0.2


@pytest.mark.parametrize(("size", "tile", "overlap"), [(8, 8, 2), (9, 8, 2), (100, 8, 7), (31, 10, 0)])
def test_tiles_cover_every_pixel_and_overlap_enough(size: int, tile: int, overlap: int) -> None:
    starts = _tile_starts(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(size - tile, 0)
    assert all(0 < after - before <= tile - overlap for before, after in pairwise(starts))


def test_tiles_that_cannot_advance_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap = 8 must be at least 0 and below tile = 8"):
        build().decode_tiled(torch.zeros(1, 3, 9, 9), tile=8, overlap=8)


def test_images_that_do_not_suit_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"Images of 1 channels and 18x16 pixels .* multiples of 4"):
        build().encode(torch.zeros(1, 1, 18, 16))
    with pytest.raises(ValueError, match=r"Images of 3 channels .* takes 1 channels"):
        build().encode(torch.zeros(1, 3, 16, 16))


def test_widths_that_do_not_split_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels\[1\] = 30 is not a multiple of norm_groups = 8"):
        VAEConfig(channels=(32, 30), norm_groups=8)


# -------------------------------------------------------------------------------------------------- discriminator


def test_a_logit_sees_seventy_pixels() -> None:
    judge = Discriminator(DiscriminatorConfig(channels=4, norm_groups=4), image_channels=1)
    for name, layer in judge.layers.named_children():
        if isinstance(layer, nn.GroupNorm):
            setattr(judge.layers, name, nn.Identity())  # its statistics see everything
    image = torch.randn(1, 1, 160, 160, requires_grad=True)
    logits = judge(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], image)
    rows = gradient[0, 0].any(dim=1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_the_discriminator_judges_each_image_alone() -> None:
    judge = Discriminator(DiscriminatorConfig(channels=8, norm_groups=4, downsamplings=2), image_channels=1)
    together = images(3, size=32)
    torch.testing.assert_close(judge(together)[:1], judge(together[:1]), atol=1e-6, rtol=1e-5)


def test_hinge_losses_are_zero_beyond_the_margin_and_linear_within() -> None:
    beyond = torch.tensor([1.5, 3.0])
    assert discriminator_hinge_loss(beyond, -beyond).item() == 0
    assert discriminator_hinge_loss(torch.tensor([0.5]), torch.tensor([0.25])).item() == 0.5 * (0.5 + 1.25)
    assert generator_hinge_loss(torch.tensor([2.0, -1.0])).item() == -0.5


def test_the_adaptive_weight_makes_both_gradients_equally_long() -> None:
    vae, judge = (
        build(),
        Discriminator(DiscriminatorConfig(channels=8, norm_groups=4, downsamplings=1), image_channels=1),
    )
    reconstruction, _ = vae(images(), torch.zeros(2, 3, 4, 4))
    terms = [(reconstruction - images()).abs().mean(), generator_hinge_loss(judge(reconstruction))]
    of_pixels, of_judge = (torch.autograd.grad(term, vae.last_layer, retain_graph=True)[0] for term in terms)
    weight = adaptive_weight(of_pixels, of_judge)
    assert not adaptive_weight(of_pixels.clone().requires_grad_(), of_judge).requires_grad
    torch.testing.assert_close((weight * of_judge).norm(), of_pixels.norm(), rtol=0.02, atol=0)
    assert adaptive_weight(of_pixels, torch.zeros_like(of_judge), maximum=10.0) == 10.0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_gradients_that_half_precision_would_lose_are_compared(precision: torch.dtype) -> None:
    layer, features = torch.nn.Conv2d(4, 3, 1), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    elements = 16 * 3 * 512 * 512  # of a usual batch: 1 / elements is the gradient at each
    exact = rank_mean_gradient(layer(features).abs().sum() / elements, layer.weight)
    with torch.autocast("cpu", precision):
        found = rank_mean_gradient(layer(features).float().abs().sum() / elements, layer.weight)
    assert (found - exact).norm() < 0.02 * exact.norm()

"""Drawing images: where samples start, and how large ones are decoded."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.manifest import LatentScaling
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, slerp
from models.unet import UNetConfig
from pipelines.model.sampling import ImageSampler
from pipelines.model.weights import Normalisation
from pipelines.tools.sample import SampleConfig, start_of

SIZE, FACTOR = 8, 2


def sampler(*, tile: int = 0) -> ImageSampler:
    torch.manual_seed(0)
    network = UNetConfig(
        channels=(8,), blocks=(1,), attention=(False,), heads=(1,), transformer_depth=(1,), norm_groups=4
    )
    denoiser = Denoiser(DenoiserConfig(network=network), latent_channels=2, latent_size=SIZE, num_classes=0)
    vae = VAEConfig(latent_channels=2, channels=(8, 8), blocks_per_level=1, norm_groups=4, mid_attention=False)
    normalisation = Normalisation(LatentScaling(mean=(0.0, 0.0), std=(1.0, 1.0)))
    return ImageSampler(
        denoiser, normalisation, AutoencoderKL(vae, image_channels=3), latent_shape=(2, SIZE, SIZE), seed=3, tile=tile
    )


def drawn(given: ImageSampler, indices: range, noise: Tensor | None = None) -> np.ndarray:
    return given.draw(indices, {}, sampler=DDIMConfig(num_steps=2), guidance=GuidanceConfig(scale=1.0), noise=noise)


def config(**changes: Any) -> SampleConfig:
    return SampleConfig.model_validate({"inputs": {"vae": "v", "unet": "u"}, "number": 5, **changes})


def test_an_image_starts_from_its_own_noise_whatever_its_batch() -> None:
    given = sampler()
    together, alone = given.noise(range(5)), given.noise(range(3, 4))
    assert torch.equal(together[3:4], alone)
    assert torch.equal(start_of(config(), given, range(5)), together)
    assert torch.equal(start_of(config(number=1, interpolate=True), given, range(1)), together[:1])


@pytest.mark.parametrize("batch", [range(5), range(1, 3)])
def test_interpolation_runs_along_the_arc_from_the_first_noise_to_the_last(batch: range) -> None:
    given = sampler()
    ends = given.noise(range(5))
    starts = start_of(config(interpolate=True), given, batch)
    for index, start in zip(batch, starts, strict=True):
        torch.testing.assert_close(start, slerp(ends[:1], ends[4:], index / 4)[0])
    if len(batch) == 5:
        torch.testing.assert_close(starts[[0, 4]], ends[[0, 4]])
        own = drawn(given, range(5))
        between = drawn(given, range(5), starts)
        assert np.abs(between[[0, 4]].astype(int) - own[[0, 4]]).max() <= 1  # the ends are the images themselves
        assert (between[2] != own[2]).any()


def test_images_are_decoded_in_tiles_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(sampler(), range(2))
    assert np.abs(drawn(sampler(tile=SIZE), range(2)).astype(int) - whole).max() <= 1
    tiled, sides = sampler(tile=4), []
    decode = tiled.vae.decode
    monkeypatch.setattr(tiled.vae, "decode", lambda latents: (sides.append(latents.shape[-1]), decode(latents))[1])
    assert drawn(tiled, range(2)).shape == whole.shape == (2, SIZE * FACTOR, SIZE * FACTOR, 3)
    assert set(sides) == {4}
    assert len(sides) > 1

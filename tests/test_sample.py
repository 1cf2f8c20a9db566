"""Drawing images: the noise that samples start from, and the decoding of large ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.samplers import slerp
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.unet import UNetConfig
from pipelines.model.noise import noise_of
from pipelines.tools.sample import SampleConfig, draw_batch, start_of, write_images

SIZE, FACTOR = 8, 2


def model() -> LatentDiffusion:
    torch.manual_seed(0)
    network = UNetConfig(
        channels=(8,), blocks=(1,), attention=(False,), heads=(1,), transformer_depth=(1,), norm_groups=4
    )
    vae = VAEConfig(latent_channels=2, channels=(8, 8), blocks_per_level=1, norm_groups=4, mid_attention=False)
    return LatentDiffusion(
        autoencoder=AutoencoderKL(vae, image_channels=3),
        denoiser=Denoiser(DenoiserConfig(network=network), latent_channels=2, latent_size=SIZE, num_classes=0),
        normalisation=Normalisation(mean=(0.0, 0.0), std=(1.0, 1.0)),
    )


def noise(indices: range) -> Tensor:
    return noise_of(3, indices, shape=(2, SIZE, SIZE), device=torch.device("cpu"))("sample")


def config(**changes: Any) -> SampleConfig:
    given = {"inputs": {"vae": "v", "unet": "u"}, "number": 5, "seed": 3, "sampler": {"kind": "ddim", "num_steps": 2}}
    return SampleConfig.model_validate({**given, "guidance": {"scale": 1.0}, **changes})


def test_an_image_starts_from_its_own_noise_whatever_its_batch() -> None:
    together, alone = noise(range(5)), noise(range(3, 4))
    assert torch.equal(together[3:4], alone)
    assert torch.equal(start_of(config(), model(), range(5)), together)
    assert torch.equal(start_of(config(number=1, interpolate=True), model(), range(1)), together[:1])


@pytest.mark.parametrize("batch", [range(5), range(1, 3)])
def test_interpolation_runs_along_the_arc_from_the_first_noise_to_the_last(batch: range) -> None:
    given, ends, arc = model(), noise(range(5)), config(interpolate=True)
    starts = start_of(arc, given, batch)
    for index, start in zip(batch, starts, strict=True):
        torch.testing.assert_close(start, slerp(ends[:1], ends[4:], index / 4)[0])
    if len(batch) == 5:
        torch.testing.assert_close(starts[[0, 4]], ends[[0, 4]])
        own = draw_batch(config(), given, range(5), {})
        between = draw_batch(arc, given, range(5), {})
        assert np.abs(between[[0, 4]].astype(int) - own[[0, 4]]).max() <= 1  # the ends are the images themselves
        assert (between[2] != own[2]).any()


def test_images_are_decoded_in_tiles_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw_batch(config(), model(), range(2), {})
    assert np.abs(draw_batch(config(tile=SIZE), model(), range(2), {}).astype(int) - whole).max() <= 1
    tiled, sides = model(), []
    decode = tiled.autoencoder.decode
    monkeypatch.setattr(
        tiled.autoencoder, "decode", lambda latents: (sides.append(latents.shape[-1]), decode(latents))[1]
    )
    assert draw_batch(config(tile=4), tiled, range(2), {}).shape == whole.shape
    assert whole.shape == (2, SIZE * FACTOR, SIZE * FACTOR, 3)
    assert set(sides) == {4}
    assert len(sides) > 1


def test_names_of_images_keep_the_letters_of_every_script(tmp_path: Path) -> None:
    names = ["Gr\u00f6\u00dfe", "A\u0308rzte", "\u732b", "a/../b c"]
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    answer = write_images(config(output=str(tmp_path)), list(images), names)
    shown = ["Gr\u00f6\u00dfe", "\u00c4rzte", "\u732b", "a_b_c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"00000{index}-{name}-seed3.png" for index, name in enumerate(shown)),
        "grid.png",
    ]
    assert len(answer.found["images"]) == 4

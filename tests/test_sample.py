"""Drawing images: the noise that samples start from, and the decoding of large ones."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE, run_here
from PIL import Image
from torch import Tensor

from data.files import write_json
from data.manifest import Parents, UNetManifest
from data.samples import PNG_KEYWORD, encode_png
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, slerp
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.unet import UNetConfig
from pipelines.model.noise import noise_of
from pipelines.model.weights import GuidedInputs, check_guide
from pipelines.runtime.config.command_line import run_tool
from pipelines.tools import export, reconstruct, sample
from pipelines.tools.sample import SampleConfig, draw_batch, image_name, start_of

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


def test_names_of_images_keep_the_letters_of_every_script() -> None:
    names = ["Gr\u00f6\u00dfe", "A\u0308rzte", "\u732b", "a/../b c"]
    shown = ["Gr\u00f6\u00dfe", "\u00c4rzte", "\u732b", "a_b_c"]
    assert [image_name(config(), index, name) for index, name in enumerate(names)] == [
        f"00000{index}-{name}-seed3.png" for index, name in enumerate(shown)
    ]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model for the tools, without its folders."""
    parents = SimpleNamespace(guide=None, unet=SimpleNamespace(classes=(), weights=""), vae=SimpleNamespace(weights=""))
    for tool in (sample, export, reconstruct):
        monkeypatch.setattr(tool, "read_parents", lambda config: parents)
    for tool in (sample, export):
        monkeypatch.setattr(tool, "check_latent_diffusion", lambda *_: None)
    monkeypatch.setattr(sample, "load_latent_diffusion", lambda *_, device: model())


def drawn(folder: Path, **changes: Any) -> int:
    given = config(output=str(folder), batch_size=2, **changes)
    return run_tool(SampleConfig, lambda _: sample.draw(given), table="sample", about="", argv=["--config", str(SMOKE)])


@pytest.mark.parametrize("name", ["file", "file/below", "to nothing", "x" * 300, "read-only"])
@pytest.mark.parametrize("tool", [sample, export, reconstruct])
def test_a_folder_that_cannot_be_written_to_is_found_before_any_work(
    tool: ModuleType, name: str, trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "to nothing").symlink_to(tmp_path / "nothing")
    if name == "read-only":
        monkeypatch.setattr("os.access", lambda path, mode: False)
    for work in ("load_latent_diffusion", "snapshots_in"):
        monkeypatch.setattr(tool, work, lambda *_, **__: pytest.fail("work was done"), raising=False)
    done = run_here(tool.__name__.rpartition(".")[2], "--output", str(tmp_path / name))
    assert done.returncode == 2
    assert f".output: {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_drawn_before_a_disk_was_full_or_ctrl_c_was_pressed_are_there(
    trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = sample.write_beside
    for fault, code, said in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk"), 2, "sample: disk: No space left on device"),
        (KeyboardInterrupt(), 75, "sample: stopped."),
    ):
        folder = tmp_path / str(code)

        def failing(path: Path, payload: bytes, fault: BaseException = fault) -> Path:
            if path.name.startswith("000003"):
                raise fault
            return write(path, payload)

        monkeypatch.setattr(sample, "write_beside", failing)
        assert drawn(folder) == code
        assert capsys.readouterr().err.strip().endswith(said)
        assert [path.name[:6] for path in sorted(folder.iterdir())] == ["000000", "000001", "000002"]


def test_a_negative_prompt_is_refused_where_it_would_do_nothing(
    trained: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drawn(tmp_path, negative_prompt="blurry", guidance={"scale": 2.0}) == 2
    assert "negative_prompt = 'blurry', but u was not trained on captions." in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"negative_prompt does nothing at guidance.scale = 1"):
        config(negative_prompt="blurry")


def test_a_class_is_refused_where_the_model_reads_none(
    trained: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drawn(tmp_path, class_name="sneaker") == 2
    assert "class_name = 'sneaker', but u reads no class." in capsys.readouterr().err


def test_a_guide_whose_output_means_something_else_is_refused(tmp_path: Path) -> None:
    for name, prediction in (("unet", "v"), ("narrower", "v"), ("other", "x0")):
        objective = {"prediction": prediction, "variance": "fixed"}
        denoiser = {"conditioners": [], "schedule": {"kind": "cosine"}, "objective": objective, "network": name}
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"denoiser": denoiser, "statistics": {}})
    unet = UNetManifest.model_construct(vae="v", classes=("a", "b"), files=())
    parents = Parents(unet=unet, guide=unet)
    inputs = {"vae": "v", "unet": str(tmp_path / "unet")}
    check_guide(GuidedInputs(**inputs, guide=str(tmp_path / "narrower")), parents)
    with pytest.raises(ValueError, match="other prediction than inputs.unet"):
        check_guide(GuidedInputs(**inputs, guide=str(tmp_path / "other")), parents)
    with pytest.raises(ValueError, match="is inputs.unet itself"):
        check_guide(GuidedInputs(**inputs, guide=inputs["unet"]), parents)
    parents["guide"] = unet.model_copy(update={"classes": ("a",)})
    with pytest.raises(ValueError, match="other classes than inputs.unet"):
        check_guide(GuidedInputs(**inputs, guide=str(tmp_path / "narrower")), parents)


def with_classes() -> LatentDiffusion:
    """A model of two classes whose weights are random, small enough for an inversion to come back."""
    given = model()
    config = given.denoiser.config.model_copy(update={"conditioners": (ClassConditionerConfig(),)})
    denoiser = Denoiser(config, latent_channels=2, latent_size=SIZE, num_classes=2)
    for parameter in denoiser.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    return replace(given, denoiser=denoiser.eval())


def test_a_picture_comes_back_from_its_noise_the_closer_the_finer_the_steps() -> None:
    given, images = with_classes(), torch.rand(1, 3, 16, 16) * 2 - 1
    latents, source, errors = given.encode(images), {"labels": torch.tensor([1])}, []
    for num_steps in (10, 40, 160):
        sampler = DDIMConfig(num_steps=num_steps)
        noise = given.invert(images, source, sampler=sampler)
        options = {"sampler": sampler, "guidance": GuidanceConfig(), "fresh_noise": torch.zeros_like}
        errors.append(float((given.denoiser.sample(noise, source, **options) - latents).norm() / latents.norm()))
        other = given.denoiser.sample(noise, {"labels": torch.tensor([0])}, **options)
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.05
    assert (other - latents).norm() / latents.norm() > 4 * errors[2]


def test_an_inverted_picture_is_drawn_once_for_each_condition(
    trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "load_latent_diffusion", lambda *_, device: with_classes())
    parents = SimpleNamespace(
        guide=None, unet=SimpleNamespace(classes=("a", "b"), weights=""), vae=SimpleNamespace(weights="")
    )
    monkeypatch.setattr(sample, "read_parents", lambda config: parents)
    picture = tmp_path / "picture.png"
    picture.write_bytes(encode_png(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)))
    options = {"invert": picture, "invert_as": "b", "sampler": {"kind": "ddim", "num_steps": 50}}
    assert drawn(tmp_path / "drawn", **options) == 0
    (said,) = re.findall(r"(\S+) dB from its noise back to the picture, (\S+) dB by", capsys.readouterr().out)
    assert float(said[0]) == pytest.approx(float(said[1]), abs=0.5)
    images = sorted((tmp_path / "drawn").glob("0*.png"))
    assert [path.name[:8] for path in images] == ["000000-a", "000001-b"]
    with Image.open(images[0]) as image:
        assert json.loads(image.info[PNG_KEYWORD])["invert"] == str(picture)
    assert drawn(tmp_path / "drawn", invert=tmp_path / "none.png") == 2
    assert "sample.invert" in capsys.readouterr().err
    assert drawn(tmp_path / "drawn", **{**options, "invert_as": "c"}) == 2
    assert "'c' is no class" in capsys.readouterr().err
    assert drawn(tmp_path / "drawn", **{**options, "invert_as": "all"}) == 2
    assert "a picture has one class" in capsys.readouterr().err
    for changes, why in (
        ({"invert": picture, "interpolate": True}, "interpolate needs the noise of two images"),
        ({"invert": picture, "sampler": {"kind": "ddim", "eta": 0.5}}, "invert needs a sampler without fresh noise"),
        ({"invert": picture, "sampler": {"kind": "ddpm"}}, "invert needs a sampler without fresh noise"),
        ({"invert_as": "b"}, "invert_as describes the picture of invert"),
    ):
        with pytest.raises(ValueError, match=why):
            config(**changes)


@pytest.mark.parametrize(("num_classes", "number", "columns", "rows"), [(3, 8, 3, 3), (20, 40, 8, 5), (0, 3, 3, 1)])
def test_a_grid_has_all_images_and_each_below_its_class(
    num_classes: int, number: int, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.full((4, 4, 3), index, np.uint8) for index in range(number)]
    seen: dict[str, Any] = {}
    monkeypatch.setattr(sample, "grid_png", lambda cells, **words: seen.update(cells=cells, **words) or b"")
    sample.grid_of(
        config(number=number), images, [f"c{index % num_classes}" if num_classes else "" for index in range(number)]
    )
    cells = seen["cells"][..., 0, 0, 0]
    assert cells.shape == (rows, columns)
    assert cells.ravel().tolist() == [*range(number), *[255] * (rows * columns - number)]
    assert seen["column_labels"] == (["c0", "c1", "c2"] if num_classes == 3 else [])


def test_a_second_draw_leaves_the_first_as_it_is(
    trained: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drawn(tmp_path) == 0
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn(tmp_path) == 0, "equal images are the same files"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert drawn(tmp_path, sampler={"kind": "ddim", "num_steps": 3}) == 0
    assert "5 images and grid-2.png in" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in first} == first
    assert {path.stem for path in tmp_path.iterdir()} == {
        stem + suffix for stem in (path.stem for path in first) for suffix in ("", "-2")
    }

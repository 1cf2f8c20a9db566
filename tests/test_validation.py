"""The validation sample: spread over the whole split, the same for everybody, in bounded passes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from manifests import commit_latents
from test_evaluate import write_corpus, write_model

from data.files import read_json
from data.loading import LatentShards
from data.manifest import Parents, read_input
from data.order.order import spread_sample
from data.samples import latent_members
from data.shards.writer import ShardWriter
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.samplers import DDIMConfig
from models.features.scattering import ScatteringConfig
from models.metrics.frechet import frechet_distance
from models.metrics.kernel import kernel_distance
from pipelines.model.captions import CaptionFeatures, StoredFeaturesConfig
from pipelines.model.decoded import finite_levels
from pipelines.model.device import Device
from pipelines.model.noise import noise_of
from pipelines.model.validation import GridConfig, UNetValidation, VAEValidation, show_grid
from pipelines.model.weights import load_latent_diffusion, load_vae
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.training.config import TrainingConfig
from pipelines.train_unet import TrainUNetConfig, check

CLASSES = [f"class {number}" for number in range(20)]
CPU = Device(torch.device("cpu"))


@pytest.mark.parametrize("num_samples", [1, 19, 256, 257, 700, 5_000, 5_120, 1_000_003])
def test_a_sample_is_spread_over_sorted_classes_and_over_classes_in_turn(num_samples: int) -> None:
    chosen = spread_sample(num_samples, 256)
    assert len(chosen) == min(num_samples, 256)
    assert (np.diff(chosen) > 0).all()
    assert (chosen >= 0).all()
    assert (chosen < num_samples).all()
    assert (chosen == spread_sample(num_samples, 256)).all()
    for labels in (chosen * 20 // num_samples, chosen % 20):
        # Of each of 20 equal classes at least half of its share.
        assert (np.bincount(labels, minlength=min(20, num_samples)) >= len(chosen) // 40).all()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stage with a corpus and latents whose 20 classes lie one after the other, and an untrained model."""
    root = tmp_path_factory.mktemp("sorted")
    labels = [number // 30 for number in range(600)]
    write_corpus(root / "corpus", CLASSES, [0] * 4, labels)
    write_model(root, CLASSES)
    entries = []
    (root / "latents").mkdir()
    for split, of_split in (("train", [0]), ("val", labels)):
        with ShardWriter(root / "latents" / f"{split}-000000.tar") as shard:
            for number, label in enumerate(of_split):
                moments = np.full((2, 2, 8, 8), number / 600, dtype=np.float16)
                carried = {"cls": b"%d" % label}
                shard.add(f"{number:04}", latent_members(f"{number:04}", moments, carried=carried))
        entries.append(shard.entry)
    commit_latents(root / "latents", entries, channels=2, size=8, classes=tuple(CLASSES))
    parents = Parents({name: read_input(name, root / name) for name in ("corpus", "vae", "unet", "latents")})
    return SimpleNamespace(
        name="train",
        folder=root,
        config=TrainingConfig.model_construct(updates=11, validate_every=5),
        parents=parents,
        is_main=True,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            mixed_precision="no",
            autocast=torch.no_grad,
            process_index=0,
            num_processes=1,
        ),
        tracker=SimpleNamespace(log_image=lambda name, path, step: None),
        log=SimpleNamespace(info=lambda text: None),
    )


def unet_validation(stage: Any, *, images_per_pass: int, num_samples: int = 0) -> tuple[UNetValidation, Denoiser]:
    inputs = cast(Any, SimpleNamespace(vae=str(stage.folder / "vae"), unet=str(stage.folder / "unet")))
    denoiser = load_latent_diffusion(inputs, stage.parents, device=CPU).denoiser
    latents = stage.parents.latents
    validation = UNetValidation(
        stage,
        GridConfig(rows=1, max_columns=5, sampler=DDIMConfig(num_steps=2)),
        num_samples=num_samples,
        extractor=ScatteringConfig(resolution=16),
        latents_folder=str(stage.folder / "latents"),
        vae_folder=inputs.vae,
        images_per_pass=images_per_pass,
        device=CPU,
        captions=CaptionFeatures(StoredFeaturesConfig(), denoiser.config, latents=latents, device=CPU.torch),
    )
    return validation, denoiser


def vae_validation(stage: Any, *, images_per_pass: int) -> VAEValidation:
    folder, extractor = str(stage.folder / "corpus"), ScatteringConfig()
    return VAEValidation(stage, corpus_folder=folder, images_per_pass=images_per_pass, extractor=extractor)


def test_both_trainings_validate_on_all_classes_of_a_sorted_corpus(stage: Any) -> None:
    of_vae = vae_validation(stage, images_per_pass=64)
    assert of_vae.images is not None
    assert set(of_vae.images.labels) == set(range(20))
    of_unet, _ = unet_validation(stage, images_per_pass=64)
    assert of_unet.validation is not None
    assert set(of_unet.validation[1]["labels"].tolist()) == set(range(20))
    # The same samples, and the scale of all of them: not the mean of what each pass has.
    assert of_unet.validation[1]["labels"].tolist() == of_vae.images.labels.tolist()
    vae = load_vae(stage.folder / "vae", stage.parents.vae, device=CPU)
    found = [vae_validation(stage, images_per_pass=size).validate(vae, update=1) for size in (256, 7)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0].keys() == {"val/psnr", "val/latent_std", "val/high_frequency_share"}


def test_a_vae_ends_with_the_distances_of_what_it_decodes_at_its_latents_and_between_them(stage: Any) -> None:
    vae = load_vae(stage.folder / "vae", stage.parents.vae, device=CPU)
    validation = vae_validation(stage, images_per_pass=64)
    assert validation.images is not None
    stored = torch.from_numpy(validation.images.images).movedim(-1, 1)
    with torch.no_grad():
        latents = vae.encode(stored / 127.5 - 1).mean
    seen = latents.numpy().astype(np.float64)
    seen = (seen - seen.mean(axis=(0, 2, 3), keepdims=True)) / seen.std(axis=(0, 2, 3), ddof=1, keepdims=True)
    flat = seen.reshape(len(seen), -1)
    apart = np.square(flat[:, None] - flat[None]).sum(axis=2) + np.diag([np.inf] * len(flat))
    between = (latents + latents[apart.argmin(axis=1)]) / 2
    features = ScatteringConfig().build()
    expected = {}
    for name, decoded in (("reconstruction", latents), ("interpolation", between)):
        with torch.no_grad():
            distance = frechet_distance(features(vae.decode(decoded)), features(stored))
        expected |= {f"val/{name}_distance": distance.value, f"val/{name}_distance_error": distance.error}
    found = validation.validate(vae, update=11)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_validation_takes_no_more_images_at_once_than_training(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = Denoiser.output

    def output(self: Denoiser, x: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(len(x))
        return real(self, x, *given)

    monkeypatch.setattr(Denoiser, "output", output)
    metrics = []
    for size in (256, 3):
        seen.clear()
        validation, denoiser = unet_validation(stage, images_per_pass=size)
        metrics.append(validation.validate(denoiser, update=1))
        assert max(seen) <= 2 * size  # guidance brings each image twice
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def test_grids_are_tracked_at_updates_that_trainings_of_any_length_share(stage: Any, tmp_path: Path) -> None:
    for updates in (5, 8, 11):
        shown: list[tuple[str, int]] = []
        tracker = SimpleNamespace(log_image=lambda name, path, step, shown=shown: shown.append((name, step)))
        config = TrainingConfig.model_construct(updates=updates, validate_every=5)
        training = SimpleNamespace(**{**vars(stage), "folder": tmp_path, "config": config, "tracker": tracker})
        for update in sorted({0, *range(5, updates, 5), updates}):  # when validation is due
            show_grid(cast(Any, training), "samples", b"", update=update, shown="")
        steps = [("val/samples", update) for update in range(0, updates + 1, 5)]
        assert shown == [*steps, ("final/samples", 0)], updates
    written = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert written == [f"samples-{update:08}.png" for update in (0, 5, 8, 10, 11)]


def test_a_disk_that_takes_no_grid_costs_the_picture_alone(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "grids").write_text("no folder")
    config = TrainingConfig.model_construct(updates=5, validate_every=5)
    said: list[str] = []
    log = SimpleNamespace(info=said.append)
    training = SimpleNamespace(**{**vars(stage), "folder": tmp_path, "config": config, "log": log})
    show_grid(cast(Any, training), "samples", b"", update=5, shown="val/loss 1")
    assert said[0].startswith("update 5: val/loss 1; warning: the grid is not written: ")


def rank_of(stage: Any, process_index: int) -> Any:
    """The stage as one of two ranks has it."""
    accelerator = SimpleNamespace(**{**vars(stage.accelerator), "process_index": process_index, "num_processes": 2})
    return SimpleNamespace(**{**vars(stage), "accelerator": accelerator, "is_main": process_index == 0})


def test_the_distance_of_samples_is_that_of_their_features_on_any_number_of_ranks(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation, denoiser = unet_validation(stage, images_per_pass=8, num_samples=20)
    found = validation.validate(denoiser, update=1)

    # The second rank first, which leaves what it has for the first.
    of_second: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: of_second.append(table.clone()))
    second, _ = unet_validation(rank_of(stage, 1), images_per_pass=8, num_samples=20)
    assert second.validate(denoiser, update=1) == {}
    assert [int((table != 0).any(dim=1).sum()) for table in of_second] == [8, 8], "one of three batches"
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: table.add_(of_second.pop(0)))
    first, _ = unet_validation(rank_of(stage, 0), images_per_pass=8, num_samples=20)
    assert first.validate(denoiser, update=1) == found

    # All at once: samples with the conditions of validation latents, and these, decoded.
    inputs = cast(Any, SimpleNamespace(vae=str(stage.folder / "vae"), unet=str(stage.folder / "unet")))
    model = load_latent_diffusion(inputs, stage.parents, device=CPU)
    stored = LatentShards(stage.folder / "latents", split="val").read(spread_sample(600, 20))
    assert set(stored.labels) == set(range(20))
    noise = noise_of(0, range(20), shape=(2, 8, 8), device=CPU.torch)
    conditions = {"labels": torch.from_numpy(stored.labels)}
    options: Any = {"sampler": DDIMConfig(num_steps=2), "guidance": GridConfig().guidance, "fresh_noise": noise}
    samples = model.sample(noise("validation sample"), conditions, **options)
    mean, log_variance = torch.from_numpy(stored.moments).float().unbind(dim=1)
    real = model.autoencoder.decode(mean + (log_variance / 2).exp() * noise("validation posterior"))
    features = [ScatteringConfig(resolution=16).build()(images) for images in (samples, real.detach())]
    for name, distance in (("frechet_distance", frechet_distance), ("kernel_distance", kernel_distance)):
        expected = distance(*features)
        assert (found[f"val/{name}"], found[f"val/{name}_error"]) == pytest.approx(expected, rel=1e-2)
    assert found["val/frechet_distance"] > 0


def test_too_few_images_for_a_distance_are_refused_before_any_work(stage: Any) -> None:
    latents = stage.parents.latents.model_copy(update={"splits": {"train": 4, "val": 2}})
    parents = Parents({**stage.parents, "latents": latents.model_copy(update={"vae": stage.parents.vae.weights})})
    where: Any = {"latents": str(stage.folder / "latents"), "vae": str(stage.folder / "vae")}
    denoiser = DenoiserConfig.model_validate(read_json(stage.folder / "unet" / "config.json", mend="")["denoiser"])
    config = TrainUNetConfig(inputs=where, updates=1, global_batch=1, denoiser=denoiser, validate_samples=256)
    with pytest.raises(ConfigError, match="validate_samples = 256 and 2 validation images: a distance needs 3 of both"):
        check(config, parents)


def test_a_decoded_image_that_is_not_a_number_is_named() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 1, 1] = torch.inf
    with pytest.raises(ConfigError, match=r"train_vae: 1 of 3 decoded images hold NaN or infinity, first b; .* fp16"):
        finite_levels(images, names="abc", stage="train_vae", precision="fp16")
    assert finite_levels(images[:1], names="a", stage="train_vae", precision="fp16").shape == (1, 2, 2, 1)

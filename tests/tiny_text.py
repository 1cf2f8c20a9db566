"""A random BERT so small that stages run with it in no time, in the files in which text encoders are published."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "sneak", "##er", "##ers", "!", "cafe", "你", "σ"]
WIDTH, HIDDEN, LAYERS, POSITIONS = 8, 12, 2, 16


def architecture(vocabulary: Sequence[str] = VOCABULARY, *, width: int = WIDTH) -> dict[str, Any]:
    """The ``config.json`` of the encoder."""
    return {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "vocab_size": len(vocabulary),
    }


def write_encoder(folder: Path, vocabulary: Sequence[str] = VOCABULARY, *, seed: int = 0, width: int = WIDTH) -> Path:
    """Write ``config.json``, ``vocab.txt`` and ``model.safetensors``; return ``folder``."""
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(architecture(vocabulary, width=width)))
    draw = torch.Generator().manual_seed(seed)
    d, hidden = width, HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(vocabulary), d),
        "embeddings.position_embeddings.weight": (POSITIONS, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
    }
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        linears = {f"attention.self.{name}": (d, d) for name in ("query", "key", "value")}
        linears |= {"attention.output.dense": (d, d), "intermediate.dense": (hidden, d), "output.dense": (d, hidden)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (d,), f"{layer}.{name}.bias": (d,)}
    save_file({name: torch.randn(s, generator=draw) for name, s in shapes.items()}, folder / "model.safetensors")
    return folder

"""Weights and configs in the format of diffusers, both ways.

Our networks are theirs with other names, so a conversion renames, and stacks or splits what we keep fused (query, key
and value). diffusers itself is not needed: these are dictionaries of tensors. Configs: ``models/diffusers/config.py``.

    VAE                        AutoencoderKL
    U-Net, no tokens           UNet2DModel; a class conditioner is its class embedding
    U-Net with tokens          UNet2DConditionModel; a class conditioner is its class embedding, or the projection of a
                               pooled text vector is
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.autoencoder.vae import VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import DenoiserConfig
from models.diffusers.config import has_linear_projections
from models.unet import UNetConfig

SCALING_FACTOR = 0.18215  # Stable Diffusion's, which programs that read its files take for granted

Renames = dict[str, str]
"""Our modules and theirs; several of theirs, with spaces between, are stacked in ours along the first dimension."""

_RESIDUAL_BLOCK: Renames = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time.linear": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION_BLOCK: Renames = {
    "norm": "group_norm",
    "attention.qkv": "to_q to_k to_v",
    "attention.out": "to_out.0",
}
_TRANSFORMER_LAYER: Renames = {
    "norm_1": "norm1",
    "norm_2": "norm2",
    "norm_3": "norm3",
    "self_attention.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "self_attention.out": "attn1.to_out.0",
    "cross_attention.q": "attn2.to_q",
    "cross_attention.kv": "attn2.to_k attn2.to_v",
    "cross_attention.out": "attn2.to_out.0",
    "feed_forward.expand": "ff.net.0.proj",
    "feed_forward.reduce": "ff.net.2",
}
_ENDS: Renames = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}

# Parts that some networks have and others lack, and those without a bias; all else is missing when it is not there.
_OPTIONAL = (".shortcut", ".time.linear", ".table", ".project")
_PROJECTIONS = (".proj_in.weight", ".proj_out.weight")
_WITHOUT_BIAS = ("self_attention.qkv", "cross_attention.q", "cross_attention.kv")


# ------------------------------------------------------------------------------------------------------------ VAE


def scaled_vae(
    weights: Mapping[str, Tensor], config: VAEConfig, *, mean: Tensor, std: Tensor
) -> tuple[dict[str, Tensor], VAEConfig, float]:
    """Bring the normalisation by ``mean`` and ``std`` (c) down to one number, the only one that diffusers reads.

    What is more than a factor goes into the 1x1 convolutions on both sides of the latent, with the same images.

    Returns:
        Our weights and config of the autoencoder, and the factor that makes its latents normalised ones.
    """
    if not mean.any() and (std == std[0]).all():
        return dict(weights), config, float(f"{1 / float(std[0]):.7g}")
    c, gain = len(mean), SCALING_FACTOR * std
    before = {"quant_conv.weight": torch.eye(2 * c)[..., None, None], "quant_conv.bias": torch.zeros(2 * c)}
    before |= {"post_quant_conv.weight": torch.eye(c)[..., None, None], "post_quant_conv.bias": torch.zeros(c)}
    before |= weights
    factor = torch.cat([1 / gain, torch.ones(c)])  # of mean and log-variance
    shift = torch.cat([-mean / gain, -2 * gain.log()])
    decode = before["post_quant_conv.weight"]
    folded = {
        "quant_conv.weight": before["quant_conv.weight"] * factor[:, None, None, None],
        "quant_conv.bias": before["quant_conv.bias"] * factor + shift,
        "post_quant_conv.weight": decode * gain[:, None, None],
        "post_quant_conv.bias": before["post_quant_conv.bias"] + decode[:, :, 0, 0] @ mean,
    }
    return before | folded, config.model_copy(update={"quant_convs": True}), SCALING_FACTOR


def vae_to_diffusers(weights: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Our state dict of an ``AutoencoderKL`` under the names of diffusers."""
    return _rename(weights, _vae_renames(config))


def vae_from_diffusers(weights: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The state dict of a diffusers ``AutoencoderKL``, of any age, under our names.

    Raises:
        ValueError: Keys are missing or left over, with their names.
    """
    # Autoencoders published before diffusers 0.12, Stable Diffusion's among them, name their attention differently.
    aged = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    current = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in aged:
            parts[-2] = aged[parts[-2]]
        current[".".join(parts)] = tensor
    return _rename_back(current, _vae_renames(config))


def _vae_renames(config: VAEConfig) -> Renames:
    blocks, levels = config.blocks_per_level, len(config.channels)
    renames = {name: name for name in ("quant_conv", "post_quant_conv") if config.quant_convs}
    for side, their_side, resample, count in (
        ("encoder", "encoder.down_blocks", "downsamplers", blocks),
        ("decoder", "decoder.up_blocks", "upsamplers", blocks + 1),
    ):
        renames |= _inside(side, side, _ENDS)
        for level in range(levels):
            ours, theirs = f"{side}.levels.{level}", f"{their_side}.{level}"
            for block in range(count):
                renames |= _inside(f"{ours}.{block}", f"{theirs}.resnets.{block}", _RESIDUAL_BLOCK)
            if level < levels - 1:
                renames[f"{ours}.{count}.conv"] = f"{theirs}.{resample}.0.conv"
        middle = [("resnets.0", _RESIDUAL_BLOCK), ("resnets.1", _RESIDUAL_BLOCK)]
        if config.mid_attention:
            middle.insert(1, ("attentions.0", _ATTENTION_BLOCK))
        for index, (theirs, table) in enumerate(middle):
            renames |= _inside(f"{side}.middle.{index}", f"{side}.mid_block.{theirs}", table)
    return renames


# ---------------------------------------------------------------------------------------------------------- U-Net


def denoiser_to_diffusers(weights: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """Our state dict of a ``Denoiser`` as that of the U-Net of ``unet_config_to_diffusers``.

    A learned null caption has no place there: it is what their caller passes as the features of the empty caption.
    """
    placed = {name: tensor for name, tensor in weights.items() if ".null_" not in name}
    renamed = _rename(placed, _denoiser_renames(config))
    if not has_linear_projections(config.network):
        renamed |= {key: value[..., None, None] for key, value in renamed.items() if key.endswith(_PROJECTIONS)}
    return renamed


def denoiser_from_diffusers(weights: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """As much of a ``Denoiser``'s state dict as a diffusers U-Net holds: the network, and its class embedding if any.

    Raises:
        ValueError: Keys are missing or left over, with their names.
    """
    return _rename_back(weights, _denoiser_renames(config))


def _denoiser_renames(config: DenoiserConfig) -> Renames:
    unet = _unet_renames(config.network, with_tokens=config.token_width > 0)
    renames = {f"network.{ours}": theirs for ours, theirs in unet.items()}
    for index, conditioner in enumerate(config.conditioners):
        match conditioner:
            case ClassConditionerConfig():
                renames[f"conditioners.{index}.table"] = "class_embedding"
            case TextConditionerConfig(use="pooled" | "both"):
                renames[f"conditioners.{index}.project"] = "class_embedding"
    return renames


def _unet_renames(config: UNetConfig, *, with_tokens: bool) -> Renames:
    renames = _ENDS | {name: name for name in ("time_embedding.linear_1", "time_embedding.linear_2")}
    levels = range(len(config.channels))
    for side, their_side, resample, order, extra in (
        ("down", "down_blocks", "downsamplers", levels, 0),
        ("up", "up_blocks", "upsamplers", levels[::-1], 1),
    ):
        for index, level in enumerate(order):
            ours, theirs = f"{side}.{index}", f"{their_side}.{index}"
            for block in range(config.blocks[level] + extra):
                renames |= _inside(f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}", _RESIDUAL_BLOCK)
                if config.attention[level]:
                    table = _unet_attention(config.transformer_depth[level], with_tokens=with_tokens)
                    renames |= _inside(f"{ours}.attentions.{block}", f"{theirs}.attentions.{block}", table)
            if index < levels[-1]:
                renames[f"{ours}.resample.conv"] = f"{theirs}.{resample}.0.conv"
    for block in (1, 2):
        renames |= _inside(f"middle.block_{block}", f"mid_block.resnets.{block - 1}", _RESIDUAL_BLOCK)
    if config.mid_attention:
        table = _unet_attention(config.transformer_depth[-1], with_tokens=with_tokens)
        renames |= _inside("middle.attention", "mid_block.attentions.0", table)
    return renames


def _unet_attention(depth: int, *, with_tokens: bool) -> Renames:
    if not with_tokens:
        return _ATTENTION_BLOCK
    renames = {name: name for name in ("norm", "proj_in", "proj_out")}
    for layer in range(depth):
        renames |= _inside(f"layers.{layer}", f"transformer_blocks.{layer}", _TRANSFORMER_LAYER)
    return renames


# -------------------------------------------------------------------------------------------------------------- both


def _inside(ours: str, theirs: str, table: Renames) -> Renames:
    """The renames of ``table`` for the parts of one module."""
    return {f"{ours}.{mine}": " ".join(f"{theirs}.{part}" for part in others.split()) for mine, others in table.items()}


def _rename(weights: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    remaining = dict(weights)
    renamed: dict[str, Tensor] = {}
    for ours, theirs in renames.items():
        for leaf in ("weight", "bias"):
            # A shortcut, a time projection or a bias is there or not; the other library agrees on which.
            tensor = remaining.pop(f"{ours}.{leaf}", None)
            if tensor is not None:
                names = theirs.split()
                parts = tensor.chunk(len(names))
                renamed |= {f"{name}.{leaf}": part.contiguous() for name, part in zip(names, parts, strict=True)}
    assert not remaining, f"no name in the format of diffusers for {sorted(remaining)}"
    return renamed


def _rename_back(weights: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    remaining = dict(weights)
    renamed, missing = {}, []
    for ours, theirs in renames.items():
        for leaf in ("weight", "bias"):
            names = [f"{name}.{leaf}" for name in theirs.split()]
            found = [remaining.pop(name) for name in names if name in remaining]
            optional = _OPTIONAL if leaf == "weight" else _OPTIONAL + _WITHOUT_BIAS
            if len(found) < len(names) and (found or not ours.endswith(optional)):
                missing += [name for name in names if name not in weights]
            elif found:
                renamed[f"{ours}.{leaf}"] = _as_linear(ours, torch.cat(found) if len(found) > 1 else found[0])
    if remaining or missing:
        raise ValueError(
            f"These weights are not of the network that their config describes: "
            f"{len(missing)} missing {missing[:5]}, {len(remaining)} left over {sorted(remaining)[:5]}."
        )
    return renamed


def _as_linear(ours: str, tensor: Tensor) -> Tensor:
    """Some of their attention projections are 1x1 convolutions, the same numbers in another shape."""
    is_linear = ours.endswith((".qkv", ".out", ".proj_in", ".proj_out"))
    return tensor[:, :, 0, 0] if is_linear and tensor.dim() == 4 else tensor

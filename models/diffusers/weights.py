"""Weights and configs in the format of diffusers, both ways.

Our networks are theirs with other names, so a conversion renames, and stacks or splits what we keep fused (query, key
and value). diffusers itself is not needed: these are dictionaries of tensors. Configs: ``models/diffusers/config.py``.

    VAE                        AutoencoderKL
    U-Net, no tokens           UNet2DModel; a class conditioner is its class embedding
    U-Net with tokens          UNet2DConditionModel; a class conditioner is its class embedding, or the projection of a
                               pooled text vector is
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.autoencoder.vae import VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import DenoiserConfig
from models.unet import UNetConfig

# What some blocks have and others lack; all else is missing when it is not there.
_OPTIONAL = {
    "weight": (".shortcut", ".time.linear"),
    "bias": (".shortcut", ".time.linear", "self_attention.qkv", "cross_attention.q", "cross_attention.kv"),
}


class _Rename(NamedTuple):
    """Our module and theirs; several of theirs are stacked in ours along the first dimension of weight and bias."""

    ours: str
    theirs: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------ VAE


def vae_to_diffusers(weights: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Our state dict of an ``AutoencoderKL`` under the names of diffusers."""
    return _rename(weights, list(_vae_renames(config)))


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
    return _rename_back(current, list(_vae_renames(config)))


def _vae_renames(config: VAEConfig) -> Iterator[_Rename]:
    blocks, levels = config.blocks_per_level, len(config.channels)
    for side, their_levels, count in (("encoder", "down_blocks", blocks), ("decoder", "up_blocks", blocks + 1)):
        yield _Rename(f"{side}.conv_in", (f"{side}.conv_in",))
        for level in range(levels):
            ours, theirs = f"{side}.levels.{level}", f"{side}.{their_levels}.{level}"
            for block in range(count):
                yield from _residual_block(f"{ours}.{block}", f"{theirs}.resnets.{block}")
            if level < levels - 1:
                resample = "downsamplers" if side == "encoder" else "upsamplers"
                yield _Rename(f"{ours}.{count}.conv", (f"{theirs}.{resample}.0.conv",))
        yield from _residual_block(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        if config.mid_attention:
            yield from _attention_block(f"{side}.middle.1", f"{side}.mid_block.attentions.0")
        last = 2 if config.mid_attention else 1
        yield from _residual_block(f"{side}.middle.{last}", f"{side}.mid_block.resnets.1")
        yield _Rename(f"{side}.norm_out", (f"{side}.conv_norm_out",))
        yield _Rename(f"{side}.conv_out", (f"{side}.conv_out",))
    if config.quant_convs:
        yield _Rename("quant_conv", ("quant_conv",))
        yield _Rename("post_quant_conv", ("post_quant_conv",))


# ---------------------------------------------------------------------------------------------------------- U-Net


def unet_to_diffusers(weights: Mapping[str, Tensor], config: UNetConfig, *, token_width: int) -> dict[str, Tensor]:
    """Our state dict of a ``UNet`` under the names of ``UNet2DModel`` or, with tokens, ``UNet2DConditionModel``."""
    return _rename(weights, list(_unet_renames(config, token_width=token_width)))


def unet_from_diffusers(weights: Mapping[str, Tensor], config: UNetConfig, *, token_width: int) -> dict[str, Tensor]:
    """The state dict of a diffusers U-Net, without its class embedding, under our names.

    Raises:
        ValueError: Keys are missing or left over, with their names.
    """
    return _rename_back(weights, list(_unet_renames(config, token_width=token_width)))


def denoiser_to_diffusers(weights: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """Our state dict of a ``Denoiser`` as that of the U-Net of ``diffusers_config.unet_to_diffusers``.

    A learned null caption has no place there: it is what their caller passes as the features of the empty caption.
    """
    network = {name.removeprefix("network."): tensor for name, tensor in weights.items() if name.startswith("network.")}
    renamed = unet_to_diffusers(network, config.network, token_width=config.token_width)
    for ours, theirs in _embedding_renames(config):
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in weights:
                renamed[f"{theirs[0]}.{leaf}"] = weights[f"{ours}.{leaf}"]
    return renamed


def denoiser_from_diffusers(weights: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """As much of a ``Denoiser``'s state dict as a diffusers U-Net holds: the network, and its class embedding if any.

    Raises:
        ValueError: Keys are missing or left over, with their names.
    """
    remaining = dict(weights)
    renamed = {}
    for ours, theirs in _embedding_renames(config):
        for leaf in ("weight", "bias"):
            tensor = remaining.pop(f"{theirs[0]}.{leaf}", None)
            if tensor is not None:
                renamed[f"{ours}.{leaf}"] = tensor
    network = unet_from_diffusers(remaining, config.network, token_width=config.token_width)
    return renamed | {f"network.{name}": tensor for name, tensor in network.items()}


def _embedding_renames(config: DenoiserConfig) -> Iterator[_Rename]:
    for index, conditioner in enumerate(config.conditioners):
        match conditioner:
            case ClassConditionerConfig():
                yield _Rename(f"conditioners.{index}.table", ("class_embedding",))
            case TextConditionerConfig(use="pooled" | "both"):
                yield _Rename(f"conditioners.{index}.project", ("class_embedding",))


def _unet_renames(config: UNetConfig, *, token_width: int) -> Iterator[_Rename]:
    yield _Rename("conv_in", ("conv_in",))
    yield _Rename("time_embedding.linear_1", ("time_embedding.linear_1",))
    yield _Rename("time_embedding.linear_2", ("time_embedding.linear_2",))
    levels = len(config.channels)
    for index in range(levels):
        yield from _unet_level(
            config, f"down.{index}", f"down_blocks.{index}", level=index, extra_blocks=0, token_width=token_width
        )
    for index in range(levels):
        level = levels - 1 - index
        yield from _unet_level(
            config, f"up.{index}", f"up_blocks.{index}", level=level, extra_blocks=1, token_width=token_width
        )
    yield from _residual_block("middle.block_1", "mid_block.resnets.0")
    if config.mid_attention:
        yield from _unet_attention(
            config, "middle.attention", "mid_block.attentions.0", level=levels - 1, token_width=token_width
        )
    yield from _residual_block("middle.block_2", "mid_block.resnets.1")
    yield _Rename("norm_out", ("conv_norm_out",))
    yield _Rename("conv_out", ("conv_out",))


def _unet_level(
    config: UNetConfig, ours: str, theirs: str, *, level: int, extra_blocks: int, token_width: int
) -> Iterator[_Rename]:
    for block in range(config.blocks[level] + extra_blocks):
        yield from _residual_block(f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}")
        if config.attention[level]:
            yield from _unet_attention(
                config,
                f"{ours}.attentions.{block}",
                f"{theirs}.attentions.{block}",
                level=level,
                token_width=token_width,
            )
    goes_down = extra_blocks == 0
    if goes_down and level < len(config.channels) - 1:
        yield _Rename(f"{ours}.resample.conv", (f"{theirs}.downsamplers.0.conv",))
    if not goes_down and level > 0:
        yield _Rename(f"{ours}.resample.conv", (f"{theirs}.upsamplers.0.conv",))


def _unet_attention(config: UNetConfig, ours: str, theirs: str, *, level: int, token_width: int) -> Iterator[_Rename]:
    if token_width == 0:
        yield from _attention_block(ours, theirs)
        return
    for name in ("norm", "proj_in", "proj_out"):
        yield _Rename(f"{ours}.{name}", (f"{theirs}.{name}",))
    for layer in range(config.transformer_depth[level]):
        mine, other = f"{ours}.layers.{layer}", f"{theirs}.transformer_blocks.{layer}"
        for norm in (1, 2, 3):
            yield _Rename(f"{mine}.norm_{norm}", (f"{other}.norm{norm}",))
        yield from _self_attention(f"{mine}.self_attention", f"{other}.attn1")
        yield _Rename(f"{mine}.cross_attention.q", (f"{other}.attn2.to_q",))
        yield _Rename(f"{mine}.cross_attention.kv", (f"{other}.attn2.to_k", f"{other}.attn2.to_v"))
        yield _Rename(f"{mine}.cross_attention.out", (f"{other}.attn2.to_out.0",))
        yield _Rename(f"{mine}.feed_forward.expand", (f"{other}.ff.net.0.proj",))
        yield _Rename(f"{mine}.feed_forward.reduce", (f"{other}.ff.net.2",))


# ------------------------------------------------------------------------------------------------- what all share


def _residual_block(ours: str, theirs: str) -> Iterator[_Rename]:
    names = {
        "norm_1": "norm1",
        "conv_1": "conv1",
        "time.linear": "time_emb_proj",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "shortcut": "conv_shortcut",
    }
    for mine, other in names.items():
        yield _Rename(f"{ours}.{mine}", (f"{theirs}.{other}",))


def _attention_block(ours: str, theirs: str) -> Iterator[_Rename]:
    yield _Rename(f"{ours}.norm", (f"{theirs}.group_norm",))
    yield from _self_attention(f"{ours}.attention", theirs)


def _self_attention(ours: str, theirs: str) -> Iterator[_Rename]:
    yield _Rename(f"{ours}.qkv", (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v"))
    yield _Rename(f"{ours}.out", (f"{theirs}.to_out.0",))


def _rename(weights: Mapping[str, Tensor], renames: list[_Rename]) -> dict[str, Tensor]:
    remaining = dict(weights)
    renamed: dict[str, Tensor] = {}
    for ours, theirs in renames:
        for leaf in ("weight", "bias"):
            # A shortcut, a time projection or a bias is there or not; the other library agrees on which.
            tensor = remaining.pop(f"{ours}.{leaf}", None)
            if tensor is not None:
                parts = tensor.chunk(len(theirs))
                renamed |= {f"{name}.{leaf}": part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    assert not remaining, f"no name in the format of diffusers for {sorted(remaining)}"
    return renamed


def _rename_back(weights: Mapping[str, Tensor], renames: list[_Rename]) -> dict[str, Tensor]:
    remaining = dict(weights)
    renamed, missing = {}, []
    for ours, theirs in renames:
        for leaf in ("weight", "bias"):
            names = [f"{name}.{leaf}" for name in theirs]
            found = [remaining.pop(name) for name in names if name in remaining]
            if len(found) < len(names) and (found or not ours.endswith(_OPTIONAL[leaf])):
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

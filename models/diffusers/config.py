"""Configs in the format of diffusers, both ways: AutoencoderKL, UNet2DModel, UNet2DConditionModel, schedulers.

They go with the weights of ``models/diffusers/weights.py``. What one side has and the other lacks is refused with the
reason, in both directions: a network that loads and computes something else would be worse than none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from models.autoencoder.vae import VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import DenoiserConfig
from models.diffusion.samplers import DDIMConfig
from models.diffusion.schedule import (
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    ScaledLinearScheduleConfig,
)
from models.unet import UNetConfig

JSON = dict[str, Any]

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

# Our settings that are one of theirs by another name, with the default of theirs.
_VAE_FIELDS = {
    "blocks_per_level": ("layers_per_block", 1),
    "mid_attention": ("mid_block_add_attention", True),
    "quant_convs": ("use_quant_conv", True),
    "norm_groups": ("norm_num_groups", 32),
}
_UNET_FIELDS = {
    "norm_groups": ("norm_num_groups", 32),
    "norm_eps": ("norm_eps", 1e-5),
    "dropout": ("dropout", 0.0),
}

# Settings of theirs for which ours has no other choice, as an export names them.
_UNET_SETTINGS: JSON = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
}
# The same, but left out of an export: these are the defaults of theirs.
_UNET_DEFAULTS: JSON = {
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "only_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
}


# ------------------------------------------------------------------------------------------------------------ VAE


def vae_config_to_diffusers(
    config: VAEConfig,
    *,
    image_channels: int,
    sample_size: int,
    scaling_factor: float = 1.0,
) -> JSON:
    """``config.json`` of the ``AutoencoderKL``.

    Args:
        config: The VAE.
        image_channels: Channels of the images.
        sample_size: Side of the images, pixels.
        scaling_factor: Times a latent is a normalised one.
    """
    if config.norm_eps != 1e-6:
        raise ValueError(
            f"diffusers' AutoencoderKL normalises with eps 1e-6; this VAE has norm_eps = {config.norm_eps:g}."
        )
    theirs = {
        "in_channels": image_channels,
        "block_out_channels": list(config.channels),
        "latent_channels": config.latent_channels,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        **{name: getattr(config, ours) for ours, (name, _) in _VAE_FIELDS.items()},
    }
    return theirs | _vae_settings(theirs)


def vae_config_from_diffusers(theirs: Mapping[str, Any]) -> tuple[VAEConfig, int]:
    """Our config and the number of image channels, from the ``config.json`` of an ``AutoencoderKL``.

    Its scaling factor, shift and latent statistics are the caller's to apply.

    Raises:
        ValueError: The autoencoder has parts that ours lacks.
    """
    _refuse_others(theirs, _vae_settings(theirs))
    config = VAEConfig(
        latent_channels=theirs["latent_channels"],
        channels=tuple(theirs["block_out_channels"]),
        **{ours: theirs.get(name, default) for ours, (name, default) in _VAE_FIELDS.items()},
    )
    return config, theirs["in_channels"]


def _vae_settings(theirs: Mapping[str, Any]) -> JSON:
    """Their settings that follow from the others where the autoencoder is one of ours."""
    levels = len(theirs["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "out_channels": theirs["in_channels"],
        "use_post_quant_conv": theirs.get("use_quant_conv", True),
    }


# ---------------------------------------------------------------------------------------------------------- U-Net


def unet_config_to_diffusers(
    config: DenoiserConfig, *, latent_channels: int, latent_size: int, num_classes: int
) -> JSON:
    """``config.json`` of the ``UNet2DModel`` or, with token conditions, the ``UNet2DConditionModel``.

    Raises:
        ValueError: The model has parts that theirs lacks; all are named.
    """
    _refuse_unexportable(config)
    network = config.network
    theirs: JSON = {
        "sample_size": latent_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(network.channels),
        "resnet_time_scale_shift": "default" if network.time_injection == "shift" else "scale_shift",
        **{name: getattr(network, ours) for ours, (name, _) in _UNET_FIELDS.items()},
        **_UNET_SETTINGS,
        **_unet_blocks(network.attention, with_tokens=config.token_width > 0),
    }
    if any(isinstance(conditioner, ClassConditionerConfig) for conditioner in config.conditioners):
        theirs["num_class_embeds"] = num_classes + 1
    if config.token_width == 0:
        return theirs | {
            "layers_per_block": network.blocks[0],
            "attention_head_dim": max(_head_widths(network), default=network.channels[0]),
            "attn_norm_num_groups": network.norm_groups,
            "add_attention": network.mid_attention,
        }
    if pooled := _pooled_conditioners(config):
        theirs |= {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": pooled[0].width}
    return theirs | {
        "layers_per_block": network.blocks[0] if len(set(network.blocks)) == 1 else list(network.blocks),
        # Their name for the number of heads, by an old mistake that published configs made permanent.
        "attention_head_dim": list(network.heads),
        "transformer_layers_per_block": list(network.transformer_depth),
        "cross_attention_dim": config.token_width,
        "use_linear_projection": has_linear_projections(network),
    }


def has_linear_projections(network: UNetConfig) -> bool:
    """Whether transformers are entered and left by linear maps, not by 1x1 convolutions as Stable Diffusion 1's are.

    Both compute the same. The 8 heads of every level tell its U-Nets from those of version 2, whose heads are 64 wide.
    """
    return {heads for heads, attends in zip(network.heads, network.attends, strict=True) if attends} != {8}


def _refuse_unexportable(config: DenoiserConfig) -> None:
    """Raise ValueError with every part of the model that theirs lacks."""
    network, objective = config.network, config.objective
    widths = _head_widths(network)
    conditions = [type(conditioner) for conditioner in config.conditioners]
    pooled = _pooled_conditioners(config)
    embeddings = conditions.count(ClassConditionerConfig) + len(pooled)
    sequences = conditions.count(TextConditionerConfig) - sum(c.use == "pooled" for c in pooled)
    flow = isinstance(config.schedule, FlowMatchingConfig)
    scheduler, readable = ("flow matching", ["velocity"]) if flow else ("DDIM", sorted(_PREDICTIONS))
    reasons = {
        f"its {scheduler} cannot read a prediction of {objective.prediction!r}, only {readable}": (
            objective.prediction not in readable
        ),
        f"its {scheduler} cannot read a learned variance (objective.variance = 'learned')": (
            objective.variance == "learned"
        ),
        "it has no ConvNeXt blocks (network.block = 'convnext')": network.block == "convnext",
        "its U-Nets add one embedding to the time embedding, and these conditioners give several": embeddings > 1,
        "its U-Nets take one sequence of tokens, and these conditioners give several": sequences > 1,
    }
    if config.token_width == 0:
        blocks, uneven = list(network.blocks), len(set(network.blocks)) > 1
        reasons |= {
            "its U-Net without tokens takes no pooled text vector (use = 'pooled')": bool(pooled),
            f"its UNet2DModel has as many blocks in every level, not {blocks}": uneven,
            f"its UNet2DModel has heads of one width, not {sorted(widths)}": len(widths) > 1,
        }
    elif not network.mid_attention:
        reasons["its UNet2DConditionModel always attends at the lowest resolution (mid_attention = false)"] = True
    if any(reasons.values()):
        named = "; ".join(reason for reason, holds in reasons.items() if holds)
        raise ValueError(f"This model cannot be exported to diffusers: {named}.")


def _pooled_conditioners(config: DenoiserConfig) -> list[TextConditionerConfig]:
    return [c for c in config.conditioners if isinstance(c, TextConditionerConfig) and c.use != "tokens"]


def _unet_blocks(attention: Sequence[bool], *, with_tokens: bool) -> JSON:
    """Their names of the network and its blocks."""
    kinds = [("CrossAttn" if with_tokens else "Attn") if on else "" for on in attention]
    blocks: JSON = {
        "_class_name": "UNet2DConditionModel" if with_tokens else "UNet2DModel",
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
    }
    return blocks | ({"mid_block_type": "UNetMidBlock2DCrossAttn"} if with_tokens else {})


def _head_widths(network: UNetConfig) -> set[int]:
    """Widths of the heads that are there."""
    levels = zip(network.channels, network.heads, network.attends, strict=True)
    return {width // heads for width, heads, attends in levels if attends}


class ForeignUNet(NamedTuple):
    """The ``config.json`` of a diffusers U-Net in our terms."""

    network: UNetConfig
    in_channels: int
    out_channels: int
    token_width: int  # 0 without cross-attention


def unet_config_from_diffusers(theirs: Mapping[str, Any]) -> ForeignUNet:
    """Read the ``config.json`` of a ``UNet2DModel`` or a ``UNet2DConditionModel``.

    Raises:
        ValueError: The U-Net has parts that ours lacks; all are named.
    """
    with_tokens = theirs.get("_class_name") == "UNet2DConditionModel"
    channels = tuple(theirs["block_out_channels"])
    attention = tuple("Attn" in name for name in theirs["down_block_types"])
    shift = theirs.get("resnet_time_scale_shift", "default")
    expected = {
        **_UNET_SETTINGS,
        **_UNET_DEFAULTS,
        **_unet_blocks(attention, with_tokens=with_tokens),
        "class_embed_type": "simple_projection" if with_tokens and theirs.get("class_embed_type") else None,
        "resnet_time_scale_shift": "scale_shift" if shift == "scale_shift" else "default",
        "attn_norm_num_groups": theirs.get("norm_num_groups", 32) if theirs.get("attn_norm_num_groups") else None,
    }
    _refuse_others(theirs, expected)
    given = theirs.get("attention_head_dim", 8)
    heads = _per_level(1 if given is None else given, len(channels))
    if not with_tokens and given is not None:  # there it is the width of a head, and null one head
        heads = tuple(channel // width for channel, width in zip(channels, heads, strict=True))
    network = UNetConfig(
        channels=channels,
        blocks=_per_level(theirs.get("layers_per_block", 2), len(channels)),
        attention=attention,
        heads=heads,
        transformer_depth=_per_level(theirs.get("transformer_layers_per_block", 1), len(channels)),
        mid_attention=theirs.get("add_attention", True),
        time_injection="shift" if shift == "default" else "scale_shift",
        **{ours: theirs.get(name, default) for ours, (name, default) in _UNET_FIELDS.items()},
    )
    return ForeignUNet(
        network=network,
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        token_width=theirs.get("cross_attention_dim", 1280) if with_tokens else 0,
    )


def _per_level(value: int | list[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _refuse_others(theirs: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Settings that are absent have their default, which is what is expected here."""
    wrong = [
        f"{key} = {theirs[key]!r} (only {value!r})"
        for key, value in expected.items()
        if key in theirs and theirs[key] != value
    ]
    if wrong:
        raise ValueError(f"This network has parts that ours lack: {', '.join(wrong)}.")


# ------------------------------------------------------------------------------------------------------ scheduler


def scheduler_config_to_diffusers(config: DenoiserConfig, sampler: DDIMConfig) -> JSON:
    """``scheduler_config.json`` of the scheduler that samples as ``sampler`` does.

    A ``DDIMScheduler`` steps by whole strides of num_train_timesteps // num_inference_steps, which is ours where that
    divides; a ``FlowMatchEulerDiscreteScheduler`` through the sigmas that it is given.

    Raises:
        ValueError: The model cannot be exported, or the sampler's steps are not the scheduler's.
    """
    _refuse_unexportable(config)
    schedule = config.schedule
    if isinstance(schedule, FlowMatchingConfig):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": schedule.num_steps}
    if sampler.spacing not in ("leading", "trailing") or schedule.num_steps % sampler.num_steps:
        raise ValueError(
            f"diffusers' DDIMScheduler cannot follow {sampler.num_steps} steps of spacing {sampler.spacing!r} through "
            f"a schedule of {schedule.num_steps}: use 'leading' or 'trailing', and a number of steps that divides it."
        )
    theirs: JSON = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "prediction_type": _PREDICTIONS[config.objective.prediction],
        "timestep_spacing": sampler.spacing,
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    match schedule:
        case LinearScheduleConfig(beta_start=start, beta_end=end, num_steps=steps):
            shape: JSON = {
                "beta_schedule": "linear",
                "beta_start": start * 1000 / steps,
                "beta_end": end * 1000 / steps,
            }
        case ScaledLinearScheduleConfig(beta_start=start, beta_end=end):
            shape = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
        case CosineScheduleConfig(offset=0.008):
            shape = {"beta_schedule": "squaredcos_cap_v2"}
        case _:
            # Already rescaled where it should be; to do it again changes nothing.
            shape = {"trained_betas": schedule.build().betas.tolist()}
    return theirs | shape

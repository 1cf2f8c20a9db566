"""Configs in the format of diffusers, both ways: AutoencoderKL, UNet2DModel, UNet2DConditionModel, DDIMScheduler.

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
from models.layers import TimeInjection
from models.unet import UNetConfig

JSON = dict[str, Any]

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


# ------------------------------------------------------------------------------------------------------------ VAE


def vae_config_to_diffusers(
    config: VAEConfig,
    *,
    image_channels: int,
    sample_size: int,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
) -> JSON:
    """``config.json`` of the ``AutoencoderKL``, with scaling factor 1.

    Args:
        config: The VAE.
        image_channels: Channels of the images.
        sample_size: Side of the images, pixels.
        latents_mean: What a channel's latents are normalised by; None when they are not.
        latents_std: The same.
    """
    levels = len(config.channels)
    if config.norm_eps != 1e-6:
        raise ValueError(
            f"diffusers' AutoencoderKL normalises with eps 1e-6; this VAE has norm_eps = {config.norm_eps:g}."
        )
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": image_channels,
        "out_channels": image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks_per_level,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "latents_mean": None if latents_mean is None else list(latents_mean),
        "latents_std": None if latents_std is None else list(latents_std),
        "mid_block_add_attention": config.mid_attention,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
    }


def vae_config_from_diffusers(theirs: Mapping[str, Any]) -> tuple[VAEConfig, int]:
    """Our config and the number of image channels, from the ``config.json`` of an ``AutoencoderKL``.

    Its scaling factor, shift and latent statistics are the caller's to apply.

    Raises:
        ValueError: The autoencoder has parts that ours lacks.
    """
    levels = len(theirs["block_out_channels"])
    expected = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "out_channels": theirs["in_channels"],
        "use_post_quant_conv": theirs.get("use_quant_conv", True),
    }
    _refuse_others(theirs, expected)
    config = VAEConfig(
        latent_channels=theirs["latent_channels"],
        channels=tuple(theirs["block_out_channels"]),
        blocks_per_level=theirs.get("layers_per_block", 1),
        mid_attention=theirs.get("mid_block_add_attention", True),
        quant_convs=theirs.get("use_quant_conv", True),
        norm_groups=theirs.get("norm_num_groups", 32),
    )
    return config, theirs["in_channels"]


# ---------------------------------------------------------------------------------------------------------- U-Net


def unet_config_to_diffusers(
    config: DenoiserConfig, *, latent_channels: int, latent_size: int, num_classes: int
) -> JSON:
    """``config.json`` of the ``UNet2DModel`` or, with token conditions, the ``UNet2DConditionModel``.

    Raises:
        ValueError: The model has parts that theirs lacks; all are named.
    """
    network = config.network
    if reasons := _reasons_against_export(config):
        raise ValueError(f"This model cannot be exported to diffusers: {'; '.join(reasons)}.")
    theirs: JSON = {
        "sample_size": latent_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(network.channels),
        "norm_num_groups": network.norm_groups,
        "norm_eps": network.norm_eps,
        "dropout": network.dropout,
        "resnet_time_scale_shift": "default" if network.time_injection == "shift" else "scale_shift",
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }
    if any(isinstance(conditioner, ClassConditionerConfig) for conditioner in config.conditioners):
        theirs["num_class_embeds"] = num_classes + 1
    if config.token_width == 0:
        return theirs | {
            "_class_name": "UNet2DModel",
            "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in network.attention],
            "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in network.attention[::-1]],
            "layers_per_block": network.blocks[0],
            "attention_head_dim": max(_head_widths(network), default=network.channels[0]),
            "attn_norm_num_groups": network.norm_groups,
            "add_attention": network.mid_attention,
        }
    pooled = [c for c in config.conditioners if isinstance(c, TextConditionerConfig) and c.use != "tokens"]
    if pooled:
        theirs |= {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": pooled[0].width}
    return theirs | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in network.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in network.attention[::-1]],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": list(network.blocks),
        # Their name for the number of heads, by an old mistake that published configs made permanent.
        "attention_head_dim": list(network.heads),
        "transformer_layers_per_block": list(network.transformer_depth),
        "cross_attention_dim": config.token_width,
        "use_linear_projection": True,
    }


def _reasons_against_export(config: DenoiserConfig) -> list[str]:
    network = config.network
    conditions = [type(conditioner) for conditioner in config.conditioners]
    pooled = [c for c in config.conditioners if isinstance(c, TextConditionerConfig) and c.use != "tokens"]
    embeddings = conditions.count(ClassConditionerConfig) + len(pooled)
    checks = {
        "its schedulers hold no flow of this form (schedule.kind = 'flow_matching')": isinstance(
            config.schedule, FlowMatchingConfig
        ),
        f"its DDIM cannot read a prediction of {config.objective.prediction!r}, only {sorted(_PREDICTIONS)}": (
            config.objective.prediction not in _PREDICTIONS
        ),
        "its DDIM cannot read a learned variance (objective.variance = 'learned')": (
            config.objective.variance == "learned"
        ),
        "it has no ConvNeXt blocks (network.block = 'convnext')": network.block == "convnext",
        "its U-Nets add one embedding to the time embedding, and these conditioners give several": embeddings > 1,
        "its U-Nets take one sequence of tokens, and these conditioners give several": (
            conditions.count(TextConditionerConfig) - sum(c.use == "pooled" for c in pooled) > 1
        ),
    }
    if config.token_width == 0:
        checks |= {
            "its U-Net without tokens takes no pooled text vector (use = 'pooled')": bool(pooled),
            f"its UNet2DModel has as many blocks in every level, not {list(network.blocks)}": (
                len(set(network.blocks)) > 1
            ),
            f"its UNet2DModel has heads of one width, not {sorted(_head_widths(network))}": (
                len(_head_widths(network)) > 1
            ),
        }
    else:
        checks[
            "its UNet2DConditionModel always attends at the lowest resolution (mid_attention = false)"
        ] = not network.mid_attention
    return [reason for reason, holds in checks.items() if holds]


def _head_widths(network: UNetConfig) -> set[int]:
    """Widths of the heads that are there."""
    last = len(network.channels) - 1
    return {
        width // heads
        for level, (width, heads) in enumerate(zip(network.channels, network.heads, strict=True))
        if network.attention[level] or (level == last and network.mid_attention)
    }


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
    kind = theirs.get("_class_name")
    channels = tuple(theirs["block_out_channels"])
    levels = len(channels)
    by_tokens = kind == "UNet2DConditionModel"
    attends, plain = ("CrossAttnDownBlock2D", "DownBlock2D") if by_tokens else ("AttnDownBlock2D", "DownBlock2D")
    injections = ("default", "scale_shift")
    attention = tuple(name == attends for name in theirs["down_block_types"])
    up = [name.replace("Down", "Up") for name in reversed(theirs["down_block_types"])]
    expected = {
        "_class_name": kind if kind in ("UNet2DModel", "UNet2DConditionModel") else "UNet2DModel",
        "down_block_types": [attends if on else plain for on in attention],
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if by_tokens else "UNetMidBlock2D",
        "act_fn": "silu",
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim_type": None,
        "dual_cross_attention": False,
        "addition_embed_type": None,
        "class_embed_type": "simple_projection" if by_tokens and theirs.get("class_embed_type") else None,
        "resnet_time_scale_shift": next(
            (i for i in injections if i == theirs.get("resnet_time_scale_shift")), "default"
        ),
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
    _refuse_others(theirs, expected)
    heads_or_width = _per_level(theirs.get("attention_head_dim", 8), levels)
    heads = heads_or_width if by_tokens else tuple(c // w for c, w in zip(channels, heads_or_width, strict=True))
    time_injection: TimeInjection = (
        "shift" if theirs.get("resnet_time_scale_shift", "default") == "default" else "scale_shift"
    )
    network = UNetConfig(
        channels=channels,
        blocks=_per_level(theirs.get("layers_per_block", 2), levels),
        attention=attention,
        heads=heads,
        transformer_depth=_per_level(theirs.get("transformer_layers_per_block", 1), levels),
        mid_attention=theirs.get("add_attention", True),
        time_injection=time_injection,
        dropout=theirs.get("dropout", 0.0),
        norm_groups=theirs.get("norm_num_groups", 32),
        norm_eps=theirs.get("norm_eps", 1e-5),
    )
    return ForeignUNet(
        network=network,
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        token_width=theirs.get("cross_attention_dim", 1280) if by_tokens else 0,
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
    """``scheduler_config.json`` of the ``DDIMScheduler`` that samples as ``sampler`` does.

    Theirs steps by whole strides of num_train_timesteps // num_inference_steps, which is ours where that divides.

    Raises:
        ValueError: The process or the spacing is not in it.
    """
    schedule = config.schedule
    if isinstance(schedule, FlowMatchingConfig) or config.objective.prediction not in _PREDICTIONS:
        raise ValueError(f"This model cannot be exported to diffusers: {'; '.join(_reasons_against_export(config))}.")
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

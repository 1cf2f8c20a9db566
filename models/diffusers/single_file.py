"""Weights of VAE and U-Net in one file, under Stable Diffusion's names (Rombach et al. 2022, arXiv:2112.10752).

They are those of ``AutoencoderKL`` and ``UNetModel`` in the CompVis code. Such a file says nothing of groups, heads,
prediction, noise schedule and scale of the latents: programs that read it take those of Stable Diffusion, so a model
that has others is refused. Converts what ``models/diffusers/config.py`` and ``weights.py`` give.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.diffusers.weights import SCALING_FACTOR

JSON = Mapping[str, Any]

_RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
# What a file does not show, in the format of diffusers.
_TAKEN_FOR_GRANTED: Mapping[str, JSON] = {
    "unet": {"_class_name": "UNet2DConditionModel", "resnet_time_scale_shift": "default", "norm_num_groups": 32}
    | {"norm_eps": 1e-5, "num_class_embeds": None, "class_embed_type": None},
    "vae": {"norm_num_groups": 32, "mid_block_add_attention": True, "use_quant_conv": True}
    | {"scaling_factor": SCALING_FACTOR},
    "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    | {"num_train_timesteps": 1000, "rescale_betas_zero_snr": False},
}


def to_single_file(configs: Mapping[str, JSON], weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of ``unet`` and ``vae`` in the format of diffusers under the names of one file.

    Raises:
        ValueError: By the configs of these and of the ``scheduler`` it is another architecture; with every difference.
    """
    # What does not fit.
    unet, vae = configs["unet"], configs["vae"]
    wrong = [
        f"{name}.{key} = {configs[name].get(key)!r} (only {value!r})"
        for name, settings in _TAKEN_FOR_GRANTED.items()
        for key, value in settings.items()
        if configs[name].get(key) != value
    ]
    # Stable Diffusion 2, whose attention has linear projections, predicts noise or velocity; 1 noise.
    known = ("epsilon", "v_prediction") if unet.get("use_linear_projection") else ("epsilon",)
    if (prediction := configs["scheduler"].get("prediction_type")) not in known:
        wrong.append(f"scheduler.prediction_type = {prediction!r} (only {' or '.join(known)})")
    if not isinstance(blocks := unet["layers_per_block"], int):
        wrong.append(f"unet.layers_per_block = {blocks} (only one number for all levels)")
    heads = unet["attention_head_dim"]
    if unet.get("use_linear_projection") and heads != [channels // 64 for channels in unet["block_out_channels"]]:
        wrong.append(f"unet.attention_head_dim = {heads} (only 8 heads each, or heads of width 64)")
    if wrong:
        raise ValueError(f"This model does not fit into a file of Stable Diffusion's: {'; '.join(wrong)}.")

    # The names; linear maps of the VAE's attention are 1x1 convolutions there.
    names = weights["unet"]
    file = {f"model.diffusion_model.{_unet_name(name, names, blocks + 1)}": names[name] for name in names}
    for name, tensor in weights["vae"].items():
        is_map = ".attentions." in name and tensor.dim() == 2
        key = f"first_stage_model.{_vae_name(name, len(vae['block_out_channels']) - 1)}"
        file[key] = tensor[..., None, None] if is_map else tensor
    return file


def _unet_name(name: str, names: Mapping[str, Tensor], stride: int) -> str:
    """Return the name of a tensor of the U-Net, whose blocks are numbered through all levels, ``stride`` a level."""
    match name.split("."):
        case ["down_blocks", level, "downsamplers", _, _, leaf]:
            return f"input_blocks.{(int(level) + 1) * stride}.0.op.{leaf}"
        case ["up_blocks", level, "upsamplers", _, _, leaf]:
            behind = 2 if f"up_blocks.{level}.attentions.0.norm.weight" in names else 1
            return f"output_blocks.{(int(level) + 1) * stride - 1}.{behind}.conv.{leaf}"
        case ["down_blocks" | "up_blocks" as side, level, kind, block, *rest]:
            number = int(level) * stride + int(block)
            place = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
            if kind == "attentions":
                return f"{place}.1.{'.'.join(rest)}"
            return f"{place}.0.{_RESIDUAL_BLOCK[rest[0]]}.{rest[1]}"
        case ["mid_block", "attentions", _, *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["mid_block", _, block, part, leaf]:
            return f"middle_block.{2 * int(block)}.{_RESIDUAL_BLOCK[part]}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{_UNET_ENDS[module]}.{leaf}"


def _vae_name(name: str, last_level: int) -> str:
    """Return the name of a tensor of the VAE, the levels of whose decoder are numbered from the full resolution."""
    match name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut").split("."):
        case [side, "down_blocks" | "up_blocks" as way, level, kind, block, part, leaf]:
            number = int(level) if way == "down_blocks" else last_level - int(level)
            place = f"block.{block}" if kind == "resnets" else kind.removesuffix("rs")
            return f"{side}.{way.removesuffix('_blocks')}.{number}.{place}.{part}.{leaf}"
        case [side, "mid_block", "resnets", block, part, leaf]:
            return f"{side}.mid.block_{int(block) + 1}.{part}.{leaf}"
        case [side, "mid_block", "attentions", _, part, *_, leaf]:
            return f"{side}.mid.attn_1.{_ATTENTION[part]}.{leaf}"
        case parts:
            return ".".join(parts)

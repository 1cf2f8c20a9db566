"""The U-Net of latent diffusion: from noisy latents, a time and optionally a condition to a prediction.

Shapes: b batch, c channels, h and w height and width, d embedding width, s tokens of a condition.

Ho et al. 2020 (arXiv:2006.11239, appendix B), with the refinements of Dhariwal & Nichol 2021 (arXiv:2105.05233) and the
cross-attention of Rombach et al. 2022 (arXiv:2112.10752). With residual blocks it is, weight for weight, the U-Net of
diffusers: ``UNet2DModel`` without tokens, ``UNet2DConditionModel`` with them; see ``models/diffusers/weights.py``.
"""

from functools import partial
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import AttentionBlock, TransformerBlock
from models.layers import (
    ConvNeXtBlock,
    Downsample,
    ResidualBlock,
    TimeEmbedding,
    TimeInjection,
    Upsample,
    Widths,
    set_to_zero,
)

Resample = Downsample | Upsample | None


class UNetConfig(BaseModel, frozen=True, extra="forbid"):
    """A U-Net; each tuple has one entry a level, from the full resolution down, halving between levels."""

    channels: Widths = (128, 256, 512)  # width of each level
    blocks: tuple[PositiveInt, ...] = (2, 2, 2)  # blocks of each level on the way down; one more on the way up
    attention: tuple[bool, ...] = (False, True, True)  # whether each block of the level is followed by attention
    heads: tuple[PositiveInt, ...] = (2, 4, 8)  # attention heads of each level
    transformer_depth: tuple[PositiveInt, ...] = (1, 1, 1)  # layers an attention has, where there are token conditions
    mid_attention: bool = True  # attention between the two blocks at the bottom
    block: Literal["residual", "convnext"] = "residual"  # kind of convolutional block
    time_injection: TimeInjection = (
        "scale_shift"  # injection of the time into blocks: scale_shift learns faster, shift is smaller
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # probability, inside blocks
    norm_groups: PositiveInt = 32  # groups of every GroupNorm; divides every width
    norm_eps: NonNegativeFloat = 1e-5  # added to the variance in every block's GroupNorm
    checkpointed_levels: tuple[int, ...] = ()  # levels computed twice to save memory, e.g. [0, 1]; 0 is the widest map

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.channels)
        for name in ("blocks", "attention", "heads", "transformer_depth"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, channels has {levels}: give one a level"
                )
        for level, (width, heads) in enumerate(zip(self.channels, self.heads, strict=True)):
            if width % self.norm_groups:
                raise ValueError(f"channels[{level}] = {width} is not a multiple of norm_groups = {self.norm_groups}")
            if width % heads:
                raise ValueError(f"channels[{level}] = {width} is not a multiple of heads[{level}] = {heads}")
        if self.channels[0] % 2:
            raise ValueError(f"channels[0] = {self.channels[0]} must be even: half of the time's sinusoids are cosines")
        if unknown := [level for level in self.checkpointed_levels if not 0 <= level < levels]:
            raise ValueError(f"checkpointed_levels names {unknown}, but the levels are 0 to {levels - 1}")
        return self

    @property
    def embedding_width(self) -> int:
        """Width d of the time embedding, which pooled conditions are added to."""
        return 4 * self.channels[0]

    @property
    def attends(self) -> tuple[bool, ...]:
        """Levels with attention anywhere: the last one's may be that between the two blocks at the bottom."""
        return (*self.attention[:-1], self.attention[-1] or self.mid_attention)

    @property
    def factor(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 2 ** (len(self.channels) - 1)


class UNet(nn.Module):
    """Noisy latents, time and condition to an estimate of the same shape as the latents."""

    def __init__(self, config: UNetConfig, *, in_channels: int, out_channels: int, token_width: int = 0) -> None:
        """``token_width`` above 0 adds cross-attention to tokens of that width; every call must then bring tokens."""
        super().__init__()
        self.config = config
        self.token_width = token_width
        widths = config.channels
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.embedding_width)

        skips = [widths[0]]  # widths of the feature maps that the way up will meet again, last first
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            ends = level == len(widths) - 1
            into = [skips[-1]] + [width] * (config.blocks[level] - 1)
            pairs = [(channels, width) for channels in into]
            resample: Resample = None if ends else Downsample(width, pads="all_sides")
            self.down.append(Level(config, level, pairs, resample=resample, token_width=token_width))
            skips += [width] * (len(pairs) + (not ends))
        self.middle = Middle(config, token_width=token_width)
        self.up = nn.ModuleList()
        width_below = widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            into = [width_below] + [width] * config.blocks[level]
            pairs = [(channels + skips.pop(), width) for channels in into]
            resample = None if level == 0 else Upsample(width)
            self.up.append(Level(config, level, pairs, resample=resample, token_width=token_width))
            width_below = width
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        set_to_zero(self.conv_out)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        embedding: Tensor | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Estimate something of the shape of x.

        Args:
            x: Noisy latents (b c h w); h and w multiples of ``config.factor``.
            time: Time of each sample (b,), in steps of the training process.
            embedding: Pooled condition (b d), added to the time embedding.
            tokens: Condition as a sequence (b s token_width), attended to.
            token_mask: Which tokens there are, bool (b s); None for all.

        Raises:
            ValueError: The latents do not halve often enough, or tokens are missing, or nothing would use them.
        """
        self._check(x, tokens)
        emb = self.time_embedding(time)
        emb = F.silu(emb if embedding is None else emb + embedding)  # (b d)
        h = self.conv_in(x)
        skips = [h]
        for down in self.down:
            h, passed = down(h, emb, tokens, token_mask)
            skips += passed
        h = self.middle(h, emb, tokens, token_mask)
        for up, blocks in zip(self.up, reversed(self.config.blocks), strict=True):
            met = [skips.pop() for _ in range(blocks + 1)]
            h, _ = up(h, emb, tokens, token_mask, met)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _check(self, x: Tensor, tokens: Tensor | None) -> None:
        height, width = x.shape[-2:]
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(
                f"Latents of {height}x{width} cannot be halved {len(self.config.channels) - 1} times: "
                f"use sizes that are multiples of {factor}, or fewer levels in the U-Net's channels."
            )
        if (tokens is None) != (self.token_width == 0):
            raise ValueError(
                "This U-Net was built with cross-attention and needs tokens."
                if tokens is None
                else "This U-Net was built without cross-attention: build it with token_width, or pass no tokens."
            )


class Level(nn.Module):
    """The blocks of one resolution, going down (leaving skips) or up (meeting them), then the change of resolution."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths: list[tuple[int, int]],
        *,
        resample: Resample,
        token_width: int,
    ) -> None:
        """``widths`` are the channels into and out of each block, skips included."""
        super().__init__()
        self.checkpointed = level in config.checkpointed_levels
        self.blocks = nn.ModuleList(_block(config, into, out) for into, out in widths)
        self.attentions = nn.ModuleList(
            _attention(config, level, token_width=token_width) for _ in widths if config.attention[level]
        )
        self.resample = resample

    def forward(
        self,
        h: Tensor,
        emb: Tensor,
        tokens: Tensor | None,
        token_mask: Tensor | None,
        skips: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Take h (b c h w) through the level; returns it, and each map that it passed through.

        ``skips`` are the maps that the way up meets, in the order of the blocks; None on the way down.
        """
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._run, h, emb, tokens, token_mask, skips, use_reentrant=False)
        return self._run(h, emb, tokens, token_mask, skips)

    def _run(
        self, h: Tensor, emb: Tensor, tokens: Tensor | None, token_mask: Tensor | None, skips: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        passed = []
        for index, block in enumerate(self.blocks):
            if skips is not None:
                h = torch.cat([h, skips[index]], dim=1)
            h = block(h, emb)
            if self.attentions:
                h = self.attentions[index](h, tokens, token_mask)
            passed.append(h)
        if self.resample is not None:
            h = self.resample(h)
            passed.append(h)
        return h, passed


class Middle(nn.Module):
    """Two blocks at the lowest resolution with attention between them."""

    def __init__(self, config: UNetConfig, *, token_width: int) -> None:
        super().__init__()
        width, level = config.channels[-1], len(config.channels) - 1
        self.block_1 = _block(config, width, width)
        self.attention = _attention(config, level, token_width=token_width) if config.mid_attention else None
        self.block_2 = _block(config, width, width)

    def forward(self, h: Tensor, emb: Tensor, tokens: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """(b c h w) to the same."""
        h = self.block_1(h, emb)
        if self.attention is not None:
            h = self.attention(h, tokens, token_mask)
        return self.block_2(h, emb)


def _block(config: UNetConfig, in_channels: int, out_channels: int) -> nn.Module:
    residual = partial(ResidualBlock, norm_groups=config.norm_groups)
    block = ConvNeXtBlock if config.block == "convnext" else residual
    return block(
        in_channels,
        out_channels,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        embedding_width=config.embedding_width,
        time_injection=config.time_injection,
    )


def _attention(config: UNetConfig, level: int, *, token_width: int) -> AttentionBlock | TransformerBlock:
    width, heads = config.channels[level], config.heads[level]
    if token_width == 0:
        return AttentionBlock(width, heads=heads, norm_groups=config.norm_groups, norm_eps=config.norm_eps)
    return TransformerBlock(
        width,
        heads=heads,
        depth=config.transformer_depth[level],
        token_width=token_width,
        norm_groups=config.norm_groups,
    )

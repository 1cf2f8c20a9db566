"""The objective of the VAE: reconstruction, compression, and optionally a perceptual and an adversarial term.

Every term is a mean over image elements: sums over an image are divided by C H W, so that the weights are those of
Rombach et al. 2022 (arXiv:2112.10752, appendix G) at any resolution.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from models.autoencoder.augmentation import EquivarianceConfig
from models.autoencoder.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)
from models.autoencoder.discriminator_start import AdversaryStartConfig, StartAtUpdate
from models.autoencoder.perceptual import SMALLEST_IMAGE, Perceptual
from models.autoencoder.vae import Posterior

#: Of losses whose gradients are compared: in half precision the share of one among 16 x 3 x 512 x 512 elements would be
#: 0. A power of two, so that in others no bit changes.
HALF_PRECISION_SCALE = 2.0**10


class NoPerceptualTerm(BaseModel, frozen=True, extra="forbid"):
    """Pixels alone."""

    kind: Literal["none"] = "none"  # no further weights needed


class LPIPSTerm(BaseModel, frozen=True, extra="forbid"):
    """LPIPS with VGG16 (Zhang et al. 2018, arXiv:1801.03924)."""

    kind: Literal["lpips"] = "lpips"  # needs a weights file
    weights: Path  # safetensors file; made by models/autoencoder/perceptual_weights.py
    weight: PositiveFloat = 1.0  # of the term


class NoAdversary(BaseModel, frozen=True, extra="forbid"):
    """No discriminator."""

    kind: Literal["none"] = "none"  # the autoencoder trains alone


class PatchAdversary(BaseModel, frozen=True, extra="forbid"):
    """A PatchGAN discriminator with hinge loss and adaptive weight."""

    kind: Literal["patchgan"] = "patchgan"  # sharper textures, after the reconstruction has settled
    weight: PositiveFloat = 0.5  # of the adversarial term, on top of the adaptive weight
    start: AdversaryStartConfig = StartAtUpdate()  # start of the adversarial term
    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # the network


PerceptualTerm = Annotated[NoPerceptualTerm | LPIPSTerm, Field(discriminator="kind")]
Adversary = Annotated[NoAdversary | PatchAdversary, Field(discriminator="kind")]


class VAEObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """L1 + KL, with optional perceptual and adversarial terms."""

    kl_weight: NonNegativeFloat = 1e-6  # of the KL divergence in nats, per image element
    perceptual: PerceptualTerm = NoPerceptualTerm()  # distance of deep features
    adversary: Adversary = NoAdversary()  # discriminator
    equivariance: EquivarianceConfig = EquivarianceConfig()  # of latents that are transformed as images are (EQ-VAE)
    latent_noise: NonNegativeFloat = 0.0  # gamma of l-DeTok, in units of the latent; 0 is off, 3 the authors'

    def check_sizes(self, *, resolution: int, latent_size: int) -> None:
        """Refuse images and latents whose sides are too small for a term, or not divisible by a factor.

        Raises:
            ValueError: Naming the term.
        """
        factors = self.equivariance.factors if self.equivariance.probability else (1,)
        for factor in factors:
            if latent_size % factor:
                raise ValueError(
                    f"equivariance.factors: {factor} does not divide {latent_size}, the latents' side. Leave it out."
                )
        needed = {"perceptual": SMALLEST_IMAGE} if isinstance(self.perceptual, LPIPSTerm) else {}
        if isinstance(self.adversary, PatchAdversary):
            needed["adversary"] = self.adversary.discriminator.smallest_image
        for term, least in needed.items():
            if (found := resolution // max(factors)) < least:
                raise ValueError(
                    f"{term} needs images of {least} pixels a side or more; here the smallest have {found}, with the "
                    "largest of equivariance.factors where that is on. Leave that factor out, or the term."
                )


@dataclass(frozen=True, kw_only=True)
class VAELoss:
    """The loss of one micro-batch; all scalars."""

    total: Tensor  # what is minimised
    reconstruction: Tensor  # L1 and perception, weighted as in the total
    terms: dict[str, Tensor]  # its parts, unweighted
    pulls: dict[str, Tensor]  # those that reach the decoder, weighted as in the total


class VAEObjective(nn.Module):
    """The loss of a reconstruction. Holds the frozen perceptual network; the discriminator is trained elsewhere."""

    def __init__(self, config: VAEObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual: Perceptual | None = None
        if isinstance(config.perceptual, LPIPSTerm):
            self.perceptual = Perceptual.from_file(config.perceptual.weights)

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor,
        posterior: Posterior,
        *,
        elements: int,
        last_layer: Tensor,
        discriminator: Discriminator | None,
    ) -> VAELoss:
        """Compute the loss of a reconstruction.

        Args:
            images: In [-1, 1]; (b C H W).
            reconstruction: Same shape.
            posterior: Of the latents.
            elements: C H W of the images that were encoded; those that are compared may be smaller.
            last_layer: Weight of the decoder's last layer, where gradients are compared.
            discriminator: The bare network, or None before the adversarial term starts; the same on every rank. Its
                weights get no gradient here.
        """
        terms = {"l1": (images - reconstruction).abs().mean(), "kl": posterior.kl().mean() / elements}
        pulls = {"l1": terms["l1"]}
        if self.perceptual is not None:
            assert isinstance(self.config.perceptual, LPIPSTerm)
            terms["perceptual"] = self.perceptual(reconstruction, images).mean()
            pulls["perceptual"] = self.config.perceptual.weight * terms["perceptual"]
        reconstruction_loss = sum(pulls.values(), start=torch.zeros_like(terms["l1"]))
        total = reconstruction_loss + self.config.kl_weight * terms["kl"]
        adversary = self.config.adversary
        if isinstance(adversary, PatchAdversary) and discriminator is not None:
            terms["adversarial"] = generator_hinge_loss(discriminator(reconstruction))
            weight = adaptive_weight(
                rank_mean_gradient(reconstruction_loss, last_layer),
                rank_mean_gradient(terms["adversarial"], last_layer),
            )
            pulls["adversarial"] = adversary.weight * weight * terms["adversarial"]
            total = total + pulls["adversarial"]
            terms["adaptive_weight"] = weight
        return VAELoss(total=total, reconstruction=reconstruction_loss, terms=terms, pulls=pulls)


def discriminator_loss(discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the discriminator's hinge loss and the gap of its mean logits, real minus fake; scalars.

    One call for both halves: a wrapped network must be called once a backward.
    """
    real, fake = discriminator(torch.cat([images, reconstruction.detach()])).chunk(2)
    return discriminator_hinge_loss(real, fake), (real.mean() - fake.mean()).detach()


def rank_mean_gradient(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``loss`` with respect to ``weight``, averaged over the ranks, so that all agree on it."""
    (gradient,) = torch.autograd.grad(HALF_PRECISION_SCALE * loss, weight, retain_graph=True)
    gradient /= HALF_PRECISION_SCALE
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient

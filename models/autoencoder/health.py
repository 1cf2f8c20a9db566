"""The health of an autoencoder: gradients of its loss's terms, activity of its channels, spectrum of its latents.

Metrics of a training are of one micro-batch on each rank, averaged over the ranks: all ranks get the same, and all must
call. Those of given latents (b c h w) are for one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from models.autoencoder.objective import VAELoss, rank_mean_gradient
from models.autoencoder.vae import Posterior

ACTIVE_FRACTION = 0.1  # a channel is active when its mean varies more than this share of its total spread


class NoGradient(RuntimeError):
    """A term of the loss is there, but nothing is learned from it."""


def gradient_norms(loss: VAELoss, *, last_layer: Tensor) -> dict[str, Tensor]:
    """Return the L2 norm of each term's gradient at the decoder's last layer, weighted as in the total. A collective.

    The KL divergence is not among them: it does not reach the decoder.

    Raises:
        NoGradient: The perceptual term has none, so its weight would be an illusion.
    """
    norms = {name: rank_mean_gradient(term, last_layer).norm() for name, term in loss.pulls.items()}
    if "perceptual" in norms and float(norms["perceptual"]) == 0:
        raise NoGradient(
            "The perceptual term has no gradient at the decoder's last layer: the network would learn nothing from it. "
            "Its weights file holds a network that does not see the images, or its weight is 0. Make the file again "
            "with models/autoencoder/perceptual_weights.py, or remove train_vae.objective.perceptual."
        )
    return norms


def latent_metrics(posterior: Posterior) -> dict[str, Tensor]:
    """Return the KL divergence of each channel (nats a sample), and how many channels are active. A collective."""
    mean, log_variance = posterior.mean.detach().float(), posterior.log_variance.detach().float()
    per_channel = torch.stack(
        [
            posterior.kl_per_channel().detach().mean(dim=0),
            mean.mean(dim=(0, 2, 3)),
            mean.square().mean(dim=(0, 2, 3)),
            log_variance.exp().mean(dim=(0, 2, 3)),
        ]
    )  # (4 c)
    if dist.is_initialized():
        dist.all_reduce(per_channel)
        per_channel /= dist.get_world_size()
    kl, first_moment, second_moment, variance = per_channel
    of_means = (second_moment - first_moment.square()).clamp(min=0)
    active = of_means.sqrt() > ACTIVE_FRACTION * (of_means + variance).sqrt()
    return {"active_channels": active.sum(), **{f"kl_{channel}": value for channel, value in enumerate(kl)}}


def standardised(latents: Tensor) -> Tensor:
    """Latents of which every channel has mean 0 and standard deviation 1 over these images, a dead one 0."""
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
    return (latents - mean) / deviation.clamp(min=1e-6)


def high_frequency_share(latents: Tensor) -> float:
    """Share of the power of standardised latents at frequencies that latents of half the size could not hold.

    Those above a quarter of a cycle a pixel, along either side. White noise has about three quarters there.
    """
    power = torch.fft.fft2(standardised(latents)).abs().square().mean(dim=(0, 1))
    high_rows, high_columns = (torch.fft.fftfreq(side, device=power.device).abs() > 1 / 4 for side in power.shape)
    whole = power.sum().clamp(min=torch.finfo(power.dtype).tiny)  # of latents that do not vary, 0
    return float(power[high_rows[:, None] | high_columns].sum() / whole)


def midpoints(latents: Tensor) -> Tensor:
    """Return the point half-way between each latent and its nearest neighbour, both seen as standardised latents."""
    points = standardised(latents).flatten(1)
    # The nearest of all is the point itself, or one that is equal.
    return (latents + latents[torch.cdist(points, points).topk(2, largest=False).indices[:, 1]]) / 2

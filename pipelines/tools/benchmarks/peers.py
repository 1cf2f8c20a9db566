"""diffusers' side: its networks with our weights, the loop of its training examples, and that of its pipelines.

diffusers is imported on use: the tool's help must not wait for it.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser
from models.diffusers.config import scheduler_config_to_diffusers, unet_config_to_diffusers, vae_config_to_diffusers
from models.diffusers.weights import denoiser_to_diffusers, vae_to_diffusers
from models.diffusion.objective import MinSNRWeighting
from models.diffusion.samplers import DDIMConfig
from pipelines.runtime.training.config import TrainingConfig
from pipelines.tools.benchmarks.shards import CLASSES

LossOf = Callable[[Any, Mapping[str, Tensor]], Tensor]
DRAWN = ("noise", "times")  # fields of a batch that their loops draw themselves where they are not given


def theirs(network: nn.Module, resolution: int) -> Any:
    """Return diffusers' network with the weights of our denoiser or autoencoder, for images of ``resolution``."""
    import diffusers

    if isinstance(network, Denoiser):
        channels, side, _ = network.latent_shape
        shape = {"latent_channels": channels, "latent_size": side, "num_classes": len(CLASSES)}
        described = unet_config_to_diffusers(network.config, **shape)
        weights = denoiser_to_diffusers(network.state_dict(), network.config)
    else:
        assert isinstance(network, AutoencoderKL)
        described = vae_config_to_diffusers(
            network.config, image_channels=network.image_channels, sample_size=resolution
        )
        weights = vae_to_diffusers(network.state_dict(), network.config)
    found = getattr(diffusers, described["_class_name"]).from_config(described)
    found.load_state_dict(weights)
    return found.to(next(network.parameters()).device).to(memory_format=torch.channels_last)


def compile_parts(*networks: Any) -> None:
    """Compile what is called of each network: of an autoencoder encoder and decoder."""
    for network in networks:
        for part in (network.encoder, network.decoder) if hasattr(network, "encoder") else (network,):
            part.compile()


def scheduler_of(denoiser: Denoiser, sampler: DDIMConfig) -> Any:
    """Return diffusers' scheduler of the denoiser's process."""
    import diffusers

    return diffusers.DDIMScheduler.from_config(scheduler_config_to_diffusers(denoiser.config, sampler))


def unet_loss(denoiser: Denoiser) -> LossOf:
    """Return the loss of ``train_text_to_image.py``."""
    from diffusers.training_utils import compute_snr

    scheduler, weighting = scheduler_of(denoiser, DDIMConfig()), denoiser.config.objective.weighting

    def loss_of(network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        x0, given = batch["x0"], {k: v for k, v in batch.items() if k not in ("x0", *DRAWN)}
        noise = batch["noise"] if "noise" in batch else torch.randn_like(x0)
        times = batch["times"] if "times" in batch else torch.randint(0, 1000, (len(x0),), device=x0.device)
        output = network(scheduler.add_noise(x0, noise, times), times, **given, return_dict=False)[0]
        error = F.mse_loss(output.float(), scheduler.get_velocity(x0, noise, times).float(), reduction="none")
        if not isinstance(weighting, MinSNRWeighting):
            return error.mean()
        snr = compute_snr(scheduler, times)
        return (error.mean(dim=(1, 2, 3)) * snr.clamp(max=weighting.gamma) / (snr + 1)).mean()

    return loss_of


def vae_loss(kl_weight: float) -> LossOf:
    """Return the loss of ``train_autoencoderkl.py``, without perceptual and adversarial terms."""

    def loss_of(network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        images = batch["images"]
        posterior = network.encode(images).latent_dist
        noise = batch["noise"] if "noise" in batch else torch.randn_like(posterior.mean)
        reconstruction = network.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(reconstruction, images) + kl_weight * posterior.kl().mean() / images[0].numel()

    return loss_of


class TheirTraining:
    """The loop of diffusers' training examples: ``samples`` in memory, whose noise and times it draws itself."""

    def __init__(
        self,
        network: Any,
        loss_of: LossOf,
        samples: list[dict[str, Tensor]],
        config: TrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        optim = config.optim
        betas, decay = (optim.beta1, optim.beta2), optim.weight_decay
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=optim.peak_lr, betas=betas, weight_decay=decay, eps=optim.epsilon
        )
        rate = get_scheduler("constant", optimizer)
        self._averages = EMAModel(network.parameters())
        loader: Any = DataLoader(samples, batch_size=config.global_batch, shuffle=True, drop_last=True)  # type: ignore[arg-type]
        self._network, self._optimizer, loader, self._rate = accelerator.prepare(network, optimizer, loader, rate)
        self._averages.to(accelerator.device)
        self._accelerator, self._loss_of, self._max_norm = accelerator, loss_of, optim.max_grad_norm
        self._batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def make(self, updates: int) -> None:
        """Make so many updates."""
        accelerator, network = self._accelerator, self._network
        for batch in itertools.islice(self._batches, updates):
            with accelerator.accumulate(network):
                with accelerator.autocast():
                    loss = self._loss_of(network, batch)
                accelerator.gather(loss.detach().repeat(len(next(iter(batch.values()))))).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), self._max_norm)
                self._optimizer.step()
                self._rate.step()
                self._optimizer.zero_grad()
            if accelerator.sync_gradients:
                self._averages.step(network.parameters())


@torch.no_grad()
def samples(
    unet: Any, vae: Any, scheduler: Any, latents: Tensor, arguments: Mapping[str, Tensor], *, scale: float, steps: int
) -> Tensor:
    """Draw images by the loop of diffusers' pipelines, guidance in one call; uint8 (n H W C).

    ``arguments`` are those of the U-Net for both branches, the unconditional one first.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    for time in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), time)
        uncond, cond = unet(both, time, **arguments, return_dict=False)[0].chunk(2)
        latents = scheduler.step(uncond + scale * (cond - uncond), time, latents, return_dict=False)[0]
    images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

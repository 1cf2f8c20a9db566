"""Error budget: what each step from real images to samples costs, measured on held-out real images.

real -> transformed (mirrored, as training shows them) -> encoded (afresh, and decoded from the posterior's mean) ->
stored (decoded from the mean in the latent shards) -> drawn (decoded from a draw of that posterior, which the U-Net
learns from) -> samples without guidance -> samples with it. Each line holds the errors of those above it.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.loading import LatentShards
from data.manifest import Parents
from data.randomness import SampleDraws
from data.transforms import to_unit_range
from models.autoencoder.vae import AutoencoderKL, Posterior
from models.metrics.fidelity import psnr
from pipelines.evaluation.real_images import RealImages
from pipelines.model.decoded import finite_levels
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.stage.stage import Stage

REAL = "real"
STORED = ("stored", "drawn")  # need the latent shards
DECODED = ("encoded", *STORED)
STEPS = ("transformed", *DECODED)  # of the held-out images, after which the samples come


class FixedBatches:
    """Passes of an autoencoder in batches of one size, filled up by repetition, on which the last bits may depend.

    Args:
        autoencoder: Frozen.
        batch_size: Images of a pass; at least as many as are given.
        stage: Whose precision the networks compute in.
        precision: Its name, for messages.
    """

    def __init__(self, autoencoder: AutoencoderKL, *, batch_size: int, stage: Stage, precision: str) -> None:
        self._autoencoder, self.batch_size, self._stage, self._precision = autoencoder, batch_size, stage, precision
        self._device = next(autoencoder.parameters()).device

    def encode(self, images: Tensor) -> Posterior:
        """Encode images uint8 (b h w c)."""
        with torch.no_grad(), self._stage.accelerator.autocast():
            posterior = self._autoencoder.encode(to_unit_range(self._filled(images)).to(self._device))
        return Posterior(*(part[: len(images)] for part in posterior))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (b c h w) to images uint8 (b h w c).

        Raises:
            ConfigError: An image holds NaN or infinity.
        """
        with torch.no_grad(), self._stage.accelerator.autocast():
            decoded = self._autoencoder.decode(self._filled(latents).to(self._device))[: len(latents)]
        names = [f"real image {row} of its batch" for row in range(len(latents))]
        levels = finite_levels(decoded, names=names, stage=self._stage.name, precision=self._precision)
        return torch.from_numpy(levels)

    def _filled(self, rows: Tensor) -> Tensor:
        return torch.cat([rows] * -(-self.batch_size // len(rows)))[: self.batch_size]


class HeldOutImages:
    """The held-out images after each step, batch by batch.

    Args:
        real: The sets of real images.
        latents: Folder of the latent shards; "" leaves the steps out that read them.
        parents: Manifests of the inputs.
        autoencoder: Of both, the images and the latents.
        seed: Of the mirroring and of the draws.
    """

    def __init__(
        self, real: RealImages, latents: str, parents: Parents, autoencoder: FixedBatches, *, seed: int
    ) -> None:
        self._real, self._folder, self._parents = real, latents, parents
        self._autoencoder, self._seed = autoencoder, seed
        self.flip_probability = float(parents.unet.config.get("flip_probability", 0.0))

    @cached_property
    def absent(self) -> dict[str, str]:
        """Steps that are not measured, each with its reason."""
        absent = {} if self.flip_probability else {"transformed": "the training mirrors no image"}
        if not len(self._real.indices["floor"]):
            return absent | dict.fromkeys((REAL, *STEPS), "too few images are held out")
        why = ""
        if not self._folder:
            why = "no latents are given (inputs.latents)"
        elif self._parents.latents.digest != self._parents.unet.parents.get("latents"):
            why = f"inputs.latents = {self._folder!r} are not those that the U-Net was trained on"
        elif self._parents.latents.parents.get("corpus") != self._parents.corpus.digest:
            why = f"inputs.latents = {self._folder!r} are not those of inputs.corpus"
        return absent | (dict.fromkeys(STORED, why) if why else {})

    @property
    def steps(self) -> list[str]:
        """The steps that are measured, in order, the real images themselves aside."""
        return [step for step in STEPS if step not in self.absent]

    def after(self, step: str, number: int) -> dict[str, Tensor]:
        """Return one batch after ``step``: images uint8 (b h w c), labels (b,) and, once decoded, PSNR in dB (b,).

        ``rows`` (b,) are the places of the images within their set.
        """
        rows, (images, labels) = self._real.rows("floor", number), self._real.read("floor", number)
        mirrored = SampleDraws(self._seed, 0, rows.tolist()).uniforms("flip") < self.flip_probability
        images = torch.where(torch.from_numpy(mirrored)[:, None, None, None], images.flip(2), images)
        places = torch.arange(len(rows)) + self._real.batch(number).start
        match step:
            case "transformed":
                return {"images": images, "labels": labels, "rows": places}
            case "encoded":
                latents = self._autoencoder.encode(images).mode()
            case _:
                # Images that the encoding left out have no latents.
                stored_at = self._stored_at[self._real.batch(number)]
                kept = stored_at >= 0
                images, labels, rows, places = images[kept], labels[kept], rows[kept], places[kept]
                with config_error_at("inputs.latents"):
                    stored = self._latents.read(stored_at[kept], flipped=mirrored[kept] if mirrored.any() else None)
                posterior = Posterior(*torch.from_numpy(stored.moments).float().unbind(dim=1))
                shape = tuple(posterior.mean.shape[1:])
                noise = torch.from_numpy(SampleDraws(self._seed, 0, rows.tolist()).normals("posterior", shape))
                latents = posterior.mode() if step == "stored" else posterior.sample(noise)
        decoded = self._autoencoder.decode(latents) if len(latents) else images
        found = {"images": decoded, "labels": labels, "rows": places}
        return {**found, "psnr": psnr(decoded.movedim(-1, 1), images.movedim(-1, 1))}

    @cached_property
    def _latents(self) -> LatentShards:
        with config_error_at("inputs.latents"):
            return LatentShards(self._folder, split=self._real.floor_split, manifest=self._parents.latents)

    @cached_property
    def _stored_at(self) -> np.ndarray:
        """Index of each held-out image within the latent shards, by shard and key; -1 where encoding left it out."""
        shards, rows = self._real.shards[self._real.floor_split].locate(self._real.indices["floor"])
        parts, known, found = {part.entry.name: part for part in self._latents.shards}, {}, []
        for shard, row in zip(shards, rows, strict=True):
            if shard.name not in known:
                indices = parts[shard.name].indices if shard.name in parts else np.empty(0, np.int64)
                known[shard.name] = dict(zip(self._latents.keys(indices), indices.tolist(), strict=True))
            found.append(known[shard.name].get(shard.key(row), -1))
        return np.array(found, dtype=np.int64)

"""Weights of the trained model: written by the training stages, checked and loaded by everything after them.

``vae.safetensors`` and ``unet.safetensors`` are averaged weights, written once, each with a ``config.json`` from which
its network is built. The manifest beside them holds their digest; weights that do not match it are refused.

A folder of diffusers as ``inputs.vae`` has no manifest of ours, so one is made of what it holds: the sha256 of its
weights ties latents to it as to a VAE of our own. Its scaling is taken over, since a published U-Net expects latents
that are scaled so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors.torch import load_file, save
from torch import nn

from data.diffusers_folder import config_of, weights_of
from data.files import MADE_AGAIN, read_json, verify_file, write_atomically, write_json
from data.manifest import AnyVAEManifest, DiffusersVAEManifest, FileEntry, Manifest, Parents, UNetManifest, VAEManifest
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import vae_config_from_diffusers
from models.diffusers.weights import vae_from_diffusers
from models.diffusion.samplers import SamplerConfig, check_sampler
from models.latent_diffusion import LatentDiffusion, Normalisation
from pipelines.model.device import Device
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import STAGE_FOLDERS
from pipelines.runtime.stage.stage import Stage


class ModelInputs(BaseModel, frozen=True, extra="forbid"):
    """The trained model."""

    vae: str  # folder of the autoencoder
    unet: str  # folder of the U-Net


class GuidedInputs(ModelInputs, frozen=True, extra="forbid"):
    """The trained model, and what its guidance leads away from."""

    guide: str = ""  # of a weaker U-Net that guidance leads away from, if the file names it; "" from no condition


def publish(
    stage: Stage, kind: type[Manifest], network: nn.Module, *, config: Mapping[str, Any], **fields: Any
) -> None:
    """Finish a training: write ``vae.safetensors`` or ``unet.safetensors`` with ``config.json``, commit the manifest.

    Args:
        stage: The training.
        kind: Of its manifest.
        network: Its weights are those that the other stages read.
        config: All that is needed to build the network again.
        fields: Of the manifest, besides files and digest of the weights.
    """
    path, files = stage.folder / f"{STAGE_FOLDERS[stage.name]}.safetensors", []
    if stage.is_main:
        write_atomically(path, save({key: value.cpu().contiguous() for key, value in network.state_dict().items()}))
        write_json(stage.folder / "config.json", config)
        files = [FileEntry.of(path), FileEntry.of(stage.folder / "config.json")]
        fields["weights"] = files[0].sha256
        stage.log.info(f"weights {files[0].sha256[:12]} in {stage.folder}")
    # By its folder: a guide or a replicate is to take the alias from no other network.
    stage.tracker.log_model(stage.folder.name, stage.folder, alias=stage.config.run.register_as)
    stage.finish(kind, files=files, **fields)


def load_vae(folder: str | Path, manifest: AnyVAEManifest, *, device: Device) -> AutoencoderKL:
    """Load an autoencoder, ours or that of a diffusers folder, frozen.

    Raises:
        ValueError: The weights are missing or not those of the manifest.
    """
    if isinstance(manifest, DiffusersVAEManifest):
        network = _diffusers_vae(Path(folder), manifest)
    else:
        config = _checked_config(Path(folder), manifest, name="vae")
        network = AutoencoderKL(vae_config_of(folder, manifest), image_channels=config["image_channels"])
        network.load_state_dict(load_file(Path(folder) / "vae.safetensors"))
    return device.place(network.requires_grad_(False).eval())


def vae_config_of(folder: str | Path, manifest: AnyVAEManifest) -> VAEConfig:
    """Read the network of an autoencoder, without its weights.

    Raises:
        ValueError: It has parts that ours lacks, or ``config.json`` is missing or not that of the manifest.
    """
    if isinstance(manifest, DiffusersVAEManifest):
        return vae_config_from_diffusers(manifest.network)[0]
    return VAEConfig(**network_config(Path(folder), manifest)["network"])


def _diffusers_vae(folder: Path, manifest: DiffusersVAEManifest) -> AutoencoderKL:
    """Build the autoencoder of a diffusers folder.

    Raises:
        ValueError: It has parts that ours lacks, or its weights have changed since.
    """
    path = weights_of(folder)
    verify_file(path, sha256=manifest.weights)
    config, image_channels = vae_config_from_diffusers(config_of(folder) or {})
    network = AutoencoderKL(config, image_channels=image_channels)
    network.load_state_dict(vae_from_diffusers(load_file(path), config))
    return network


def load_latent_diffusion(inputs: ModelInputs, parents: Parents, *, device: Device) -> LatentDiffusion:
    """Load the trained model, frozen: the VAE, the U-Net with its process, and the normalisation of its latents.

    Raises:
        ConfigError: Weights are missing or not those of their manifest, or the VAE is not the U-Net's.
    """
    check_latent_diffusion(inputs, parents)
    with config_error_at("inputs.vae"):
        autoencoder = load_vae(inputs.vae, parents.vae, device=device)
    with config_error_at("inputs.unet"):
        config = network_config(Path(inputs.unet), parents.unet)
        denoiser = _load_denoiser(inputs.unet, parents.unet, device=device)
    guide = None
    if isinstance(inputs, GuidedInputs) and parents.guide is not None:
        with config_error_at("inputs.guide"):
            guide = _load_denoiser(inputs.guide, parents.guide, device=device)
    return LatentDiffusion(
        autoencoder=autoencoder,
        denoiser=denoiser,
        guide=guide,
        normalisation=Normalisation(config["statistics"]["mean"], config["statistics"]["std"]).to(device.torch),
        caption_features=config.get("text"),
    )


def _load_denoiser(folder: str, manifest: UNetManifest, *, device: Device) -> Denoiser:
    """Load a U-Net with its process, frozen.

    Raises:
        ValueError: The weights are missing or not those of the manifest.
    """
    config = _checked_config(Path(folder), manifest, name="unet")
    denoiser = Denoiser(
        _denoiser_of(config),
        latent_channels=config["latent_channels"],
        latent_size=config["latent_size"],
        num_classes=len(manifest.classes),
    )
    denoiser.load_state_dict(load_file(Path(folder) / "unet.safetensors"))
    return device.place(denoiser.requires_grad_(False).eval())


def weights_of_samples(parents: Parents) -> dict[str, str]:
    """Return the sha256 of the weights that samples are drawn by."""
    guide = {"guide": parents.guide.weights} if parents.guide else {}
    return {"unet": parents.unet.weights, "vae": parents.vae.weights, **guide}


def check_guide(inputs: ModelInputs, parents: Parents) -> None:
    """Refuse a guide whose output is not to be mixed with the U-Net's.

    Raises:
        ValueError: It was trained on other latents or classes, or predicts something else.
    """
    if not isinstance(inputs, GuidedInputs) or parents.guide is None:
        return
    if Path(inputs.guide).resolve() == Path(inputs.unet).resolve():
        raise ValueError(f"{inputs.guide} is inputs.unet itself; --inputs.guide '' goes without a guide.")
    ours, theirs = _terms(inputs.unet, parents.unet), _terms(inputs.guide, parents.guide)
    if wrong := [name for name, value in ours.items() if value != theirs[name]]:
        raise ValueError(
            f"{inputs.guide} has other {', '.join(wrong)} than inputs.unet = {inputs.unet!r}. A guide is a smaller or "
            "less trained network of the same training; --inputs.guide '' goes without one."
        )


def _terms(folder: str, manifest: UNetManifest) -> dict[str, Any]:
    """Return by name what the outputs of two U-Nets must share to be mixed."""
    config = network_config(Path(folder), manifest)
    denoiser = config["denoiser"]
    return {
        "VAE": manifest.vae,
        "statistics of latents": config["statistics"],
        "classes": manifest.classes,
        "captions": config.get("text"),
        "conditioners": [{**conditioner, "drop_probability": None} for conditioner in denoiser["conditioners"]],
        "schedule": denoiser["schedule"],
        "prediction": [denoiser["objective"][key] for key in ("prediction", "variance")],
    }


def check_latent_diffusion(
    inputs: ModelInputs, parents: Parents, samplers: Mapping[str, SamplerConfig] | None = None
) -> None:
    """Refuse a VAE that is not the U-Net's and samplers that its process does not take, before weights are read.

    Args:
        inputs: Folders of the model.
        parents: Their manifests.
        samplers: Samplers by the key that configures them.

    Raises:
        ConfigError: Naming the key.
    """
    with config_error_at("inputs.vae"):
        check_same_vae(parents.unet.vae, given=parents.vae, given_at=inputs.vae, user=f"inputs.unet = {inputs.unet!r}")
    with config_error_at("inputs.guide"):
        check_guide(inputs, parents)
    for key, sampler in (samplers or {}).items():
        with config_error_at(key):
            check_sampler_suits(sampler, denoiser_config(inputs.unet, parents.unet))


def denoiser_config(folder: str | Path, manifest: UNetManifest) -> DenoiserConfig:
    """Read the configuration of a trained U-Net, without its weights.

    Raises:
        ValueError: ``config.json`` is missing or not that of its manifest.
    """
    return _denoiser_of(network_config(Path(folder), manifest))


def _denoiser_of(config: Mapping[str, Any]) -> DenoiserConfig:
    # Older versions knew no joint drop, whatever the number of conditioners.
    return DenoiserConfig.model_validate({"joint_drop_probability": 0.0, **config["denoiser"]})


def check_sampler_suits(sampler: SamplerConfig, denoiser: DenoiserConfig) -> None:
    """Refuse a sampler that the denoiser's process cannot be sampled with.

    Raises:
        ValueError: Saying why, and which sampler would do.
    """
    learned = denoiser.objective.variance == "learned"
    check_sampler(sampler, denoiser.schedule.build(), variance_is_learned=learned)


def encoder_of(vae: AnyVAEManifest) -> str:
    """Return the sha256 of the weights that a VAE's encoder is from: VAEs that share it have the same latents."""
    return (isinstance(vae, VAEManifest) and vae.encoder) or vae.weights


def check_same_vae(used: str, *, given: AnyVAEManifest, given_at: str, user: str) -> None:
    """Refuse a VAE that has another encoder than the one which made the latents.

    Args:
        used: sha256 of the weights that made the latents.
        given: Manifest of the VAE at hand.
        given_at: Its folder, for the message.
        user: The latents or the U-Net that were made with ``used``, for the message.

    Raises:
        ValueError: They differ.
    """
    found = encoder_of(given)
    if used != found:
        raise ValueError(
            f"{given_at!r} holds the VAE {found[:12]}, but {user} was made with the VAE {used[:12]}. A latent means "
            "nothing to another VAE: point inputs.vae at the one that was used, or encode and train again."
        )


def _checked_config(folder: Path, manifest: VAEManifest | UNetManifest, *, name: str) -> dict[str, Any]:
    """Return ``config.json`` of weights that are those of the manifest."""
    verify_file(folder / f"{name}.safetensors", sha256=manifest.weights)
    return network_config(folder, manifest)


def network_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return ``config.json`` beside weights.

    Raises:
        ValueError: It is missing, or not that of the manifest.
    """
    path = folder / "config.json"
    for entry in manifest.files:
        if entry.name == path.name:
            verify_file(path, sha256=entry.sha256)
    return read_json(path, mend=MADE_AGAIN)

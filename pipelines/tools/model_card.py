"""The model card of an export: description, and the lines that reproduce its example in diffusers."""

from collections.abc import Mapping

from torch import Tensor

CARD = """\
---
library_name: diffusers
tags: [latent-diffusion, {unet_class}]
---

# {experiment}

A latent diffusion model trained with Latentline, in the format of diffusers: an `AutoencoderKL`, a `{unet_class}` and a
`{scheduler_class}`.

![Samples](grid.png)

Latents are scaled by `vae.config.scaling_factor` alone, as everywhere in diffusers: what normalises them channel by
channel is in the VAE's `quant_conv` and `post_quant_conv`. These lines draw the example, run in this folder:

```python
{code}
```

Both metrics are rounding: below 1e-3 of the latents' and the images' deviation.

{conditions}

`example.safetensors` holds {num_samples} samples in float32: {names}.

| weights | sha256 |
|---|---|
{digests}
"""

CODE = """\
import torch
from diffusers import AutoencoderKL, {scheduler_class}, {unet_class}
from safetensors.torch import load_file

unet, vae = {unet_class}.from_pretrained("unet"), AutoencoderKL.from_pretrained("vae")
scheduler, example = {scheduler_class}.from_pretrained("scheduler"), load_file("example.safetensors")
scheduler.set_timesteps({steps})
latents, scale = example["noise"], example["guidance_scale"]
with torch.no_grad():
    for t in scheduler.timesteps:
{step}
        latents = scheduler.step(output, t, latents).prev_sample
    images = vae.decode(latents / vae.config.scaling_factor).sample
for found, name in ((latents, "latents"), (images, "images")):
    print(name, ((found - example[name]).abs().max() / example[name].std()).item())"""

ARGUMENTS = ("class_labels", "encoder_hidden_states", "encoder_attention_mask")


def model_card(
    *,
    unet_class: str,
    scheduler_class: str,
    example: Mapping[str, Tensor],
    classes: tuple[str, ...],
    digests: Mapping[str, str],
    experiment: str,
) -> str:
    """Return ``README.md``.

    Args:
        unet_class: Its class in diffusers.
        scheduler_class: The same of the scheduler.
        example: What ``example.safetensors`` holds.
        classes: Class names by label.
        digests: sha256 of the weights by network.
        experiment: The experiment's name.
    """
    steps = 'sigmas=example["sigmas"].tolist()' if "sigmas" in example else 'int(example["num_inference_steps"])'
    classes_of = {"unet_class": unet_class, "scheduler_class": scheduler_class}
    return CARD.format(
        **classes_of,
        experiment=experiment,
        code=CODE.format(**classes_of, steps=steps, step=_step(example)),
        conditions=_conditions(example, classes),
        num_samples=len(example["noise"]),
        names=", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in example.items()),
        digests="\n".join(f"| {what} | `{digest}` |" for what, digest in digests.items()),
    )


def _step(example: Mapping[str, Tensor]) -> str:
    given = [name for name in ARGUMENTS if name in example]
    if not given:
        return "        output = unet(latents, t).sample"
    cond, uncond = (", ".join(f'{name}=example["{prefix}{name}"]' for name in given) for prefix in ("", "null_"))
    return (
        f"        cond = unet(latents, t, {cond}).sample\n"
        f"        uncond = unet(latents, t, {uncond}).sample\n"
        f"        output = uncond + scale * (cond - uncond)"
    )


def _conditions(example: Mapping[str, Tensor], classes: tuple[str, ...]) -> str:
    if "class_labels" not in example and "encoder_hidden_states" not in example:
        return "The model is unconditional."
    parts = []
    if "class_labels" in example and not example["class_labels"].is_floating_point():
        named = ", ".join(f"{label} {name}" for label, name in enumerate(classes))
        parts.append(f"`class_labels` are {named}; {len(classes)}, the last class embedding, is no class.")
    if "encoder_hidden_states" in example:
        pooled = "class_labels" in example and example["class_labels"].is_floating_point()
        parts.append(
            "`encoder_hidden_states` are the text encoder's features of each token, `encoder_attention_mask` says "
            "which tokens there are" + (", `class_labels` is its pooled vector." if pooled else ".")
        )
        parts.append("Those with `null_` in front stand for no caption.")
    return "\n".join(parts)

"""The KL autoencoder and its training objective.

Read ``vae`` (network and posterior), then ``objective`` (terms of the loss and their weights), ``perceptual`` with
``perceptual_weights`` (LPIPS), ``discriminator`` with ``discriminator_start`` (the adversarial term), ``augmentation``
(of latents, before they are decoded) and ``health`` (gradients of the terms, activity of the channels). Imports
``models.layers`` and ``models.attention`` only.
"""

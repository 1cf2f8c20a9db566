"""Conversion to and from the format of diffusers, without diffusers itself: ``config``, then ``weights``.

Imports the networks, the denoiser and the configs of ``models.diffusion`` that it converts.
"""

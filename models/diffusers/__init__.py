"""Conversion to and from the format of diffusers, without it: ``config``, ``weights``, and then ``single_file``.

Imports the networks, the denoiser and the configs of ``models.diffusion`` that it converts.
"""

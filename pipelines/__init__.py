"""Pipelines: the five stages, and the storeys that they stand on.

In the order of the work: ``prepare_corpus``, ``train_vae``, ``encode_latents``, ``train_unet``, ``evaluate``. Beside
them ``tools`` (commands), below them ``evaluation``, ``model`` and ``runtime``; ``configs`` holds experiments. A module
imports those of its own storey and of the storeys below, then ``models`` and ``data``; a stage never imports a stage.
"""

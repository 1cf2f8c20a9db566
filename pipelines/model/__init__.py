"""The trained model between stages: its weights, its device, and what the stages share about it.

Read ``weights`` (written and loaded, with the checks that belong to it) with ``device`` and ``noise`` first; ``start``
(weights to train on from), ``inputs`` (verified shards), ``batches`` (this rank's share of a global batch) and
``captions`` (features of text) feed it, ``validation`` measures it during training, ``grids`` and ``latent_statistics``
show images and latents. ``experiment`` checks all tables of an experiment against each other. May import ``models``,
``data`` and ``pipelines.runtime``; never evaluation, a stage or a tool.
"""

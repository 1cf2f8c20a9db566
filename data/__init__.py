"""Data: bytes in, batches out, from files of any source to the batches that a stage trains on.

Read ``samples`` (one image or latent and its bytes) and ``manifest`` (the contract between stages) first, then
``sources`` (images as found), ``shards`` (tars with an index, local or remote), ``loading`` (batches by index),
``order`` and ``randomness`` (which samples, with which draws), ``prefetch``; ``transforms``, ``statistics`` and
``files`` (atomic writes, hashes, locks) serve them. Nothing of ``models`` or ``pipelines`` is imported here, and users'
mistakes are ``ValueError``.
"""

"""Shards: tars of samples with an index beside each, written by one stage and read at random by the next.

Read ``tar`` (members of a tar, strictly), ``scan`` (samples of a shard), ``index`` (place of every member), ``writer``,
then ``reader`` (one shard), ``split`` (all shards of a split), ``remote`` (cache and ranges of far shards),
``verification`` (size and sha256) and ``keys`` (uniqueness). May import ``data.samples``, ``data.manifest``,
``data.files``, ``data.order`` and ``data.randomness``; never ``data.sources`` or ``data.loading``.
"""

"""Order of training samples: one endless stream, any position of which is computed on its own.

Read ``permutation`` (a shuffle without a table), ``order`` (the stream and its configurations), then the two that are
more than a shuffle: ``blocked`` (remote shards) and ``mixture`` (weights). May import ``data.randomness`` alone.
"""

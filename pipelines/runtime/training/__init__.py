"""Training: the loop that both training stages share, and the guards that stand beside it.

Read ``config``, then ``loop``: the life of an update. Its guards are ``anomalies`` (numbers that are not finite, loss
spikes), ``replica_check`` (ranks that differ) and the watchdog of ``runtime.stage``. ``trainable`` is a network in
training, with its ``optim`` (AdamW or Muon, learning rate) and ``ema`` (averages); ``checkpoint`` commits and verifies
them; ``metrics`` (with throughput) is what is logged, ``flops`` its denominator; ``memory`` forecasts what an update
takes. It imports runtime.stage, tracking, config, of data only files, randomness and prefetch, and knows nothing of
images.
"""

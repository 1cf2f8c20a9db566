"""Evaluation of a trained model: images, metrics of them, and verdicts on several.

Read ``samples`` first (work items: samples, each with features), with ``real_images`` (the reference and held-out
images), ``error_budget`` (what each step makes of those) and ``training_weights`` (checkpoints, averages). Then
``figures`` (work items that measure sets of images), ``metrics``, ``contract`` (what may be compared) and ``pictures``.
``replicates`` and ``verdict`` compare evaluations. May import ``pipelines.model`` and all below it; never a stage or a
tool.
"""

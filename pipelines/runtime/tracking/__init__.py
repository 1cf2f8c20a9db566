"""Tracking: from a stage's numbers to MLflow, at no cost to the training step.

A *record* is one object of ``metrics.jsonl``, {"update", "batch", "time", name: value, ...}; a *metric* is one named
number of it; an *event* is one object of the other spools (start, parameters, image, model, ...). In the order in
which a metric travels: ``tracker`` (called by the stage), ``spool`` (append-only files), ``sender`` (from spools to a
store, once each), ``mlflow_store`` (the only module that imports mlflow), ``sender_process`` (the sender of a running
stage, in a process of its own). Beside them ``pages`` and ``views`` (descriptions of runs, saved views of an
experiment; declared in ``pages.toml``), ``identity`` (run.json, pipeline.json, the store's URI) and ``system_metrics``
(load of the machine).
May import ``runtime.config``, ``data`` and ``models``, nothing above itself.
"""

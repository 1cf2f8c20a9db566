"""Evaluation of a trained model: images, then metrics of them.

Read ``samples`` (work items: samples, reconstructions, real images, each with features), then ``figures`` (work items
that measure them), ``metrics`` (distances to real images, copies, class accuracy, the plot over guidance) and
``likelihood`` (variational bound). ``tracked`` sends all to MLflow. ``experiment`` checks all tables of an experiment
against each other. May import ``pipelines.model`` and all below it; never a stage or a tool.
"""

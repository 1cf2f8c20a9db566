"""Metrics of images and of sets of images: each value with its standard error, and the same bits every time.

Read ``estimate`` (a value with its error), then ``frechet`` and ``kernel`` (distances of two sets),
``neighbours`` (precision, recall, copies),
``fidelity`` (PSNR, SSIM), ``probe`` (class accuracy) and ``retrieval`` (captions). No other package of ours is
imported.
"""

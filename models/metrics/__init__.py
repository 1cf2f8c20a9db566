"""Metrics of images and of sets of images: each value with its standard error, and the same bits every time.

Read ``estimate`` (a value with its error), then ``distribution`` (Frechet and kernel distance, precision, recall),
``fidelity`` (PSNR, SSIM) and ``probe`` (class accuracy). No other package of ours is imported.
"""

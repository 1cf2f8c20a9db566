"""Runtime: what any staged training needs, in four storeys; it knows nothing of images.

From the ground up: ``config`` (TOML and command line to frozen models), ``tracking`` (records to MLflow), ``stage``
(fingerprint, launch, work items, outcome), ``training`` (the loop and its guards). Each sees those below it, and of
``data`` only files, manifests, prefetching and randomness.
"""

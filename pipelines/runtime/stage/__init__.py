"""Frame of a stage: from its fingerprint to its manifest.

In the order to read: ``stage`` (the frame itself), ``fingerprint`` (inputs and configuration, and whether that very
work is done), ``launch`` (processes, devices, stop signals), ``work_items`` with ``leases`` (work shared by ranks and
runs), ``quarantine`` (bad samples), ``watchdog`` (hanging ranks), ``progress``, ``provenance``, ``lineage`` (finished
stages, and what they were made of). It may import ``runtime.tracking``, ``runtime.config`` and what the runtime sees of
``data``.
"""

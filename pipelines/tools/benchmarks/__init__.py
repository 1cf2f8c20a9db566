"""Measurements of ``latentline benchmark``: pairs of jobs that do the same work, and how they are timed."""

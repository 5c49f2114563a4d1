"""Where a job runs."""

from cluster.connect import connect

__all__ = ["connect"]

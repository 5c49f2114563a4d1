"""Where a job runs."""

from cluster.connect import Interrupted, connect

__all__ = ["Interrupted", "connect"]

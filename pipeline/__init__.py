"""What happens to a stack: from movies to queryable atomic columns."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "run": "pipeline.story",
    "open_run": "pipeline.results.open",
    "columns_of_frame": "pipeline.results.open",
    "rows_of_frames": "pipeline.results.open",
    "frames_of_columns": "pipeline.results.open",
    "to_detector": "pipeline.results.open",
    "query": "pipeline.results.query",
    "report": "pipeline.results.report",
    "evaluate": "pipeline.results.evaluate",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and dask take seconds."""
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMES)

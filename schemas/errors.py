"""What can go wrong, sorted by who must act on it."""

from __future__ import annotations


class ColonnadeError(Exception):
    """Base of every error that is not a bug of ours; its text says what was found, expected, and what to do."""


class SettingsError(ColonnadeError):
    """The job or profile file is wrong: the user corrects it."""


class SchemaError(ColonnadeError):
    """A store does not have the layout that this version reads or writes."""


class SourceError(ColonnadeError):
    """A source file cannot be used as it is: the user corrects it, or supplies what it lacks."""


class UnprocessableFrame(ColonnadeError):
    """A frame holds nothing that can be measured: it is flagged, counted and never retried."""


class ResourceError(ColonnadeError):
    """The site cannot give what the run needs: memory, disk, device, workers."""

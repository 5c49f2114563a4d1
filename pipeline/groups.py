"""Movies taken under equal conditions share the network that is adapted to the first of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from pipeline.job import PlannedMovie
from pipeline.movie import Lead
from pipeline.patience import Stopped

POLL = 0.3  # s between two looks at a wish to stop


class Groups:
    """Who leads the groups of a job: of each, the first movie in the job that can be read.

    Movies run side by side in threads, begun in the order of the job; so whom one waits for has begun.
    """

    def __init__(self, movies: Sequence[PlannedMovie] = ()) -> None:
        self._earlier: dict[str, list[str]] = {}
        for movie in movies:
            if names := [member.name for member in movie.group]:
                self._earlier[movie.name] = names[: names.index(movie.name)]
        self._leads: dict[str, Future[Lead | None]] = {name: Future() for name in self._earlier}
        self._adapted = {name: threading.Event() for name in self._earlier}

    def lead_of(self, movie: str, stop: threading.Event) -> Lead | None:
        """Whose network a movie takes over, once earlier ones of its group were opened; None: it trains its own."""
        for earlier in self._earlier.get(movie, ()):
            while not stop.is_set() and not self._leads[earlier].done():
                stop.wait(POLL)
            if stop.is_set():  # it may have ended because all end
                raise Stopped
            if (lead := self._leads[earlier].result()) is not None:
                return lead
        return None

    def opened(self, movie: str, lead: Lead | None) -> None:
        """A movie can be read; ``lead`` names itself if others may take over its network."""
        if movie in self._leads and not self._leads[movie].done():
            self._leads[movie].set_result(lead)

    def adapted(self, movie: str) -> None:
        """A movie's network is there, or never will be."""
        if movie in self._adapted:
            self._adapted[movie].set()

    def left(self, movie: str) -> None:
        """A movie has ended, well or not: nobody waits for it any more."""
        self.opened(movie, None)
        self.adapted(movie)

    def wait_for(self, lead: Lead, stop: threading.Event) -> None:
        """Return once a lead's network is there, or never will be."""
        while not stop.is_set() and not self._adapted[lead.movie].is_set():
            stop.wait(POLL)
        if stop.is_set():
            raise Stopped

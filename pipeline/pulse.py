"""What the workers have at the moment: a small file beside the ledger, replaced every few seconds while a run lasts."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distributed import Client

from pipeline.parts import replace_atomically

FILE = "pulse.json"
BEAT = 5.0  # s


class Pulse:
    """Blocks that were sent and are not finished, by movie and step, and the number of workers.

    The ledger tells only of what is over; ``colonnade status`` learns here what is going on.
    """

    def __init__(self) -> None:
        self._sent: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def sent(self, movie: str, step: str) -> None:
        """A block is on its way to a worker."""
        with self._lock:
            self._sent[movie, step] += 1

    def finished(self, movie: str, step: str) -> None:
        """A block came back."""
        with self._lock:
            self._sent[movie, step] -= 1

    def dropped(self, movie: str, step: str) -> None:
        """Nothing of a step is waited for any more."""
        with self._lock:
            self._sent.pop((movie, step), None)

    @contextmanager
    def beating(self, folder: Path, client: Client | None) -> Iterator[None]:
        """Write FOLDER/pulse.json every BEAT seconds, and remove it at the end."""
        thread = threading.Thread(target=self._beat, args=(folder / FILE, client), daemon=True, name="pulse")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(BEAT)  # a scheduler that was lost may take long to say nothing
            with suppress(OSError):
                (folder / FILE).unlink(missing_ok=True)

    def _beat(self, path: Path, client: Client | None) -> None:
        while not self._stop.is_set():
            with suppress(OSError):  # a disk or scheduler that is away now may be back at the next beat
                workers = 1 if client is None else len(client.nthreads())
                replace_atomically(path, json.dumps(self._now(workers)).encode())
            self._stop.wait(BEAT)

    def _now(self, workers: int) -> dict[str, Any]:
        with self._lock:
            blocks = [[movie, step, count] for (movie, step), count in self._sent.items() if count > 0]
        return {"time": time.time(), "workers": workers, "sent": blocks}


def read_pulse(folder: Path) -> tuple[int, dict[tuple[str, str], int]] | None:
    """Workers, and blocks that are computed by movie and step; None where no run says.

    What was sent beyond the number of workers waits its turn; every step is taken to wait alike.
    """
    try:
        data = json.loads((folder / FILE).read_text())
        workers, sent = int(data["workers"]), {(str(m), str(s)): int(n) for m, s, n in data["sent"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    share = min(1.0, workers / max(1, sum(sent.values())))
    return workers, {key: round(count * share) for key, count in sent.items()}

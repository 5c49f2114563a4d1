"""What is done, with which settings, on which device: immutable batches of records, written by one driver at a time.

A ledger is a folder of JSON-lines files. A file is written once, under a temporary name, and renamed; nothing is ever
changed or appended. A lease names the driver that may write. It survives the driver's SIGKILL: a new driver takes it
over once the old one is seen dead on the same host, or silent for too long on another, and the old one, if it should
wake up again, finds another token in it and stops.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline.parts import replace_atomically
from schemas.errors import ResourceError, SchemaError

HEARTBEAT = 10.0  # s
SILENCE = 90.0  # s without a heartbeat after which a driver on another host counts as dead
FLUSH_RECORDS = 64
FLUSH_SECONDS = 2.0


def now() -> str:
    """Time of a record, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Lease:
    """The right to write below a folder, held by one driver at a time.

    Claims are numbered, and a claim is a file that only one driver can create: of two that find the same dead holder
    one gets the next number. The newest claim names the holder; who finds another's there has been replaced.
    ``lease.json`` carries the holder's heartbeat.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lease.json"
        self.token = uuid.uuid4().hex
        self._number = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        number, claim = self._newest()
        holder = self.holder()
        if claim is not None and (holder is None or holder.get("token") != claim["token"]):
            holder = None if claim.get("released") else claim
        if holder is not None and is_alive(holder):
            raise ResourceError(
                f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']} (last sign of life "
                f"{time.time() - holder['heartbeat']:.0f} s ago); stop it or wait, then run the same command again"
            )
        if not self._claim(number + 1):
            raise ResourceError(
                f"{self.path.parent} is in use by a driver that started at the same moment; wait, or stop it, then run "
                "the same command again"
            )
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.is_ours():
            self.path.unlink(missing_ok=True)
            released = {**_driver(self.token), "released": True}
            replace_atomically(self._claim_path(self._number), json.dumps(released).encode())

    def holder(self) -> dict[str, Any] | None:
        """What the lease file says, or None."""
        return _read_json(self.path)

    def is_ours(self) -> bool:
        """Whether nobody has taken the lease over."""
        _, claim = self._newest()
        return claim is not None and claim["token"] == self.token and not claim.get("released")

    def require(self) -> None:
        """Stop a driver that was declared dead and has been replaced."""
        if not self.is_ours():
            raise ResourceError(f"another driver took over {self.path.parent}; this one stops and writes nothing more")

    def _claim_path(self, number: int) -> Path:
        return self.path.with_name(f"claim-{number:08d}.json")

    def _claims(self) -> list[int]:
        return sorted(int(path.stem.split("-")[1]) for path in self.path.parent.glob("claim-*.json"))

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        """Number of the newest claim and what it says; (0, None) where there is none."""
        number, claim = 0, None
        for _ in range(3):  # a newer driver may remove an old claim between the listing and the reading
            number = max(self._claims(), default=0)
            claim = _read_json(self._claim_path(number)) if number else None
            if claim is not None or not number:
                break
        return number, claim

    def _claim(self, number: int) -> bool:
        """Create claim ``number``; False if another driver has it, or a newer one."""
        draft = self.path.with_name(f".claim.{self.token}")
        replace_atomically(draft, json.dumps(_driver(self.token)).encode())
        try:
            os.link(draft, self._claim_path(number))
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        self._number = number
        claims = self._claims()
        if claims[-1] != number:
            self._claim_path(number).unlink()
            return False
        for old in claims[:-1]:
            self._claim_path(old).unlink(missing_ok=True)
        return True

    def _write(self) -> None:
        replace_atomically(self.path, json.dumps(_driver(self.token)).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a disk that is full or away now may be back at the next beat
                self._beat_once()

    def _beat_once(self) -> None:
        if self.is_ours():
            self._write()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        return value
    except (OSError, ValueError):
        return None


@functools.cache
def _place() -> str:
    """Where process numbers mean something: hosts and containers may share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _driver(token: str) -> dict[str, Any]:
    """This process as a lease names it."""
    return {
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": token,
        "heartbeat": time.time(),
    }


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether the driver that a lease names still lives: by its process here, by its heartbeat elsewhere."""
    if holder["host"] == socket.gethostname() and holder.get("place", _place()) == _place():
        try:
            process = psutil.Process(holder["pid"])
            same = abs(process.create_time() - holder["started"]) < 1.0
            # A killed driver whose parent has not asked for its exit status yet.
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
    return bool(time.time() - holder["heartbeat"] < SILENCE)


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """All records of a movie's ledger, oldest first."""
    for file in sorted(folder.glob("*.jsonl")):
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise SchemaError(
                        f"{file}, line {number} is damaged; remove the file and run again: finished blocks are found "
                        "by their part files"
                    ) from None


Block = tuple[str, int, int]
"""(step, first frame, end frame)."""


@dataclass
class Ledger:
    """The records of one movie: read once, then written in batches."""

    folder: Path
    lease: Lease | None = None
    _known: dict[Block, tuple[str, str, str]] = field(default_factory=dict)
    _rows: dict[Block, dict[str, int]] = field(default_factory=dict)
    _deps: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _flushed: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._number, self.quarantined = 0, False  # the latter: what became of the movie last
        for record in read_records(self.folder):
            self._remember(record)
        for file in self.folder.glob("*.jsonl"):
            self._number = max(self._number, int(file.name.split("-")[0]) + 1)

    def _remember(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "block":
            key = (record["step"], record["start"], record["stop"])
            self._known[key] = (record["fingerprint"], record["status"], record.get("reason", ""))
            counted = {"columns": record.get("rows", 0), "particles": record.get("particles", 0)}
            self._rows[key] = {table: int(rows) for table, rows in counted.items()}
        elif record["kind"] == "redo":
            for key in [key for key in self._known if key[0] in record["steps"]]:
                del self._known[key]
        elif record["kind"] == "movie":
            self.quarantined = record["status"] == "quarantined"
        elif record["kind"] == "deps":
            self._deps[record["step"]] = (record["fingerprint"], record["deps"])

    def state(self, step: str, start: int, stop: int) -> tuple[str, str, str] | None:
        """(fingerprint, status, reason) of the newest record of a block, or None."""
        return self._known.get((step, start, stop))

    def rows(self, step: str, start: int, stop: int, table: str = "columns") -> int:
        """Rows of the block's table, columns or particles, when it was last finished."""
        return self._rows[(step, start, stop)][table]

    def is_done(self, step: str, start: int, stop: int, fingerprint: str) -> bool:
        """Whether the block was finished with this fingerprint."""
        known = self.state(step, start, stop)
        return known is not None and known[:2] == (fingerprint, "done")

    def last_deps(self, step: str) -> tuple[str, dict[str, Any]] | None:
        """Fingerprint of a step when it last ran, and what it depended on."""
        return self._deps.get(step)

    def add(self, kind: str, **record: Any) -> None:
        """Add a record; it reaches the disk with its batch."""
        full = {"kind": kind, **record, "time": now()}
        self._remember(full)
        self._pending.append(full)
        if len(self._pending) >= FLUSH_RECORDS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one immutable file."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        if self.lease is not None:
            self.lease.require()
        data = "".join(json.dumps(record) + "\n" for record in self._pending)
        token = self.lease.token[:8] if self.lease else "none"
        replace_atomically(self.folder / f"{self._number:08d}-{token}.jsonl", data.encode())
        self._number += 1
        self._pending.clear()

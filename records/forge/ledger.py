"""Append-only truth of a campaign: one JSON object per line of events.jsonl, each ending in a
checksum.

What a campaign knows is a pure replay of these lines (see state.py). An event is acknowledged once
its line, newline included, is on the disk. A crash in the middle of a write leaves a torn last
line: readers ignore it, the next append cuts it off. Damage anywhere else is an error and never
repaired silently.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from facts import files
from facts.files import sha256_of as file_digest  # noqa: F401 (its door for the forge)

from . import ForgeError


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value, the same text. Raises ValueError for NaN
    and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first hex digits of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def now() -> str:
    """The present as UTC text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_atomic(path: Path, content: str | bytes):
    """Create or replace a file, whole or not at all. Raises ForgeError naming the file."""
    try:
        files.write_atomic(path, content)
    except OSError as error:
        raise ForgeError(f"cannot write {path.name}: {error.strerror}") from None


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[int]:
    """Hold an advisory lock on a file; the kernel frees it when its owner dies. Raises
    ForgeError(busy) instead of waiting when `busy` is given."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ForgeError(f"cannot open {path.name}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        yield handle
    except BlockingIOError:
        raise ForgeError(busy) from None
    finally:
        os.close(handle)


def seal(event: dict) -> str:
    """The event as a line: its JSON with the checksum as last field, and a newline."""
    body = canonical(event)
    return f'{body[:-1]},"sum":"{hashlib.sha256(body.encode()).hexdigest()[:8]}"}}\n'


def unseal(line: str) -> dict:
    """The event of a line without its newline. Raises ValueError when the checksum does not
    hold."""
    event = json.loads(line)
    if (
        not isinstance(event, dict)
        or seal({k: v for k, v in event.items() if k != "sum"}) != line + "\n"
    ):
        raise ValueError("checksum")
    del event["sum"]
    return event


class Ledger:
    """The events of one campaign. Every process may append; `clock` stamps events (tests replace
    it)."""

    def __init__(self, path: Path, clock: Callable[[], str] = now, durable: bool = True):
        self.path = Path(path)
        self.clock = clock
        self.durable = durable

    def read(self) -> list[dict]:
        """All acknowledged events in order. Raises ForgeError naming the line when one is
        damaged."""
        blob = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = blob.decode("utf-8", "replace").split("\n")
        events = []
        for number, line in enumerate(lines, 1):
            try:
                events.append(unseal(line))
                if events[-1]["n"] != number:
                    raise ValueError("number")
            except (ValueError, KeyError):
                raise ForgeError(
                    f"{self.path.name}: line {number} of {len(lines)} is damaged; restore the file "
                    "from a copy or cut it before this line"
                ) from None
        return events

    def append(self, event: str, **data) -> dict:
        """Add one event and return it once it is on the disk. Raises ForgeError, leaving the file
        as it was, when it cannot be written."""
        with locked(self.path) as handle:
            end, last = self.tail(handle)
            entry = dict(data, n=last + 1, event=event, time=self.clock())
            line = seal(entry).encode()
            try:
                os.ftruncate(
                    handle, end
                )  # what a crash left behind the last newline was never acknowledged
                written = os.pwrite(handle, line, end)
                if written < len(line):
                    raise OSError(28, "no space left on device")
                if self.durable:
                    os.fsync(handle)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, end)
                raise ForgeError(
                    f"cannot write {self.path.name}: {error.strerror}; nothing was recorded"
                ) from None
        return json.loads(canonical(entry))

    def count(self) -> int:
        """How many events are acknowledged, from the last line alone."""
        if not self.path.exists():
            return 0
        with locked(self.path) as handle:
            return self.tail(handle)[1]

    def tail(self, handle: int) -> tuple[int, int]:
        """Where the last acknowledged line ends, and its number (0 and 0 for an empty file)."""
        size = os.fstat(handle).st_size
        block = 1 << 16
        while True:
            begin = max(0, size - block)
            blob = os.pread(handle, size - begin, begin)
            cut = blob.rfind(b"\n")
            if cut < 0 and begin == 0:
                return 0, 0
            start = blob.rfind(b"\n", 0, cut) + 1 if cut >= 0 else 0
            if cut >= 0 and (start > 0 or begin == 0):
                try:
                    return begin + cut + 1, unseal(blob[start:cut].decode())["n"]
                except (ValueError, KeyError):
                    raise ForgeError(
                        f"{self.path.name}: the last line is damaged; run `verify`"
                    ) from None
            block *= 4

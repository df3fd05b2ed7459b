"""Devices of this machine: which a campaign may use, and who holds which.

A slot is one device by its name in CUDA_VISIBLE_DEVICES or, where a campaign uses no GPU, one of
its workers by number. The ledger records the slots of every run from its start to its end. On the
machine a held GPU is a locked file that the run's own processes keep open: the kernel frees it when
the last of them ends, however it ends, so that two campaigns or two workers share no device.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import ForgeError


@functools.cache
def present() -> tuple[str, ...]:
    """Numbers of the GPUs that this machine has, by its own tool; empty without one."""
    if not shutil.which("nvidia-smi"):
        return ()
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, encoding="utf-8", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return tuple(str(i) for i in range(count))


def visible() -> list[str]:
    """Names of the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES where that is set,
    up to the first that is none, as CUDA reads it; else all that are present."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is None:
        return list(present())
    found = []
    for name in outer.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break
        found.append(name.strip())
    return list(dict.fromkeys(found))


def lowest_free(slots: Sequence[str], taken: Sequence[str], wanted: int) -> list[str]:
    """The first `wanted` slots that nobody has, in the order of `slots`; empty when fewer are
    free."""
    free = [s for s in slots if s not in set(taken)]
    return free[:wanted] if len(free) >= wanted else []


def lock_file(name: str) -> Path:
    """The file whose lock says that somebody on this machine uses a device."""
    folder = Path(tempfile.gettempdir()) / f"forge-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "".join(c if c.isalnum() else "_" for c in name)


def take(name: str) -> int | None:
    """An open handle that holds a device; None when somebody else does."""
    handle = os.open(lock_file(name), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def held_elsewhere(names: Sequence[str]) -> list[str]:
    """Those devices that some process of this machine holds at the moment."""
    found = []
    for name in names:
        handle = take(name)
        if handle is None:
            found.append(name)
        else:
            os.close(handle)
    return found


@contextlib.contextmanager
def held(
    among: Sequence[str], wanted: int, wait: float = 1e12
) -> Iterator[tuple[list[str], list[int]]]:
    """Hold the first `wanted` free devices of `among`, all or none; yields (names, handles), and
    children that inherit the handles go on holding them. Raises ForgeError when there are too few
    devices at all or none is free within `wait` seconds."""
    if wanted > len(among):
        raise ForgeError(f"a run needs {wanted} devices, {len(among)} are visible here")
    end = time.monotonic() + wait
    while True:
        handles: dict[str, int] = {}
        for name in among:
            if len(handles) < wanted and (handle := take(name)) is not None:
                handles[name] = handle
        if len(handles) == wanted:
            break
        for handle in handles.values():
            os.close(handle)
        if time.monotonic() > end:
            raise ForgeError(f"{wanted} of the devices {', '.join(among)} are not free")
        time.sleep(0.1)
    try:
        yield list(handles), list(handles.values())
    finally:
        for handle in handles.values():
            os.close(handle)

"""Processes of this machine: what they may see, who they are, and how they are ended with all that
they started."""

import contextlib
import ctypes
import os
import re
import signal
import time
from pathlib import Path

from . import ForgeError

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
MARK = "FORGE_ATTEMPT"  # an environment variable that names the attempt a process belongs to
ALLOWED = re.compile(
    r"PATH|HOME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|USER|LD_LIBRARY_PATH|VIRTUAL_ENV|OMP_NUM_THREADS|"
    r"(CUDA|NVIDIA|NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON)_\w+"
)
LIBC = ctypes.CDLL(None)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH")


# ---- Environment ---------------------------------------------------------------------------------
def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """What a run may see of this process's environment, plus `extra`: paths and devices by a list
    of allowed names; no secrets, no knobs."""
    kept = {k: v for k, v in os.environ.items() if ALLOWED.fullmatch(k) and not SECRET.search(k)}
    return kept | {k: str(v) for k, v in extra.items()}


def located(env: dict[str, str], script: Path) -> dict[str, str]:
    """The same environment with relative data paths taken from the script's folder, beside which a
    campaign links data/: what is recorded then names no folder of this machine."""
    return env | {
        k: str(script.parent / env[k])
        for k in ("DATA_PATH", "TOKENIZER_PATH")
        if env.get(k, "auto") != "auto" and not os.path.isabs(env[k])
    }


# ---- Identity ------------------------------------------------------------------------------------
def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat behind the command's name; None when the process is gone or
    only waits to be reaped."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields
    return None


def identity(pid: int) -> list | None:
    """What tells a process from a later one with the same number: the machine's boot and the start
    time. None when the process is gone."""
    fields = stat_of(pid)
    if fields is None:
        return None
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [boot.read_text("utf-8").strip() if boot.exists() else "", int(fields[19])]


def is_same(pid: int, known: list | None) -> bool:
    """Whether the process with this number is the one that once had the identity `known`."""
    return known is not None and identity(pid) == known


def everybody() -> dict[int, list[str]]:
    """{process id: its fields} of all living processes."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return {pid: fields for pid in pids if (fields := stat_of(pid)) is not None}


def descendants(root: int) -> list[int]:
    """Every living process below `root`."""
    children: dict[int, list[int]] = {}
    for pid, fields in everybody().items():
        children.setdefault(int(fields[1]), []).append(pid)
    found = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    return [pid for pid, fields in everybody().items() if int(fields[2]) == group]


def marked(mark: str) -> list[int]:
    """Living processes whose environment names this attempt."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid in everybody():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


# ---- The end -------------------------------------------------------------------------------------
def adopt_orphans():
    """Make processes that daemonise below this one its children, so that none escapes by a new
    session (Linux)."""
    with contextlib.suppress(AttributeError):
        LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_all(left, grace: float = GRACE):
    """SIGTERM to the processes that `left()` names, SIGKILL to those it still names after `grace`
    seconds, and wait until it names none. Raises ForgeError when something survives."""

    def tell(number: int):
        for pid in left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        tell(number)
        end = time.monotonic() + seconds
        while left() and time.monotonic() <= end:
            time.sleep(0.02)
            if number == signal.SIGKILL:
                tell(number)
        if not left():
            return
    raise ForgeError(f"processes {left()} cannot be killed")


def kill_group(group: int, grace: float = GRACE, below: int | None = None):
    """End a process group and everything below the process `below`, see `end_all`."""

    def left() -> list[int]:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return sorted({*group_members(group), *(descendants(below) if below else [])})

    end_all(left, grace)

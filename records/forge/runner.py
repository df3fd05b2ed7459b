"""One run = one supervised process group with hard limits. Only run folders are written here, never
the ledger.

runs/<key>/ holds run.json (the order), supervisor.json, mark.json and process.json (who runs it),
a1.out (what attempt 1 printed), a1/ (what the script wrote) and, once the run is over for good,
metrics.json. A supervisor owns the folder by a lock that the kernel frees when it dies, however it
dies; whoever comes next kills what it left behind, takes a finished log as it is, and repeats an
unfinished attempt. A run on GPUs holds them by locks in the same way, see devices.py.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import ForgeError, devices, sandbox
from .ledger import locked, now, write_atomic
from .processes import (
    GRACE,
    MARK,
    adopt_orphans,
    clean_environment,
    end_all,
    group_members,
    identity,
    is_same,
    kill_group,
    located,
    marked,
)
from .run_record import FINAL, collect, partway

MAX_ATTEMPTS = 3
# Executed before a run: PR_SET_PDEATHSIG with SIGTERM, and limits.
LAUNCH = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
size = int(sys.argv[1]) if most < 0 else min(int(sys.argv[1]), most)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Exit codes of a run that a person or the kernel, for memory, ended from outside: it is tried
# again.
KILLED_FROM_OUTSIDE = (-9, -15, 137, 143)


class Stopped(Exception):
    """This supervisor was asked to end; the attempt does not count."""


def read_json(path: Path) -> dict:
    """The table in a file; empty when there is none or it is broken."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write_identity(path: Path, pid: int, **more):
    """Say in a file which process does the work."""
    table = dict(pid=pid, identity=identity(pid) or ["gone", 0], started=now(), **more)
    write_atomic(path, json.dumps(table))


def clear_orphans(folder: Path):
    """End what a dead supervisor left behind: its process group while the leader still is the one
    that it started, and whatever carries the mark of its attempt. A later process that was given
    the same number is neither."""
    old = read_json(folder / "process.json")
    group = old.get("pid", 0)
    # A supervisor may die before it could say which process it had started.
    marks = {table["mark"] for table in (old, read_json(folder / "mark.json")) if "mark" in table}

    def left() -> list[int]:
        whole = group_members(group) if group and is_same(group, old.get("identity")) else []
        return sorted({*whole, *(pid for mark in marks for pid in marked(mark))})

    if left():
        end_all(left, 1.0)


# ---- One attempt ---------------------------------------------------------------------------------
def launcher(order: dict) -> list[str]:
    """The command in front of a run's own: no core dumps, bounded files, and an end when the
    supervisor is killed, so that devices come free. It becomes the run, under the same number.

    A function between fork and exec would do the same, but a worker has threads of gRPC, which do
    not survive a fork."""
    size = int(order.get("file_gib", 16) * 2**30)
    return [sys.executable, "-I", "-S", "-c", LAUNCH, str(size)]


def watch(process: subprocess.Popen, out: Path, order: dict, begin: float) -> str:
    """Wait for the end of an attempt; returns why it must be killed, or nothing."""
    changed = time.monotonic()
    seen = -1
    offset = 0
    pause = 0.01
    stall = order.get("stall_s", 300)
    most = order.get("log_mib", 64)
    while process.poll() is None:
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)
        size = out.stat().st_size
        if size != seen:
            changed = time.monotonic()
            seen = size
            with open(out, "rb") as file:
                file.seek(offset)
                fresh = file.read(1 << 20)
            offset += len(fresh.rpartition(b"\n")[0])
            if re.search(rb"train_loss:(nan|inf)", fresh):
                return "nan in the training loss"
            if size > most << 20:
                return f"more than {most} MiB of output"
        if time.monotonic() - begin > order["kill_s"]:
            return f"ran longer than {order['kill_s']:g} s"
        if time.monotonic() - changed > stall:
            return f"stalled: no output for {stall:g} s"
        if (out.parent / "prune").exists():
            return "pruned: " + (out.parent / "prune").read_text("utf-8")[:200]
    return ""


def command(folder: Path, order: dict) -> list[str]:
    """How the script is started: alone, or through torchrun; patched code in a cage."""
    cage = []
    if order.get("patched"):
        allowed = order.get("allow_unsandboxed", False)
        cage = sandbox.cage(folder, Path(order["script"]), order["env"], allowed)
    python = [sys.executable]
    if order.get("nproc", 1) > 1:  # --standalone takes a free port by itself
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += [f"--nproc_per_node={order['nproc']}"]
    return [*cage, *python, order["script"]]


def environment(folder: Path, order: dict, attempt: int, mark: str) -> dict[str, str]:
    """What a run finds in its environment: allowed names of this machine, its knobs, its
    devices."""
    env = clean_environment(located(order["env"], Path(order["script"])))
    env |= dict(RUNS_DIR=str(folder), RUN_ID=f"a{attempt}", SEED=str(order["seed"]))
    if order.get("devices"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(order["devices"])
    return env | {MARK: mark, "PYTHONIOENCODING": "utf-8"}


def run_attempt(
    folder: Path, order: dict, attempt: int, handles: Sequence[int] = ()
) -> tuple[int | None, str]:
    """Run the script once in its own session; returns exit code and why it was killed. The run's
    processes keep `handles`, the locks of their devices, open."""
    out = folder / f"a{attempt}.out"
    mark = f"{order['key']}-{secrets.token_hex(8)}"
    write_atomic(folder / "mark.json", json.dumps(dict(mark=mark)))
    with open(out, "wb") as file:
        process = subprocess.Popen(
            [*launcher(order), *command(folder, order)],
            env=environment(folder, order, attempt, mark),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=handles,
        )
    write_identity(folder / "process.json", process.pid, attempt=attempt, mark=mark)

    def stop(*_):
        raise Stopped

    old = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        killed = watch(process, out, order, time.monotonic())
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        code = process.poll()
        kill_group(process.pid, GRACE, below=os.getpid())
    return code, killed


# ---- One run -------------------------------------------------------------------------------------
@contextlib.contextmanager
def on_devices(order: dict) -> Iterator[tuple[list[str], list[int]]]:
    """Hold the devices of an order: those that the decider gave it, or, on the machine of a worker
    that pulled it, the lowest free ones. Without GPUs there is nothing to hold."""
    given = order.get("devices")
    wanted = order.get("nproc", 1)
    among = given or devices.visible()
    if given is None and order.get("wants_gpu", True) and among:
        if order.get("exclusive"):
            wanted = max(wanted, len(among))
        with devices.held(among, wanted) as found:
            yield found
    elif given:
        with devices.held(given, len(given)) as found:
            yield found
    else:
        yield [], []


def finished(folder: Path, attempt: int) -> bool:
    """Whether an attempt printed its score."""
    text = (folder / f"a{attempt}.out").read_text("utf-8", "replace")
    return FINAL.search(text) is not None


def supervise(folder: Path) -> dict | None:
    """Bring the run of a folder to its end, whatever happened to it before; returns its record.
    Raises ForgeError when another supervisor has it."""
    adopt_orphans()
    with locked(folder / "lock", busy=f"{folder.name} is already being run"):
        done = folder / "metrics.json"
        if done.exists():
            return json.loads(done.read_text("utf-8"))
        write_identity(folder / "supervisor.json", os.getpid())
        order = json.loads((folder / "run.json").read_text("utf-8"))
        clear_orphans(folder)
        made = len(list(folder.glob("a*.out")))
        if made and finished(folder, made):
            return collect(folder, order, made, 0, "", order.get("ordered", now()))
        if made >= MAX_ATTEMPTS:
            return collect(folder, order, made, None, f"interrupted {made} times", now())
        with on_devices(order) as (names, handles):
            order["devices"] = names[: order.get("nproc", 1)]
            started = now()
            order["begin"] = time.time()
            for attempt in range(made + 1, MAX_ATTEMPTS + 1):
                code, killed = run_attempt(folder, order, attempt, handles)
                if code in KILLED_FROM_OUTSIDE and finished(folder, attempt):
                    code = 0  # whoever ended it came after its last line
                if killed or code not in KILLED_FROM_OUTSIDE:
                    break
        return collect(folder, order, attempt, code, killed, started)


class LocalRunner:
    """Starts supervisors of their own on this machine; they outlive the decider and finish what
    they have."""

    owns_devices = True  # runs are on this machine: the decider gives them their places

    def __init__(self, runs: Path):
        self.runs = runs
        self.children: dict[str, subprocess.Popen] = {}

    def start(self, order: dict):
        """Put the order on the disk and start its supervisor."""
        folder = self.runs / order["key"]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "run.json", json.dumps(order, indent=1))
        entry = Path(__file__).with_name("forge.py")
        with open(folder / "supervisor.out", "ab") as out:
            self.children[order["key"]] = subprocess.Popen(
                [sys.executable, str(entry), "supervise", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def poll(self, key: str) -> tuple[str, dict | None]:
        """("done", record), ("running", None), or ("lost", None) when nobody works on it."""
        folder = self.runs / key
        child = self.children.get(key)
        alive = child is not None and child.poll() is None
        if child is not None and not alive:
            del self.children[key]
        with contextlib.suppress(FileNotFoundError):
            return "done", json.loads((folder / "metrics.json").read_text("utf-8"))
        if alive:
            return "running", None
        if not folder.exists():
            return "lost", None
        try:
            with locked(folder / "lock", busy="busy"):
                return "lost", None
        except ForgeError:
            return "running", None

    def partway(self, key: str) -> float | None:
        """What the training losses of a running run say by now, see the function of that name."""
        logs = sorted((self.runs / key).glob("a*.out"))
        order = read_json(self.runs / key / "run.json")
        with contextlib.suppress(OSError):
            if logs and order:
                return partway(logs[-1].read_text("utf-8", "replace"), order.get("seconds", 0.0))
        return None

    def prune(self, key: str, reason: str):
        """Ask a run's supervisor to end it."""
        write_atomic(self.runs / key / "prune", reason)

    def supervisor(self, key: str) -> int | None:
        """The process that supervises a run, also when an earlier decider started it."""
        child = self.children.get(key)
        if child is not None:
            return child.pid if child.poll() is None else None
        known = read_json(self.runs / key / "supervisor.json")
        alive = "pid" in known and is_same(known["pid"], known.get("identity"))
        return known["pid"] if alive else None

    def stop(self, keys: list[str]):
        """End the supervisors of these runs, whoever started them, and what they run."""
        for key in keys:
            pid = self.supervisor(key)
            if pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + GRACE + 6
        while any(self.supervisor(key) is not None for key in keys) and time.monotonic() < end:
            time.sleep(0.05)
        for key in keys:
            self.children.pop(key, None)

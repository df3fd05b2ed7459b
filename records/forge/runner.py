"""One run = one supervised process group with hard limits. Only run folders are written here, never the ledger.

runs/<key>/ holds run.json (the order), process.json (who runs it), a1.out (what attempt 1 printed), a1/ (what the
script wrote) and, once the run is over for good, metrics.json. A supervisor owns the folder by a lock that the kernel
frees when it dies, however it dies; whoever comes next kills what it left behind, takes a finished log as it is, and
repeats an unfinished attempt.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import ForgeError
from .ledger import file_digest, locked, now, write_atomic
from .space import clean_environment, located

MAX_ATTEMPTS = 3
KILLED_FROM_OUTSIDE = (
    -9,
    -15,
    137,
    143,
)  # by a person or by the kernel for memory: tried again, three times in all
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
NUMBER = r"[-+.\deE]+|nan|inf|-inf"
FINAL = re.compile(
    rf"^final:official variant:(\S+) val_loss:({NUMBER}) val_bpb:({NUMBER}) tokens:(\d+) bytes:(\d+)",
    re.M,
)
EXACT = re.compile(rf"^final_\w+_exact val_loss:({NUMBER}) val_bpb:({NUMBER})", re.M)
STEP = re.compile(rf"^step:(\d+)/(\d+) train_loss:({NUMBER}) train_time:(\d+)ms", re.M)
PARTWAY = (0.3, 0.5)  # part of a run whose training losses foretell its score
VAL = re.compile(
    rf"^step:(\d+)/\d+ val_loss:({NUMBER}) val_bpb:({NUMBER}) train_time:(\d+)ms", re.M
)


# ---- Processes -------------------------------------------------------------------------------------------------------
def identity(pid: int) -> list | None:
    """What tells a process from a later one with the same number: boot and start time. None when it is gone."""
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (
            None
            if stat[0] == "Z"
            else [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), int(stat[19])]
        )
    return None


def descendants(root: int) -> list[int]:
    """Every living process below `root`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    children.setdefault(int(stat[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(stat[2]) == group and stat[0] != "Z":
                    found.append(int(entry))
    return found


def adopt_orphans():
    """Make processes that daemonise below this one its children, so that none escapes by a new session (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill_group(group: int, grace: float = GRACE, below: int | None = None):
    """SIGTERM to a process group, SIGKILL to what is left of it (and of everything below `below`) after `grace`
    seconds, and wait until nothing is. Raises ForgeError when something survives."""

    def left() -> list[int]:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return sorted({*group_members(group), *(descendants(below) if below else [])})

    def tell(number: int):
        for pid in left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        tell(number)
        end = time.monotonic() + seconds
        while left():
            if time.monotonic() > end:
                break
            time.sleep(0.02)
            if number == signal.SIGKILL:
                tell(number)
        else:
            return
    raise ForgeError(f"processes {left()} cannot be killed")


# ---- What a log says -------------------------------------------------------------------------------------------------
def partway(text: str, seconds: float = 0.0) -> float | None:
    """Mean training loss, in nats, between 30 and 50 % of a run that ends by its steps or after `seconds` (0 = by steps
    alone); None before that, or with fewer than five readings."""
    rows = [
        (max(int(m[1]) / int(m[2]), int(m[4]) / 1e3 / seconds if seconds else 0.0), float(m[3]))
        for m in STEP.finditer(text)
    ]
    inside = [
        loss for share, loss in rows if PARTWAY[0] < share <= PARTWAY[1] and math.isfinite(loss)
    ]
    return (
        statistics.fmean(inside)
        if rows and rows[-1][0] >= PARTWAY[1] and len(inside) >= 5
        else None
    )


def parse_log(text: str, batch_tokens: int = 0) -> dict[str, Any]:
    """Numbers of a log. `finals` holds every official score line; `curve` is [tokens, bits per byte], `losses`
    [step, nats]."""
    official = [(float(m[2]), float(m[3]), int(m[4]), int(m[5])) for m in FINAL.finditer(text)]
    exact = [(float(m[1]), float(m[2])) for m in EXACT.finditer(text)]
    finals = official or [(loss, bpb, 0, 0) for loss, bpb in exact[-1:]]
    steps = [(int(m[1]), float(m[3]), int(m[4])) for m in STEP.finditer(text)]
    vals = [(int(m[1]), float(m[2]), float(m[3])) for m in VAL.finditer(text)]
    gaps = [(b[2] - a[2]) / (b[0] - a[0]) for a, b in zip(steps[3:], steps[4:]) if b[0] > a[0]]
    found: dict[str, Any] = dict(
        finals=finals,
        steps=max([s[0] for s in steps + vals], default=0),
        losses=[[s[0], s[1]] for s in steps],
        train_s=max((s[2] for s in steps), default=0) / 1e3,
        step_ms=statistics.median(gaps) if gaps else None,
        curve=[[v[0] * batch_tokens, v[2]] for v in vals],
        val_bpb_prequant=vals[-1][2] if vals else None,
    )
    for name, pattern in (
        ("logged_bytes", r"^Total submission size: (\d+)"),
        ("params", r"^model_params:(\d+)"),
        ("logged_code_bytes", r"^Code size: (\d+)"),
        ("val_tokens", r"^audit:data.* val_tokens:(\d+)"),
        ("val_bytes", r"^audit:data.* val_bytes:(\d+)"),
        ("peak_mib", r"^peak memory allocated: (\d+) MiB"),
    ):
        m = re.search(pattern, text, re.M)
        found[name] = int(m[1]) if m else None
    for name, pattern in (
        ("code_sha256", r"^audit:code sha256:(\w+)"),
        ("manifest", r"^audit:data manifest:(\w+)"),
        ("tokenizer_sha256", r"^audit:data.* tokenizer_sha256:(\w+)"),
        ("gpu", r"^audit:env .*gpu:(.+?) host_hash"),
        ("torch", r"^audit:env .*torch:(\S+)"),
        ("world", r"^audit:env .*world_size:(\d+)"),
        ("threads", r"^audit:env .*threads:(\d+)"),
    ):
        m = re.search(pattern, text, re.M)
        found[name] = m[1] if m else None
    return found


def host_class(parsed: dict) -> str:
    """Hosts whose times and rounding can be compared: device kind and count, or processor and threads."""
    if parsed["gpu"] not in (None, "none"):
        return f"{parsed['world']}x{parsed['gpu']}"
    with contextlib.suppress(OSError):
        m = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.M)
        if m:
            return f"{m[1].strip()} x{parsed['threads'] or 1}"
    return f"{platform.machine()} x{parsed['threads'] or 1}"


def classify(
    order: dict, parsed: dict, text: str, code: int | None, killed: str
) -> tuple[str, str]:
    """(status, reason) of an ended attempt. Only `ok` has a score."""
    if killed:
        return next(
            (s for s in ("nan", "pruned", "interrupted") if killed.startswith(s)), "timeout"
        ), killed
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no output"
    )[:300]
    if code not in (0, None):
        if re.search(r"out of memory|MemoryError|bad_alloc|DefaultCPUAllocator", text) or code in (
            -9,
            137,
        ):
            return "oom", last
        return ("nan", last) if "not finite" in text else ("crash", f"exit code {code}: {last}")
    if len(parsed["finals"]) != 1:
        return (
            ("tampered", f"{len(parsed['finals'])} official score lines")
            if parsed["finals"]
            else ("crash", "the log ends without a score")
        )
    loss, bpb, tokens, nbytes = parsed["finals"][0]
    if not (math.isfinite(loss) and math.isfinite(bpb) and 0 < bpb < 100):
        return "nan", f"score {bpb}"
    if tokens and abs(loss / math.log(2) * tokens / nbytes - bpb) > 1e-4 * bpb:
        return "tampered", "bits per byte do not follow from loss, tokens and bytes"
    if (
        parsed["code_sha256"]
        and order.get("code")
        and not parsed["code_sha256"].startswith(order["code"])
    ):
        return "tampered", "another script than ordered ran"
    return "ok", ""


def measure_artifact(folder: Path, parsed: dict, script: Path) -> int | None:
    """Bytes of code plus model as found on the disk, whatever the log says."""
    models = sorted(folder.glob("*.golf")) + sorted(folder.glob("*.ptz"))
    return (
        models[0].stat().st_size + (parsed["logged_code_bytes"] or script.stat().st_size)
        if models
        else None
    )


def collect(
    folder: Path, order: dict, attempt: int, code: int | None, killed: str, started: str
) -> dict:
    """Judge an ended attempt and write metrics.json."""
    out, script = folder / f"a{attempt}.out", Path(order["script"])
    text = out.read_text("utf-8", "replace") if out.exists() else ""
    parsed = parse_log(text, order.get("batch_tokens", 0))
    status, reason = classify(order, parsed, text, code, killed)
    size = measure_artifact(folder / f"a{attempt}", parsed, script) or parsed["logged_bytes"]
    if status == "ok" and (size or 0) > order["artifact_bytes"]:
        status, reason = "oversize", f"{size:,} bytes of {order['artifact_bytes']:,}"
    if status == "ok" and parsed["logged_bytes"] and size != parsed["logged_bytes"]:
        status, reason = (
            "tampered",
            f"the log says {parsed['logged_bytes']:,} bytes, the disk {size:,}",
        )
    loss, bpb, *_ = parsed["finals"][-1] if parsed["finals"] else (None, None)
    metrics = {
        k: parsed[k]
        for k in ("val_bpb_prequant", "steps", "train_s", "step_ms", "peak_mib", "params")
    }
    metrics["partway"] = partway(text, order.get("seconds", 0.0))
    metrics |= dict(
        val_bpb=bpb if status == "ok" else None,
        val_loss=loss if status == "ok" else None,
        artifact_bytes=size,
        wall_s=round(time.time() - order.get("begin", time.time()), 3),
    )
    record = dict(
        schema="forge.run/1",
        key=order["key"],
        exp=order["exp"],
        attempt=attempt,
        env=order["env"],
        rung=order["rung"],
        seed=order["seed"],
        code=dict(sha256=parsed["code_sha256"] or file_digest(script)),
        data={k: parsed[k] for k in ("manifest", "val_tokens", "val_bytes", "tokenizer_sha256")},
        host=dict(
            **{"class": host_class(parsed)},
            gpu=parsed["gpu"],
            torch=parsed["torch"],
            python=platform.python_version(),
        ),
        budget={k: order[k] for k in ("kill_s", "artifact_bytes")},
        status=status,
        reason=reason,
        metrics=metrics,
        curve=parsed["curve"],
        losses=parsed["losses"][-200:],
        started=started,
        ended=now(),
        worker=f"pid {os.getpid()}",
        log_sha256=file_digest(out) if out.exists() else None,
        exit_code=code,
    )
    write_atomic(folder / "metrics.json", json.dumps(without_nan(record), indent=1))
    for heavy in (folder / f"a{attempt}").glob("checkpoint*"):
        heavy.unlink()
    return record


def without_nan(value: Any) -> Any:
    """The same value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Supervision -----------------------------------------------------------------------------------------------------
class Stopped(Exception):
    """This supervisor was asked to end; the attempt does not count."""


def clear_orphans(folder: Path):
    """Kill the process group that a dead supervisor left behind, if it still is the one that it started."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        old = json.loads((folder / "process.json").read_text())
        if identity(old["pid"]) == old["identity"] or any(
            (identity(p) or [None])[0] == old["identity"][0] for p in group_members(old["pid"])
        ):
            kill_group(old["pid"], 1.0)


def limits(order: dict):
    """In the child, before the script starts: no core dumps, bounded files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(order.get("file_gib", 16) * 2**30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def watch(process: subprocess.Popen, out: Path, order: dict, begin: float) -> str:
    """Wait for the end of an attempt; returns why it must be killed, or nothing."""
    changed, seen, offset, stall = time.monotonic(), -1, 0, order.get("stall_s", 300)
    pause = 0.01
    while process.poll() is None:
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)
        size = out.stat().st_size
        if size != seen:
            changed, seen = time.monotonic(), size
            with open(out, "rb") as file:
                file.seek(offset)
                fresh = file.read(1 << 20)
            offset += len(fresh.rpartition(b"\n")[0])
            if re.search(rb"train_loss:(nan|inf)", fresh):
                return "nan in the training loss"
            if size > order.get("log_mib", 64) << 20:
                return f"more than {order.get('log_mib', 64)} MiB of output"
        if time.monotonic() - begin > order["kill_s"]:
            return f"ran longer than {order['kill_s']:g} s"
        if time.monotonic() - changed > stall:
            return f"stalled: no output for {stall:g} s"
        if (out.parent / "prune").exists():
            return "pruned: " + (out.parent / "prune").read_text()[:200]
    return ""


def command(order: dict) -> list[str]:
    """How the script is started: alone, or through torchrun; in a sandbox when ordered."""
    launcher = [sys.executable]
    if order.get("nproc", 1) > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={order['nproc']}",
        ]
    return [*order.get("sandbox", []), *launcher, order["script"]]


def run_attempt(folder: Path, order: dict, attempt: int) -> tuple[int | None, str]:
    """Run the script once in its own session; returns exit code and why it was killed."""
    out = folder / f"a{attempt}.out"
    env = clean_environment(
        located(order["env"], Path(order["script"]))
        | dict(RUNS_DIR=str(folder), RUN_ID=f"a{attempt}", SEED=str(order["seed"]))
    )
    env |= order.get("device_env", {})
    with open(out, "wb") as file:
        process = subprocess.Popen(
            command(order),
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: limits(order),
        )
    write_atomic(
        folder / "process.json",
        json.dumps(
            dict(
                pid=process.pid,
                identity=identity(process.pid) or ["gone", 0],
                started=now(),
                attempt=attempt,
            )
        ),
    )

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


def supervise(folder: Path) -> dict | None:
    """Bring the run of a folder to its end, whatever happened to it before; returns its record. None when the order
    was withdrawn. Raises ForgeError when another supervisor has it."""
    adopt_orphans()
    with locked(folder / "lock", busy=f"{folder.name} is already being run"):
        done = folder / "metrics.json"
        if done.exists():
            return json.loads(done.read_text())
        order = json.loads((folder / "run.json").read_text())
        clear_orphans(folder)
        attempt = len(list(folder.glob("a*.out")))
        if attempt and re.search(FINAL, (folder / f"a{attempt}.out").read_text("utf-8", "replace")):
            return collect(folder, order, attempt, 0, "", order.get("ordered", now()))
        if attempt >= MAX_ATTEMPTS:
            return collect(folder, order, attempt, None, f"interrupted {attempt} times", now())
        started, order["begin"] = now(), time.time()
        for attempt in range(attempt + 1, MAX_ATTEMPTS + 1):
            code, killed = run_attempt(folder, order, attempt)
            if killed or code not in KILLED_FROM_OUTSIDE:
                break
        return collect(folder, order, attempt, code, killed, started)


class LocalRunner:
    """Starts supervisors of their own on this machine; they outlive the decider and finish what they have."""

    def __init__(self, runs: Path):
        self.runs, self.children = runs, {}

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
        folder, child = self.runs / key, self.children.get(key)
        if child and child.poll() is not None:
            del self.children[key]
        with contextlib.suppress(FileNotFoundError):
            return "done", json.loads((folder / "metrics.json").read_text())
        if child and child.poll() is None:
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
        with contextlib.suppress(OSError, json.JSONDecodeError):
            order = json.loads((self.runs / key / "run.json").read_text())
            return (
                partway(logs[-1].read_text("utf-8", "replace"), order.get("seconds", 0.0))
                if logs
                else None
            )
        return None

    def prune(self, key: str, reason: str):
        """Ask a run's supervisor to end it."""
        write_atomic(self.runs / key / "prune", reason)

    def stop(self, keys: list[str]):
        """End the supervisors of these runs and what they run."""
        for key in keys:
            child = self.children.get(key)
            if child and child.poll() is None:
                child.terminate()
        for key in keys:
            if key in self.children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.children.pop(key).wait(GRACE + 6)

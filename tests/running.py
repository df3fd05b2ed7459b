"""Runs as processes: small and repeatable knobs, start one, wait until it says something, read what
it left."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, SCRIPT, clean_env, run_script

# Fixed arithmetic and one thread: repeatable bytes, and no waiting for a core that somebody else
# uses.
FAST = dict(PRESET="baseline+tiny", NUMERICS="fp32", ATTENTION="sdpa", DEVICE="cpu", THREADS=1)


def train(
    data: Path, runs: Path, run_id: str, nproc: int = 0, script: Path = SCRIPT, args=(), **knobs
):
    """One run to its end; returns code, out, err and its folder."""
    done = run_script(
        nproc=nproc,
        script=script,
        args=args,
        **FAST | dict(DATA_PATH=data, RUNS_DIR=runs, RUN_ID=run_id) | knobs,
    )
    done.folder = runs / run_id
    return done


def launch(data: Path, runs: Path, run_id: str, **knobs) -> subprocess.Popen:
    """Start a run and return at once."""
    env = clean_env(**FAST | dict(DATA_PATH=data, RUNS_DIR=runs, RUN_ID=run_id) | knobs)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def made_once(factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of several test workers fills and all others use."""
    top = (
        factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else factory.getbasetemp()
    )
    folder, done = top / name, top / f"{name}.done"
    with open(top / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def wait_until(
    process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 120
) -> bool:
    """Poll until the condition holds (True) or the process has ended (False)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    raise AssertionError("nothing happened in time")


def log(folder: Path) -> str:
    """The log so far."""
    path = folder / "log.txt"
    return path.read_text() if path.exists() else ""


def metrics(folder: Path, event: str) -> list[dict]:
    """All metrics of one kind, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == event]


def refused(done, *named: str, lines: int = 1):
    """The run was refused as bad input: exit code 2, only `error:` lines that name these, no
    traceback."""
    assert done.code == 2 and "Traceback" not in done.out + done.err, done.err
    assert [line[:7] for line in done.err.splitlines()] == ["error: "] * lines, done.err
    assert all(name in done.err for name in named), done.err

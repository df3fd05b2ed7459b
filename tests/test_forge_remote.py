"""Shared queue: every key is executed to completion once, whatever dies; a torn record costs itself
only."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forge_lab
import optuna
import pytest
from conftest import ROOT
from forge import ForgeError, remote
from forge.ledger import Ledger
from forge.state import replay

WORKER = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT / "records")!r})
from pathlib import Path
from forge import remote
def run(order, scratch, code, data):
    with open(scratch / "starts", "a") as f: f.write(order["key"] + "\\n")
    time.sleep(0.02)
    with open(scratch / "ends", "a") as f: f.write(order["key"] + "\\n")
    return dict(status="ok", attempt=1, metrics=dict(val_bpb=1.0), key=order["key"]), "log"
remote.work(sys.argv[1], Path(sys.argv[2]), 60, run, every=0.1)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, workers, keys, kills",
    [("file", 6, 120, 5), ("proxy", 2, 120, 5)],
)
def test_every_key_is_executed_once(tmp_path, mode, workers, keys, kills):
    """Acceptance 9."""
    storage = remote.journal(tmp_path / "study.journal")
    target = str(tmp_path / "study.journal")
    if mode == "proxy":
        target = f"localhost:{free_port()}"
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'records')!r})\nfrom pathlib import Path\n"
            "from forge import remote\nimport optuna\noptuna.storages.run_grpc_proxy_server("
            f"remote.journal(Path({str(tmp_path / 'study.journal')!r})), host='localhost', port="
            f"{target.split(':')[1]})"
        )
        server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    decider = remote.QueueRuns(storage, tmp_path / "runs", lease=5.0)
    orders = {
        f"k{i:03d}": dict(key=f"k{i:03d}", code="c", script=__file__, patched=False)
        for i in range(keys)
    }
    for order in orders.values():
        decider.start(order)
        decider.start(order)  # asked twice, queued once
    spawn = lambda: subprocess.Popen(
        [sys.executable, "-c", WORKER, target, str(tmp_path)],  # noqa: E731
        stdout=subprocess.DEVNULL,
    )
    crew, rng, done, killed = [spawn() for _ in range(workers)], random.Random(1), {}, 0
    end = time.monotonic() + 300  # a watchdog
    try:
        while len(done) < keys and time.monotonic() < end:
            for key in orders:
                if key not in done:
                    state, record = decider.poll(key)
                    if state == "done":
                        done[key] = record
                    elif state == "lost":
                        decider.start(orders[key])
            while killed < kills and len(done) > keys * (killed + 1) // (kills + 2):
                victim = rng.randrange(workers)
                os.kill(crew[victim].pid, signal.SIGKILL)
                crew[victim].wait()
                crew[victim], killed = spawn(), killed + 1
            time.sleep(0.05)
        decider.study.set_user_attr("closed", "now")
        assert (
            len(done) == keys
            and killed == kills
            and all(r["status"] == "ok" for r in done.values())
        )
        starts, ends = ((tmp_path / name).read_text("utf-8").split() for name in ("starts", "ends"))
        assert (
            set(ends) == set(orders) and len(starts) <= keys + kills and len(ends) <= keys + kills
        )
        counted = [
            t.user_attrs["key"]
            for t in decider.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        ]
        assert sorted(counted) == sorted(orders), "one counted result per key"
    finally:
        for worker in crew:
            worker.kill()
            worker.wait()
        if mode == "proxy":
            server.kill()
            server.wait()


def test_a_torn_journal_record_costs_itself_only(tmp_path):
    """Acceptance 8 for the queue: cut at every byte of the last record; without the repair Optuna
    cannot read on."""
    path = tmp_path / "study.journal"
    runs = remote.QueueRuns(remote.journal(path), tmp_path)
    for i in range(3):
        runs.start(dict(key=f"k{i}", code="c", script=__file__, patched=False))
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        again = remote.QueueRuns(remote.journal(path), tmp_path)
        again.start(dict(key="next", code="c", script=__file__, patched=False))
        keys = {
            t.user_attrs.get("key")
            for t in remote.QueueRuns(remote.journal(path), tmp_path).study.trials
        }
        assert "next" in keys and {"k0", "k1"} <= keys


def test_a_lost_worker_is_noticed_by_its_heart_and_given_up_in_the_end(tmp_path):
    runs = remote.QueueRuns(remote.journal(tmp_path / "study.journal"), tmp_path, lease=0.05)
    order = dict(key="k", code="c", script=__file__, patched=False)
    for attempt in range(remote.RETRIES + 1):
        runs.start(order)
        trial = runs.study.ask()
        trial.set_user_attr("beat", 1)
        assert runs.poll("k")[0] == "running"
        time.sleep(0.08)
        trial.set_user_attr("beat", 2)
        assert runs.poll("k")[0] == "running", (
            "a beating heart is no lost worker, however long it takes"
        )
        time.sleep(0.08)
        status, record = runs.poll("k")
        assert status == ("lost" if attempt < remote.RETRIES else "done")
        with pytest.raises((optuna.exceptions.UpdateFinishedTrialError, ValueError)):
            runs.study.tell(trial, 0.0)  # a late finisher is refused
    assert record["status"] == "interrupted"


@pytest.mark.slow
def test_a_campaign_is_served_to_workers_on_other_machines(tmp_path):
    """Head and worker as processes that share nothing but a port."""
    c = forge_lab.real(tmp_path, budget=dict(experiments=2), loop=dict(confirm="end", workers=2))
    port = free_port()
    head = subprocess.Popen(
        [*forge_lab.FORGE, "serve", str(c.folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "serving" in head.stdout.readline()
    done = forge_lab.forge(
        "worker", "--connect", f"localhost:{port}", "--scratch", tmp_path / "pod", "--idle", "40"
    )
    out, _ = head.communicate(timeout=60)
    assert head.returncode == 0 and done.returncode == 0, out + done.stdout + done.stderr
    state = replay(Ledger(c.folder / "events.jsonl").read())
    assert len(state.searches()) == 2 and all(
        r.record["status"] == "ok" for r in state.runs.values()
    )
    for key in state.runs:
        record = json.loads((c.folder / "runs" / key / "metrics.json").read_text("utf-8"))
        assert (
            record["worker"].startswith(socket.gethostname())
            and (tmp_path / "pod" / "runs" / key).exists()
        )
    assert forge_lab.forge("verify", c.folder).returncode == 0


@pytest.mark.slow
def test_workers_are_started_as_jobs(tmp_path, monkeypatch):
    """Through submitit's own executor of local processes, in Slurm's place."""
    monkeypatch.chdir(tmp_path)
    c = forge_lab.real(tmp_path, budget=dict(experiments=2), loop=dict(confirm="end", workers=2))
    port = free_port()
    head = subprocess.Popen(
        [*forge_lab.FORGE, "serve", str(c.folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "serving" in head.stdout.readline()
    jobs = remote.start_on_slurm(f"localhost:{port}", "main", 2, cluster="local")
    out, _ = head.communicate(timeout=120)
    for job in jobs:
        job.result()  # raises when the worker failed
    state = replay(Ledger(c.folder / "events.jsonl").read())
    assert head.returncode == 0 and len(state.searches()) == 2, out
    assert {run.record["status"] for run in state.runs.values()} == {"ok"} and Path(
        "runs/forge-worker-1"
    ).is_dir()


@pytest.mark.skipif(bool(shutil.which("srun")), reason="there is a Slurm here")
def test_without_a_slurm_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForgeError, match="--slurm gpu: .*slurm"):
        remote.start_on_slurm("x:1", "gpu", 1)


def test_nobody_there_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(ForgeError, match="neither HOST:PORT nor a journal"):
        remote.connect(str(tmp_path / "nothing"))
    with pytest.raises(ForgeError, match="submitit"):
        monkeypatch.setitem(sys.modules, "submitit", None)
        remote.start_on_slurm("x:1", "gpu", 1)

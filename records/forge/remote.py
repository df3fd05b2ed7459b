"""Many machines on an existing engine: Optuna's journal storage behind its gRPC proxy, and workers
that pull.

The decider is the only one that queues a run; workers take queued trials, run them, and hand the
record back with the log. The ledger stays the truth: the journal is a queue that may be thrown
away. What Optuna lacks is added here: an append that survives a torn last line, a lock that dies
with its owner, and a heartbeat by which the decider notices dead workers on any storage. The proxy
has no authentication: it listens on localhost; reach it through SSH.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from . import ForgeError, runner
from .ledger import now, write_atomic

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings(
    "ignore", category=optuna.exceptions.ExperimentalWarning
)  # the proxy, since Optuna 4.2
STUDY = "forge-queue"
RETRIES = 2
LOG_BYTES = 1 << 20
WAITING = (TrialState.WAITING,)
RUNNING = (TrialState.WAITING, TrialState.RUNNING)


class DyingLock:
    """A file lock that the kernel frees when its owner dies. Same calls as Optuna's own."""

    def __init__(self, path: str):
        self.path = path + ".flock"
        self.handle = -1

    def acquire(self) -> bool:
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        return True

    def release(self):
        os.close(self.handle)


class TornSafe(JournalFileBackend):
    """A journal whose append first cuts off what a crash left behind the last newline; without
    that, one torn record makes the file unreadable for everybody."""

    def __init__(self, path: Path):
        super().__init__(str(path), DyingLock(str(path)))
        self.path = path
        self.guard = threading.Lock()

    def append_logs(self, logs: list[dict[str, Any]]):
        blob = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        lock = DyingLock(str(self.path))
        with self.guard:
            lock.acquire()
            try:
                with open(self.path, "rb+") as file:
                    size = file.seek(0, os.SEEK_END)
                    while size:
                        file.seek(max(0, size - 65536))
                        block = file.read(min(size, 65536))
                        cut = block.rfind(b"\n")
                        if cut >= 0:
                            size = size - len(block) + cut + 1
                            break
                        size -= len(block)
                    file.truncate(size)
                    file.seek(size)
                    file.write(blob)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                lock.release()


def journal(path: Path) -> optuna.storages.JournalStorage:
    """The queue's storage in a file."""
    path.touch()
    return optuna.storages.JournalStorage(TornSafe(path))


def connect(target: str):
    """The storage that "host:port" or the path of a journal means. Raises ForgeError."""
    host, _, port = target.rpartition(":")
    if host and port.isdigit():
        try:
            proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
            proxy.wait_server_ready(timeout=20)
        except ImportError:
            raise ForgeError(
                "workers need grpcio and protobuf: see the extras of requirements.txt"
            ) from None
        except TimeoutError:
            raise ForgeError(
                f"{target}: nobody serves there; start `forge.py serve` and tunnel its port"
            ) from None
        return proxy
    if not Path(target).exists():
        raise ForgeError(f"{target}: neither HOST:PORT nor a journal")
    return journal(Path(target))


def queue(storage) -> optuna.Study:
    """The queue's study."""
    return optuna.create_study(
        storage=storage,
        study_name=STUDY,
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
    )


class QueueRuns:
    """Starts runs by queueing them and polls what workers handed back; the decider's side, see
    runner.LocalRunner."""

    owns_devices = False  # each worker chooses among those of its machine

    def __init__(self, storage, runs: Path, lease: float = 300.0):
        self.study = queue(storage)
        self.folder = runs
        self.lease = lease
        self.seen: dict[int, tuple] = {}  # trial -> its last heartbeat and when it was seen

    def trials(self, key: str) -> list:
        """Every attempt of a key, oldest first."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("key") == key]

    def start(self, order: dict):
        """Queue an order unless it is queued or being run."""
        if any(
            t.state in RUNNING or t.state == TrialState.COMPLETE for t in self.trials(order["key"])
        ):
            return
        name = "code:" + order["code"]
        if name not in self.study.user_attrs:
            self.study.set_user_attr(name, Path(order["script"]).read_text("utf-8"))
        self.study.enqueue_trial({}, user_attrs=dict(key=order["key"], order=json.dumps(order)))

    def poll(self, key: str) -> tuple[str, dict | None]:
        """As LocalRunner.poll. A worker whose heartbeat stands still for `lease` seconds of this
        machine's clock is given up; after RETRIES repeats the run is over."""
        trials = self.trials(key)
        done = next((t for t in trials if t.state == TrialState.COMPLETE), None)
        if done:
            return "done", self.keep(key, done)
        for t in trials:
            if t.state == TrialState.RUNNING:
                beat, since = self.seen.get(t.number, (None, time.monotonic()))
                if t.user_attrs.get("beat") != beat:
                    since = time.monotonic()
                self.seen[t.number] = t.user_attrs.get("beat"), since
                if time.monotonic() - since > self.lease:
                    with contextlib.suppress(
                        optuna.exceptions.UpdateFinishedTrialError, ValueError
                    ):
                        self.study.tell(t.number, state=TrialState.FAIL)
        trials = self.trials(key)
        if any(t.state in RUNNING for t in trials):
            return "running", None
        if len(trials) > RETRIES:
            return "done", dict(
                status="interrupted",
                reason=f"{len(trials)} workers were lost",
                attempt=len(trials),
                metrics={},
                host={"class": ""},
                data={},
                exit_code=None,
                log_sha256=None,
            )
        return "lost", None

    def keep(self, key: str, trial) -> dict:
        """Put what a worker handed back into the run's folder here; returns the record."""
        folder = self.folder / key
        record = json.loads(trial.user_attrs["record"])
        if not (folder / "metrics.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"a{record['attempt']}.out", trial.user_attrs.get("log", ""))
            write_atomic(folder / "metrics.json", json.dumps(record, indent=1))
        return record

    def partway(self, key: str) -> None:
        """Logs arrive with the result: runs elsewhere are never cut short."""

    def stop(self, keys: list[str]):
        """Nothing to end here: workers finish what they have, and it is taken in next time."""


def serve(c, port: int, hours: float, publish: Callable):
    """Decide for workers elsewhere: open the proxy on localhost and tick until the campaign
    stops."""
    storage = journal(c.folder / "study.journal")
    try:
        from optuna.storages import run_grpc_proxy_server
    except ImportError:
        raise ForgeError(
            "serve needs grpcio and protobuf: see the extras of requirements.txt"
        ) from None
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("localhost", port)) == 0:
            raise ForgeError(f"port {port} is in use; choose another with --port")
    threading.Thread(
        target=run_grpc_proxy_server,
        args=(storage,),
        kwargs=dict(host="localhost", port=port),
        daemon=True,
    ).start()
    c.runs = QueueRuns(storage, c.folder / "runs", c.config["loop"]["lease_s"])
    c.runs.study.set_user_attr("closed", "")
    print(
        f"serving on localhost:{port}; on each machine: forge.py worker --connect HOST:{port}",
        flush=True,
    )
    try:
        c.loop(hours * 3600, lambda: publish(c))
    finally:
        c.runs.study.set_user_attr("closed", now())
        publish(c)
    print(f"stopped: {c.state.stopped or 'time is over'}")


def heartbeat(study: optuna.Study, trial_id: int, over: threading.Event, every: float):
    """Count up until the run is over, so that the decider sees this worker alive."""
    beat = 0
    while not over.is_set():
        beat += 1
        with contextlib.suppress(
            Exception
        ):  # a lost connection is not the run's fault; the lease decides
            study._storage.set_trial_user_attr(trial_id, "beat", beat)
        over.wait(every)


def execute(order: dict, scratch: Path, code: str, data: Path | None) -> tuple[dict, str]:
    """Run an order of another machine in a folder of this one, on devices of this one; returns
    record and log."""
    place = scratch / "code" / order["code"]
    place.mkdir(parents=True, exist_ok=True)
    script = place / "train_gpt.py"
    if not script.exists():
        write_atomic(script, code)
    if data and not (place / "data").exists():
        with contextlib.suppress(FileExistsError):
            (place / "data").symlink_to(data)
    folder = scratch / "runs" / order["key"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "run.json", json.dumps(order | dict(script=str(script))))
    record = runner.supervise(folder)
    out = folder / f"a{record['attempt']}.out"
    log = out.read_text("utf-8", "replace")[-LOG_BYTES:] if out.exists() else ""
    return record, log


def work(target: str, scratch: Path, idle: float, run: Callable = execute, every: float = 30.0):
    """Pull and run until the queue is closed, its head is gone, or it is empty for `idle`
    seconds."""
    try:
        pull(queue(connect(target)), scratch.resolve(), idle, run, min(every, idle / 4))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "grpc":
            raise
        print(f"{target}: the head is gone", flush=True)


def pull(study: optuna.Study, scratch: Path, idle: float, run: Callable, every: float):
    """Take queued runs one by one."""
    data = Path(__file__).resolve().parents[2] / "data"
    scratch.mkdir(parents=True, exist_ok=True)
    quiet = time.monotonic()
    while time.monotonic() - quiet < idle:
        if not study.get_trials(deepcopy=False, states=WAITING):
            if study.user_attrs.get("closed"):
                break
            time.sleep(min(0.2, every))
            continue
        trial = study.ask()
        if "order" in trial.user_attrs:
            run_trial(study, trial, scratch, data, run, every)
            quiet = time.monotonic()
        else:  # another worker was faster and Optuna made up an empty trial
            study.tell(trial, state=TrialState.FAIL)


def run_trial(study: optuna.Study, trial, scratch: Path, data: Path, run: Callable, every: float):
    """Run one queued order and hand its record and log back."""
    order = json.loads(trial.user_attrs["order"])
    over = threading.Event()
    beat = (study, trial._trial_id, over, every)
    beating = threading.Thread(target=heartbeat, args=beat, daemon=True)
    beating.start()
    try:
        record, log = run(order, scratch, study.user_attrs["code:" + order["code"]], data)
        record["worker"] = f"{socket.gethostname()}:{os.getpid()}"
        trial.set_user_attr("record", json.dumps(record))
        trial.set_user_attr("log", log)
        study.tell(trial, 0.0)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
        print(f"{order['key']}: given up by the decider meanwhile ({error})", flush=True)
    except ForgeError as error:
        print(f"{order['key']}: {error}", flush=True)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
            study.tell(trial, state=TrialState.FAIL)
    finally:
        over.set()
        beating.join()


def start_on_slurm(target: str, partition: str, count: int, cluster: str = "slurm"):
    """Start workers through Slurm; leases make its preemption harmless. Another `cluster` of
    submitit is for tests."""
    try:
        import submitit
    except ImportError:
        raise ForgeError("--slurm needs submitit: pip install submitit") from None
    try:
        executor = submitit.AutoExecutor(folder="runs/slurm", cluster=cluster)
        executor.update_parameters(
            slurm_partition=partition, timeout_min=24 * 60, gpus_per_node=1, name="forge-worker"
        )
        worker = submitit.helpers.CommandFunction(
            [
                sys.executable,
                str(Path(__file__).with_name("forge.py")),
                "worker",
                "--connect",
                target,
                "--idle",
                "600",
            ]
        )
        jobs = [
            executor.submit(worker, "--scratch", f"runs/forge-worker-{i}") for i in range(count)
        ]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise ForgeError(f"--slurm {partition}: {str(error).strip().splitlines()[-1]}") from None
    print("started " + ", ".join(job.job_id for job in jobs))
    return jobs

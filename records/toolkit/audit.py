"""Execute a record's own code, in fresh processes without a network, and compare what it does with
what it says.

Unlike `check` this runs the folder: its launch.sh on the text in smoke/, in a copy that lies alone
in an empty place; then the artifact once more in a second process beside nothing but the script;
then, where the artifacts and the text of the record are at hand, the claimed scores. The probes of
a script of another make are in adapter.py. A folder of a stranger wants a machine that may be lost.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from facts.files import sha256_of, write_atomic
from facts.folder import Folder, read_folder
from facts.limits import ARTIFACT_BYTES
from facts.logs import Log, read_log

from .readme import refreshed
from .snapshot import OF_ONE_RUN

SECONDS = 600  # of one process; the whole audit of a shrunk run takes about one minute
HEADER_BYTES = 1024  # of a shard
OFFLINE = Path(__file__).with_name("offline.py")

# What runs in the probing process, and which audit each of its flags decides. A token takes every
# value in a model of the same knobs with few tokens: with the thousand of the artifact it would
# take an hour where weights learn.
PROBE = """import json, sys
sys.path[:0] = ["records", "."]
from toolkit import probes
ours = dict(DEVICE="cpu", THREADS="1", EVAL_BATCH_TOKENS="128")
found = probes.probe(ours | dict(ARTIFACT="model.golf"), cuts=6, positions=0)
knobs = json.load(open("knobs.json", encoding="utf-8"))
small = probes.probe(knobs | ours, length=72, cuts=1, positions=2)
found |= {name: small[name] for name in ("sum", "target")}
found["flags"] += [name for name in small["flags"] if name in ("sum", "target", "once")]
print(json.dumps(found, default=float))
"""
PROBED = {
    "suffix_swap": (
        ("suffix", "nothing_compared"),
        "losses move by {suffix} nats when later text is replaced",
    ),
    "state_digest": (("states",), "what scored a token is a function of the text before it"),
    "target_swap": (
        ("target", "sum"),
        "probabilities sum to 1 within {sum}; earlier losses move by {target}",
    ),
    "score_once": (("once",), "every target is banked exactly once"),
    "document_order": (("documents",), "documents in another order keep their losses"),
    "uniform_model": (
        ("uniform",),
        "a model without knowledge scores log2(V) per token within {uniform}",
    ),
}


def result(name: str, passed: bool | None, detail: str, **numbers) -> dict[str, Any]:
    """One line of an audit; passed=None: could not be decided."""
    return dict(
        id=name,
        status={True: "pass", False: "fail", None: "unknown"}[passed],
        detail=detail,
        **numbers,
    )


def namespace() -> list[str]:
    """A command prefix that takes the network away; empty where the system refuses."""
    prefix = ["unshare", "--map-root-user", "--net"]
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0:
            return prefix
    return []


def environment(home: Path, **knobs) -> dict[str, str]:
    """Little more than a path: no knobs, proxies, tokens or caches of the caller."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k in ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    }
    return (
        kept
        | dict(
            HOME=str(home),
            XDG_CACHE_HOME=str(home),
            TMPDIR=str(home),
            PYTHONDONTWRITEBYTECODE="1",
            OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
        )
        | {k: str(v) for k, v in knobs.items()}
    )


def execute(
    command: list[str], where: Path, home: Path, isolated: list[str], **knobs
) -> subprocess.CompletedProcess:
    """Run a command in a folder without a network. A process that takes too long counts as failed;
    it ends together with all that it started."""
    process = subprocess.Popen(
        [*isolated, *command],
        cwd=where,
        env=environment(home, **knobs),
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        out, err = "", f"took more than {SECONDS} s"
        process.returncode = 124
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen):
    """End a process that leads its session, and whatever it started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def said(done: subprocess.CompletedProcess) -> str:
    """The last words of a process, fit to print."""
    words = (
        done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    ).splitlines()[-1]
    return "".join(c for c in words if c.isprintable())[:200]


def final(text: str) -> tuple[float, float] | None:
    """(nats per token, bits per byte) of a log's official line."""
    found = re.findall(r"^final:official \S+ val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE)
    return (float(found[-1][0]), float(found[-1][1])) if found else None


def turned(shard: bytes) -> bytes:
    """A shard whose second half comes first."""
    middle = HEADER_BYTES + (len(shard) - HEADER_BYTES) // 4 * 2
    return shard[:HEADER_BYTES] + shard[middle:] + shard[HEADER_BYTES:middle]


class Place:
    """A copy of a record alone in an empty folder, and the processes that run there."""

    def __init__(self, record: Folder, top: Path):
        self.folder, self.home, self.top = (
            top / "alone" / record.path.resolve().name,
            top / "home",
            top,
        )
        self.isolated, self.python = namespace(), [sys.executable]
        self.home.mkdir()
        self.folder.mkdir(parents=True)
        for name in record.files:  # regular files: no links, no pipes
            if not re.match(r"runs/|(.*/)?__pycache__/", name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(record.path / name, self.folder / name)
        if not self.isolated:
            self.python = [sys.executable, str(OFFLINE)]

    def offline(self) -> dict[str, Any]:
        """How the network is kept away."""
        return result(
            "no_network",
            True if self.isolated else None,
            "a network namespace of its own"
            if self.isolated
            else "sockets refused; this system has no namespaces for us",
        )

    def launch(
        self, run_id: str = "first", **knobs
    ) -> tuple[subprocess.CompletedProcess, Path | None]:
        """Run launch.sh +tiny; returns it and the run folder it made."""
        interpreter = self.top / "python"  # launch.sh starts "$PYTHON train_gpt.py"
        interpreter.write_text(
            "#!/bin/sh\nexec " + " ".join(f"'{p}'" for p in self.python) + ' "$@"\n'
        )
        interpreter.chmod(0o755)
        done = execute(
            ["bash", "launch.sh", "+tiny"],
            self.folder,
            self.home,
            self.isolated,
            PYTHON=interpreter,
            DEVICE="cpu",
            THREADS=1,
            RUN_ID=run_id,
            **knobs,
        )
        run = self.folder / "runs" / run_id
        return done, run if (run / "log.txt").is_file() else None

    def text(self, name: str, *splits: str) -> Path:
        """A copy of smoke/ with these splits only. A split `other` is called val and holds other
        text: that of the end of the training shard, or val in another order where its bytes have a
        file."""
        copy, smoke = self.top / name, self.folder / "smoke"
        copy.mkdir()
        for path in smoke.iterdir():
            if not path.name.startswith("fineweb_") or path.name.split("_")[1] in splits:
                shutil.copyfile(path, copy / path.name)
        if "other" not in splits:
            return copy
        val, sidecar = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"
        if (smoke / sidecar).is_file():
            for file in (val, sidecar):
                (copy / file).write_bytes(turned((smoke / file).read_bytes()))
        else:
            old, train = (smoke / val).read_bytes(), smoke / "fineweb_train_000000.bin"
            tail = max(0, len(old) - HEADER_BYTES)
            other = train.read_bytes()
            (copy / val).write_bytes(old[:HEADER_BYTES] + other[len(other) - tail :])
        return copy

    def score(self, artifact: Path, data: Path, **knobs) -> subprocess.CompletedProcess:
        """Score an artifact with nothing beside it but the script, in a fresh process."""
        with tempfile.TemporaryDirectory(dir=self.top) as bare:
            shutil.copyfile(self.folder / "train_gpt.py", Path(bare) / "train_gpt.py")
            shutil.copyfile(artifact, Path(bare) / "model.golf")
            return execute(
                [*self.python, "train_gpt.py"],
                Path(bare),
                self.home,
                self.isolated,
                RUN_MODE="eval",
                ARTIFACT="model.golf",
                DATA_PATH=data,
                THREADS=1,
                **knobs,
            )


def runs_alone(done: subprocess.CompletedProcess, run: Path | None) -> dict[str, Any]:
    ok = done.returncode == 0 and run is not None and final(done.stdout) is not None
    return result(
        "self_contained",
        ok,
        said(done)
        if not ok
        else "launch.sh +tiny trains, exports and scores in an empty folder without a network",
    )


def recount(log: Log, script: Path, artifact: Path) -> dict[str, Any]:
    """What the run counted against what the files weigh."""
    real, logged = script.stat().st_size + artifact.stat().st_size, max(log.total_bytes, default=0)
    return result(
        "artifact_recount",
        real == logged and real <= ARTIFACT_BYTES,
        f"{real:,} bytes of files, {logged:,} logged",
        bytes=real,
    )


def reloads(place: Place, run: Path, first: str) -> list[dict[str, Any]]:
    """The artifact scored again twice, each time in a process of its own that has only the file and
    the validation text."""
    data = place.text("validation", "val")
    again = [place.score(run / "model.golf", data, DEVICE="cpu") for _ in range(2)]
    if failed := [d for d in again if d.returncode or final(d.stdout) is None]:
        return [result("reload", False, said(failed[0]))]
    scores = [final(first), *(final(d.stdout) for d in again)]
    noise, gap = abs(scores[1][1] - scores[2][1]), abs(scores[0][1] - scores[1][1])
    return [
        result(
            "repeatable",
            noise <= 1e-8,
            f"{noise:.1e} bits per byte between two scorings",
            max_abs_diff=noise,
        ),
        result(
            "reload",
            gap <= max(1e-8, noise),
            f"{scores[1][1]:.8f} in a second process without training text, "
            f"{scores[0][1]:.8f} by the run",
            max_abs_diff=gap,
        ),
    ]


def val_text_unused(place: Place, run: Path) -> dict[str, Any]:
    """Whether training, calibration and export make the same artifact beside another validation
    text."""

    def artifact(run_id: str, **knobs) -> bytes:
        made = place.launch(run_id, **knobs)[1]
        return (
            (made / "model.golf").read_bytes() if made and (made / "model.golf").is_file() else b""
        )

    first, other = (
        (run / "model.golf").read_bytes(),
        artifact("other", DATA_PATH=place.text("other", "train", "other")),
    )
    if first == other:
        return result("val_text_unused", True, "the same artifact beside another validation text")
    if artifact("again") != first:  # then a difference says nothing
        return result("val_text_unused", None, "two equal runs make different artifacts")
    return result(
        "val_text_unused",
        False,
        "another artifact beside another validation text"
        if other
        else "no artifact beside another validation text",
    )


def claimed(
    place: Place, submission: dict[str, Any], data: Path | None, runs: list[Path]
) -> Iterator[dict[str, Any]]:
    """Size and score of each artifact against its claim: of those in the record, else of those in
    run folders, known by their sha256; scores need the record's own text."""
    elsewhere = {sha256_of(run / "model.golf"): run / "model.golf" for run in runs}
    for seed, r in submission.get("seed_results", {}).items():
        kept, other = r.get("artifact"), elsewhere.pop(r.get("artifact_sha256"), None)
        artifact = place.folder / kept if kept else other
        if artifact is None or not artifact.is_file():
            continue
        yield recount(
            read_log(place.folder / r["log"]), place.folder / "train_gpt.py", artifact
        ) | dict(seed=seed)
        if data:
            done = place.score(artifact, data.resolve())
            score = final(done.stdout) if done.returncode == 0 else None
            gap = abs(score[1] - r["val_bpb"]) if score else None
            yield result(
                "claimed_score",
                gap is not None and gap <= 1e-4,
                said(done) if score is None else f"{score[1]:.8f} now, {r['val_bpb']:.8f} claimed",
                seed=seed,
                max_abs_diff=gap,
            )
    for path in elsewhere.values():
        yield result(
            "artifact_of_the_record",
            False,
            f"{path.parent.name}/model.golf belongs to no seed of the record",
        )


def probes(place: Place, run: Path) -> list[dict[str, Any]]:
    """Suffix swap, target swap and their kin (probes.py, text_probes.py) on the record's own script
    and the artifact of `run`, in a process of their own."""
    made = json.loads((run / "config.json").read_text(encoding="utf-8"))
    typed = {
        k.upper(): str(int(v["value"]) if isinstance(v["value"], bool) else v["value"])
        for k, v in made["knobs"].items()
        if v["origin"] == "environment" and k not in OF_ONE_RUN
    }
    bare = place.top / "probed"
    (bare / "records" / "toolkit").mkdir(parents=True)
    for name in ("__init__.py", "probes.py", "text_probes.py"):
        shutil.copyfile(Path(__file__).with_name(name), bare / "records" / "toolkit" / name)
    shutil.copyfile(place.folder / "train_gpt.py", bare / "train_gpt.py")
    shutil.copyfile(run / "model.golf", bare / "model.golf")
    write_atomic(bare / "knobs.json", json.dumps(typed | dict(PRESET=made["preset"])))
    write_atomic(bare / "probe.py", PROBE)
    done = execute([*place.python, "probe.py"], bare, place.home, place.isolated)
    try:
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (ValueError, IndexError):
        found = None
    if found is None:
        return [result("probes", None, said(done))]
    return verdicts(
        found, [name for name in PROBED if name != "document_order" or "documents" in found]
    )


def verdicts(found: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """What the probes found, as lines of an audit."""
    numbers = {
        name: f"{found.get(name, math.nan):.1e}" for name in ("suffix", "target", "sum", "uniform")
    }
    lines = [
        result(
            name, not set(PROBED[name][0]) & set(found["flags"]), PROBED[name][1].format(**numbers)
        )
        for name in names
    ]
    return lines + [
        result(f"{name}_warning", None, "reads what lies ahead; not ruled on")
        for name in found["warnings"]
    ]


def audit(folder: Path, data: Path | None = None, runs: list[Path] = ()) -> list[dict[str, Any]]:
    """Every audit of a record folder that `new` made; `data` and `runs` hold its text and its
    artifacts. Raises ValueError when it is none."""
    record = read_folder(folder)
    for name in (
        "train_gpt.py",
        "launch.sh",
        "submission.json",
        "smoke/fineweb_train_000000.bin",
        "smoke/fineweb_val_000000.bin",
    ):
        if name not in record.files:
            raise ValueError(f"{folder}: no {name}; audit runs folders that `new` made")
    if data and not data.is_dir():
        raise ValueError(f"--data {data}: no such folder")
    for run in runs:
        if not (run / "model.golf").is_file():
            raise ValueError(f"--runs {run}: no model.golf")
    with tempfile.TemporaryDirectory(prefix="audit.") as top:
        place = Place(record, Path(top))
        done, run = place.launch()
        found = [place.offline(), runs_alone(done, run)]
        if found[-1]["status"] == "pass":
            found.append(
                recount(
                    read_log(run / "log.txt"), place.folder / "train_gpt.py", run / "model.golf"
                )
            )
            found += reloads(place, run, done.stdout)
            found.append(val_text_unused(place, run))
            found += probes(place, run)
        found += claimed(place, record.submission, data, runs)
    return found


def record_audits(folder: Path, audits: list[dict[str, Any]]):
    """Put results into submission.json, where they decide what is known of compliance, and into the
    README made of it."""
    path = folder / "submission.json"
    submission = json.loads(path.read_text(encoding="utf-8"))
    submission["evidence"]["audits"] = audits
    status = {a["id"]: a["status"] for a in audits}
    for shown, names in dict(
        suffix_swap=("score_first_ttt", "no_slot", "no_etlb"),
        target_swap=("no_ngram_cache",),
        val_text_unused=("no_pre_quant_ttt",),
    ).items():
        known = {"pass": True, "fail": False}.get(status.get(shown))
        submission["compliance"] |= dict.fromkeys(names, known)
    write_atomic(path, json.dumps(submission, indent=1))
    write_atomic(folder / "README.md", refreshed(folder))


def as_text(audits: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{a['status']:8} {a['id']:18} "
        + (f"seed {a['seed']}: " if "seed" in a else "")
        + a["detail"]
        for a in audits
    )

"""Files that survive a crash, run folders, the log's wording, signals, and checkpoints that cannot
be trusted."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPT, official
from running import FAST, launch, log, metrics, refused, train, wait_until

import train_gpt


# ---- files
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "disk full")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for target in (path, tmp_path / "b"):
            with pytest.raises(OSError, match="not written .disk full"):
                train_gpt.write_atomic(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
    train_gpt.write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"new"


def test_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
    code = (
        "import pathlib, signal, os, train_gpt\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_gpt.write_atomic(pathlib.Path('a'), b'n' * 100_000)"
    )
    (tmp_path / "a").write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert any(p.stat().st_size >= 100_000 for p in tmp_path.iterdir()), (
        "the kill came before the writing"
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_core_count_respects_the_affinity_mask_and_the_quota(monkeypatch):
    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "max 100000\n")
    assert train_gpt.cpu_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert train_gpt.cpu_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    for quota, cores in (
        ("50000 100000", 1),
        ("150000 100000", 1),
        ("100000000 100000", len(allowed)),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota, **how: quota)
        assert train_gpt.cpu_cores() == cores


def test_what_exists_on_one_system_only_is_optional():
    """Finding M18: no resource module, no SIGPIPE, and folders that cannot be opened, as on
    Windows."""
    code = (
        "import os, signal, sys\nsys.modules['resource'] = None\ndel signal.SIGPIPE\n"
        "from pathlib import Path\nimport train_gpt\nopen_file = os.open\n"
        "def refuse_folders(path, *args):\n"
        "    if os.path.isdir(path):\n"
        "        raise PermissionError(13, 'Permission denied', path)\n"
        "    return open_file(path, *args)\n"
        "os.open = refuse_folders\n"
        "train_gpt.write_atomic(Path(sys.argv[1]), b'new')\n"
        "rt = train_gpt.Runtime(train_gpt.load({'PRESET': 'baseline+tiny', 'DEVICE': 'cpu'}), {})\n"
        "print(train_gpt.peak_memory(rt))\nsys.exit(train_gpt.main(['--help'], {}))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        done = subprocess.run(
            [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "reserved: 0 MiB" in done.stdout and "TRAIN_SEQ_LEN" in done.stdout
        assert path.read_bytes() == b"new"


# ---- the process's environment
LAUNCHED = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)


def test_half_of_a_torchrun_environment_is_refused_by_name():
    """Finding M16: tracebacks, the last of them after the run folder existed."""
    place, wrong = train_gpt.place_of, []
    assert place({}) == (0, 1, 0, 1) == place({"MASTER_ADDR": "host", "MASTER_PORT": "1"})
    whole = {name: str(value) for name, value in LAUNCHED.items()}
    assert place(whole | {"LOCAL_WORLD_SIZE": "1"}) == (0, 2, 0, 1)
    cases = [({name: whole[name]}, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    cases += [
        ({k: v for k, v in whole.items() if k != name}, f"{name} not set") for name in LAUNCHED
    ]
    for name, text in (
        ("RANK", "x"),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "1e9"),
    ):
        cases.append((whole | {name: text}, f"{name}={text}"))
    for env, named in cases:
        try:
            wrong.append((env, place(env)))
        except train_gpt.OneRankFailed as error:
            wrong += [(env, str(error))] * (named not in str(error) or "\n" in str(error))
    assert not wrong


@pytest.mark.slow
def test_a_launch_that_cannot_be_is_one_line_before_any_folder(tmp_path):
    """Finding M16, through the script: RANK alone, WORLD_SIZE alone, a busy MASTER_PORT."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        for env, named in (
            (dict(RANK=0), "RANK=0 WORLD_SIZE not set"),
            (dict(RANK=3), "RANK=3 WORLD_SIZE not set"),
            (dict(WORLD_SIZE=8), "RANK not set WORLD_SIZE=8"),
            (LAUNCHED | dict(MASTER_PORT=port), f"MASTER_PORT={port}"),
        ):
            refused(train(tmp_path, tmp_path / "runs", "a", **env), named)
    assert not list(tmp_path.iterdir())


def run_in(folder: Path, env: dict, files: int = 1024, script: Path = SCRIPT, **knobs):
    """train_gpt.py from another folder, with nothing in its environment but this, and few file
    handles."""
    knobs = {k: str(v) for k, v in (FAST | dict(ITERATIONS=2) | knobs).items()}
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (files, files))
    done = subprocess.run(
        [sys.executable, script],
        env={"PATH": os.environ["PATH"]} | env | knobs,
        cwd=folder,
        capture_output=True,
        preexec_fn=limit,
    )
    return SimpleNamespace(
        code=done.returncode, out=done.stdout.decode("utf-8"), err=done.stderr.decode("utf-8")
    )


@pytest.mark.slow
def test_a_run_works_in_environments_as_people_have_them(toy, tmp_path):
    """Finding M17 and its kind, all at once: C locale without UTF-8 mode, no HOME or user name,
    another working directory, spaces and accents in all paths, as few as 48 file handles."""
    here = tmp_path / "ein schöner Ort"
    shutil.copytree(toy, here / "mes données")
    knobs = dict(DATA_PATH="mes données", RUNS_DIR="läufe hier", RUN_ID="erster Lauf é")
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = run_in(here, locale, files=48, **knobs)
    assert done.code == 0 and done.err == "", done.err
    folder = here / "läufe hier" / "erster Lauf é"
    text = (folder / "log.txt").read_text(encoding="utf-8")
    assert official(text) == official(done.out) and "mes données" in text
    json.loads((folder / "config.json").read_text(encoding="utf-8"))
    again = run_in(here, locale, RUN_MODE="eval", ARTIFACT=folder / "model.golf", **knobs)
    assert again.code == 0 and official(again.out) == official(done.out), again.err
    refused(
        run_in(here, locale, **knobs | dict(DATA_PATH="données", RUN_ID="b")), "DATA_PATH=données"
    )
    helped = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=locale, capture_output=True, check=True
    )
    assert "·" in helped.stdout.decode("utf-8")


@pytest.mark.slow
def test_what_cannot_be_opened_is_one_line_and_leaves_no_folder(toy, tmp_path):
    """Too few file handles for the shards; a code folder in which the sample cannot be built."""
    many = shutil.copytree(toy, tmp_path / "many")
    for i in range(2, 60):
        (many / f"fineweb_train_{i:06d}.bin").symlink_to(toy / "fineweb_train_000001.bin")
    knobs = dict(RUNS_DIR=tmp_path / "runs", RUN_ID="a")
    done = run_in(tmp_path, {}, files=48, DATA_PATH=many, **knobs)
    assert done.code == 2 and re.fullmatch("error: .*: Too many open files\n", done.err)
    code = tmp_path / "code"
    shutil.copytree(
        ROOT / "data", code / "data", ignore=shutil.ignore_patterns("datasets", "__pycache__")
    )
    shutil.copy(SCRIPT, code)
    (code / "data" / "datasets").write_text("as good as a read-only folder")
    refused(run_in(tmp_path, {}, script=code / SCRIPT.name, **knobs), "DATA_PATH")
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk here")
def test_a_full_disk_or_a_closed_pipe_ends_no_log(tmp_path):
    """Finding M13: the warning of a full disk was written to the full disk."""
    code = (
        "import sys, train_gpt\n"
        "rt = train_gpt.Runtime(train_gpt.load({'PRESET': 'baseline+tiny', 'DEVICE': 'cpu'}), {})\n"
        "rt.folder = train_gpt.Path(sys.argv[1])\n"
        "for i in range(2000):\n    rt.log(f'line {i}')\n    rt.metric('train', step=i)\n"
        "sys.stderr.write('reached the end')\n"
    )
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    for out in (open("/dev/full", "w"), open(tmp_path / "out", "w"), subprocess.PIPE):
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
        if out is subprocess.PIPE:
            process.stdout.close()  # as `| head` does
        assert process.stderr.read() == "reached the end" and process.wait() == 0
    said = (tmp_path / "out").read_text()
    assert "line 1999" in said and said.count("warning: ") == 1, "the terminal says the rest"


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_named_and_the_checkpoint_stays_usable(toy, tmp_path):
    """Finding M19: a limit of file size while exporting ended in `error: .: File too large`; M14:
    the hint works when pasted. While training, the same limit only costs the checkpoint."""
    script = tmp_path / "limited.py"
    script.write_text(
        f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
        "export = train_gpt.export\n"
        "def limited(trainer):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))\n"
        "    trainer.save()\n    return export(trainer)\n"
        "train_gpt.export = limited\n"
        "sys.exit(train_gpt.main(sys.argv[1:], train_gpt.environment()))\n"
    )
    done = train(toy, tmp_path / "my runs", "a", script=script, LN_SCALE=1)
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert re.search(r"^error: .*model\.golf: not written \(File too large\); ", done.err)
    assert "warning: checkpoint not written (File too large)" in done.out
    assert not list(done.folder.glob("*.tmp"))
    command = done.err.split("continue with: ")[1].strip().replace(str(script), str(SCRIPT))
    pasted = subprocess.run(
        command.replace("python", sys.executable, 1),
        shell=True,
        env={"PATH": os.environ["PATH"]},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert pasted.returncode == 0 and "resumed:step 8 " in pasted.stdout, pasted.stderr
    assert official(pasted.stdout) and "LN_SCALE=1" in command


# ---- the run folder
@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """One finished run with its output."""
    done = train(toy, tmp_path_factory.mktemp("runs"), "a", VAL_LOSS_EVERY=3, CHECKPOINT_EVERY=60)
    assert done.code == 0, done.err
    return done


def lines(done, pattern: str) -> list[tuple[str, ...]]:
    """Groups of all whole lines of the log that match."""
    return [
        m.groups() for line in log(done.folder).splitlines() if (m := re.fullmatch(pattern, line))
    ]


def only(done, pattern: str) -> tuple[str, ...]:
    """Groups of the only line of the log that matches."""
    found = lines(done, pattern)
    assert len(found) == 1, f"{len(found)} lines match {pattern}"
    return found[0]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_run_folder_holds_what_it_promises(finished):
    folder = finished.folder
    assert {p.name for p in folder.iterdir()} == {
        "log.txt",
        "metrics.jsonl",
        "config.json",
        "model.golf",
        "checkpoint.pt",
        "doc_loss.npy",
        "submission",
    }
    assert log(folder).splitlines()[0].startswith("audit:code sha256:")
    assert log(folder).splitlines()[1].startswith(f"audit:source sha256:{sha256(SCRIPT)} ")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["preset"] == "baseline+tiny" and set(stored["knobs"]) == set(train_gpt.KNOBS)
    want = dict(
        seed=(1337, "default"),
        iterations=(8, "tiny"),
        scale_floor=(1.0, "baseline"),
        val_loss_every=(3, "environment"),
        numerics=("fp32", "environment"),
    )
    assert {n: (stored["knobs"][n]["value"], stored["knobs"][n]["origin"]) for n in want} == want


def test_metrics_are_json_lines_in_order(finished):
    records = [
        json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()
    ]
    times = [r["t"] for r in records]
    assert times == sorted(times) and times[-1] > times[0] >= 0
    assert [r["step"] for r in records if r["event"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["event"] == "val"] == [3, 6, 8]
    assert records[-1]["event"] == "final" and f"val_bpb:{records[-1]['bpb']:.8f} " in official(
        finished.out
    )
    assert records[-1]["model_bytes"] == (finished.folder / "model.golf").stat().st_size
    logged = dict(lines(finished, r"step:(\d+)/8 train_loss:(\S+) .*"))
    assert logged == {str(r["step"]): f"{r['loss']:.4f}" for r in records if r["event"] == "train"}


def test_log_has_the_training_lines_of_the_competition(finished):
    number, ms = r"\d+\.\d{4}", r"(\d+)ms step_avg:(\d+\.\d{2})ms"
    trained = lines(finished, rf"step:(\d+)/8 train_loss:{number} train_time:{ms}(?: .*)?")
    assert [int(step) for step, _, _ in trained] == list(range(1, 9))
    assert all(
        float(total) / int(step) == pytest.approx(float(average), abs=1)
        for step, total, average in trained
    )
    assert [
        step
        for step, _, _ in lines(
            finished, rf"step:(\d+)/8 val_loss:{number} val_bpb:{number} train_time:{ms}"
        )
    ] == ["3", "6", "8"]
    assert lines(finished, r"warmup_step:(\d+)/(\d+)") == [("1", "1")]
    assert only(finished, r"seed:(\d+)") == ("1337",)
    assert int(only(finished, r"peak memory allocated: (\d+) MiB reserved: \d+ MiB")[0]) > 50


def test_log_has_the_size_lines_of_the_competition(finished):
    parameters = int(only(finished, r"model_params:(\d+)")[0])
    # embedding, 3 blocks of q k v proj up down, their scales and gains, one skip: by hand
    assert parameters == 1024 * 64 + 3 * (3 * 64 * 64 + 2 * 64 * 128 + 4 * 64 + 2) + 64
    code = (finished.folder / "submission" / "train_gpt.py").stat().st_size
    model = (finished.folder / "model.golf").stat().st_size
    assert int(only(finished, r"Serialized model: (\d+) bytes")[0]) == 4 * parameters
    assert int(only(finished, r"Serialized model int8\+zlib: (\d+) bytes")[0]) == model
    assert int(only(finished, r"Code size: (\d+) bytes")[0]) == code
    assert int(only(finished, r"Total submission size: (\d+) bytes")[0]) == code + model
    assert only(finished, r"audit:artifact sha256:(\w+) bytes:(\d+)") == (
        sha256(finished.folder / "model.golf"),
        str(model),
    )


def test_log_has_the_data_lines_of_the_competition(finished, toy):
    counts = {
        split: sum(f.stat().st_size - 1024 for f in toy.glob(f"fineweb_{split}_*.bin")) // 2
        for split in ("train", "val")
    }
    pattern, tokens = only(finished, r"val_loader:shards pattern=(\S+) tokens:(\d+)")
    assert pattern.endswith("/fineweb_val_*.bin") and int(tokens) == counts["val"] - 1
    assert only(finished, r"train_loader:shards pattern=\S+ files:(\d+) tokens:(\d+) .*") == (
        "2",
        str(counts["train"]),
    )
    assert only(finished, r"audit:data .*tokenizer_sha256:(\w+)") == (
        sha256(toy / "tokenizer.model"),
    )
    python = ".".join(map(str, sys.version_info[:3]))
    assert only(finished, rf"audit:env python:{python} torch:(\S+) .*world_size:1 .*") == (
        torch.__version__,
    )


def test_log_ends_with_one_official_line(finished):
    text = log(finished.folder)
    assert official(text) == official(finished.out) == text.splitlines()[-1]
    loss, bpb = re.fullmatch(
        r"final:official variant:chunked val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8}) "
        r"tokens:\d+ bytes:\d+",
        official(text),
    ).groups()
    assert only(finished, r"final_int8_zlib_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)") == (
        loss,
        bpb,
    )
    short = only(
        finished, r"final_int8_zlib_roundtrip val_loss:(\S+) val_bpb:(\S+) eval_time:\d+ms"
    )
    assert short == (f"{float(loss):.4f}", f"{float(bpb):.4f}")


def test_phases_follow_each_other(finished):
    phases = [
        (name, int(a), int(b))
        for name, a, b in lines(finished, r"phase:(\w+) start_ms:(\d+) end_ms:(\d+)")
    ]
    assert [p[0] for p in phases] == [
        "data",
        "calibrate",
        "prewarm",
        "train",
        "average",
        "inputs",
        "validate",
        "quantise",
        "load",
        "eval",
    ]
    moments = [t for _, begin, end in phases for t in (begin, end)]
    assert moments == sorted(moments)


def test_log_holds_no_absolute_path(finished):
    found = [
        line for line in log(finished.folder).splitlines() if re.search(r"(?<![\w.])/\w", line)
    ]
    assert not found


@pytest.mark.slow
def test_a_used_folder_is_refused_and_a_finished_run_is_left_alone(finished, toy):
    before = log(finished.folder)
    refused(train(toy, finished.folder.parent, "a"), "RUN_ID=a", "RESUME=auto")
    again = train(toy, finished.folder.parent, "a", RESUME="auto")
    assert again.code == 0 and "a is complete" in again.out and again.err == ""
    assert log(finished.folder) == before


@pytest.mark.slow
def test_a_refused_resume_leaves_the_run_as_it_was(finished, toy, tmp_path):
    """Other knobs are named before anything is written, whether the run is complete or not: its
    config.json and log are what records are made of."""
    for name, lines in (("a", None), ("half", 5)):
        run = tmp_path / name
        shutil.copytree(finished.folder, run)
        if lines:
            begun = "".join(log(run).splitlines(keepends=True)[:lines])
            (run / "log.txt").write_text(begun)
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        done = train(toy, tmp_path, name, RESUME="auto", NUM_LAYERS=5)
        refused(done, "RESUME=auto", "NUM_LAYERS: then", "now 5")
        after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        assert after == before


@pytest.mark.slow
def test_a_run_whose_data_is_refused_leaves_no_folder_and_its_name_free(toy, tmp_path):
    refused(train(tmp_path / "none", tmp_path, "a"), "no such folder")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    refused(
        train(toy, tmp_path, "a", TOKENIZER_PATH=tmp_path / "a" / "notes.txt"),
        "not the SentencePiece model",
    )
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_an_unwritable_runs_dir_is_refused(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(train(toy, tmp_path / "file", "a"), "RUNS_DIR=", "cannot write")
    assert (tmp_path / "file").read_text() == "in the way"


# ---- signals
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_a_usable_checkpoint(number, toy, tmp_path):
    process = launch(toy, tmp_path, "a", ITERATIONS=1_000_000, CHECKPOINT_EVERY=0)
    assert wait_until(process, lambda: "\nstep:5/" in log(tmp_path / "a"))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    for part in ("PRESET=baseline+tiny", "RUN_ID=a", "THREADS=1", f"RESUME=auto python {SCRIPT}"):
        assert part in err, "finding M14"
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["state"]
    assert (
        state["step"] == metrics(tmp_path / "a", "train")[-1]["step"] >= 5
        and state["weights"].isfinite().all()
    )
    done = train(toy, tmp_path, "a", RESUME="auto", ITERATIONS=state["step"] + 2)
    assert done.code == 0 and f"resumed:step {state['step']} " in done.out and official(done.out)
    steps = [r["step"] for r in metrics(done.folder, "train")]
    assert steps == list(range(1, state["step"] + 3)), "a step was lost or repeated"


# ---- checkpoints from strangers
class Payload:
    """Unpickled by an ordinary reader, it creates a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


FORMATS = {
    "pickle": lambda value, file: pickle.dump(value, file, protocol=2),
    "torch": torch.save,
    "old torch": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_checkpoint_with_code_is_refused_and_not_executed(write, toy, tmp_path):
    path, trap = tmp_path / "a" / "checkpoint.pt", tmp_path / "executed"
    path.parent.mkdir()
    with open(path, "wb") as file:
        write({"state": Payload(trap)}, file)
    refused(train(toy, tmp_path, "a", RESUME="auto"), "checkpoint.pt: not a readable checkpoint")
    assert not trap.exists()
    with open(path, "rb") as file, contextlib.suppress(pickle.UnpicklingError):
        pickle.load(file) if write is FORMATS["pickle"] else torch.load(file, weights_only=False)
    assert trap.exists(), "the trap is not a trap"


def saved(value) -> bytes:
    """What torch.save writes."""
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


STRANGE = {
    "truncated": lambda own: own[: len(own) // 2],
    "empty": lambda own: b"",
    "another program's": lambda own: saved({"weights": torch.zeros(3)}),
    "a tensor": lambda own: saved(torch.zeros(3)),
    "no numerics": lambda own: saved(
        {k: v for k, v in torch.load(io.BytesIO(own), weights_only=True).items() if k != "numerics"}
    ),
    "other numerics": lambda own: saved(
        torch.load(io.BytesIO(own), weights_only=True) | {"numerics": {"precision": "fp8"}}
    ),
    "another key": lambda own: saved(torch.load(io.BytesIO(own), weights_only=True) | {"x": 1}),
}


@pytest.mark.parametrize("damage", STRANGE.values(), ids=STRANGE)
def test_a_damaged_or_foreign_checkpoint_is_one_clear_error(damage, finished, toy, tmp_path):
    path = tmp_path / "a" / "checkpoint.pt"
    path.parent.mkdir()
    path.write_bytes(damage((finished.folder / "checkpoint.pt").read_bytes()))
    before = path.read_bytes()
    refused(train(toy, tmp_path, "a", RESUME="auto"), "checkpoint.pt")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "knobs",
    [dict(MATRIX_LR=0.01, NUM_LAYERS=2, TRAIN_SEQ_LEN=32), dict(SEED=7)],
    ids=["model and optimiser", "seed"],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(knobs, finished, toy, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "a", ignore=shutil.ignore_patterns("log.txt"))
    refused(train(toy, tmp_path, "a", RESUME="auto", **knobs), *knobs)


def test_a_python_without_the_packages_is_told_what_to_install():
    """The first mistake of a new user: one line, no traceback, in every entry point that needs
    them."""
    for script in ("train_gpt.py", "data/prepare.py", "data/cached_challenge_fineweb.py"):
        done = subprocess.run(
            [sys.executable, "-S", str(ROOT / script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        want = r"error: \w+ is missing: pip install -r requirements.txt\n"
        assert re.fullmatch(want, done.stderr), done.stderr

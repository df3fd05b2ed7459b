"""Files that survive a crash, run folders, the log's wording, signals, and checkpoints that cannot be trusted."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, official
from running import launch, log, metrics, refused, train, wait_until

import train_gpt


# ---- files
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    def half(f):
        f.write(b"ne")
        raise OSError("disk full")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    for target in (path, tmp_path / "b"):
        with pytest.raises(OSError, match="disk full"):
            train_gpt.write_atomic(target, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
    train_gpt.write_atomic(path, lambda f: f.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"new"


def test_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
    code = (
        "import pathlib, signal, os, train_gpt\n"
        "def half(f):\n    f.write(b'n' * 100_000); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_gpt.write_atomic(pathlib.Path('a'), half)"
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
    monkeypatch.setattr(Path, "read_text", lambda self: "max 100000\n")
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
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert train_gpt.cpu_cores() == cores


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


def test_a_used_folder_is_refused_and_a_finished_run_is_left_alone(finished, toy):
    before = log(finished.folder)
    refused(train(toy, finished.folder.parent, "a"), "RUN_ID=a", "RESUME=auto")
    again = train(toy, finished.folder.parent, "a", RESUME="auto")
    assert again.code == 0 and "a is complete" in again.out and again.err == ""
    assert log(finished.folder) == before


def test_a_run_whose_data_is_refused_leaves_no_folder_and_its_name_free(toy, tmp_path):
    refused(train(tmp_path / "none", tmp_path, "a"), "no such folder")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    refused(
        train(toy, tmp_path, "a", TOKENIZER_PATH=tmp_path / "a" / "notes.txt"),
        "not a SentencePiece model",
    )
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_an_unwritable_runs_dir_is_refused(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(train(toy, tmp_path / "file", "a"), "RUNS_DIR=", "cannot write")
    assert (tmp_path / "file").read_text() == "in the way"


# ---- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_a_usable_checkpoint(number, toy, tmp_path):
    process = launch(toy, tmp_path, "a", ITERATIONS=1_000_000, CHECKPOINT_EVERY=0)
    assert wait_until(process, lambda: "\nstep:5/" in log(tmp_path / "a"))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "RESUME=auto" in err and "Traceback" not in err
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

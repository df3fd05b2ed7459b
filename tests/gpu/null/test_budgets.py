"""Every preset runs to its end on the null GPU and stays within the table of budgets.py. The full
size takes minutes: python tests/gpu/null/run.py -m pytest -n 0 -m full_size tests/gpu/null"""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import null_only  # noqa: F401
import pytest
import torch
from budgets import BUDGETS
from conftest import official, run_script, write_shard
from helpers import SYSTEMS, config

import train_gpt as tg

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.gpu
AT_SIZE = 256  # keys; attention by plain products is no fault below


def counted(tmp_path: Path, preset: str, *knobs: str) -> dict:
    """count.py of one step, in a process of its own: what compiles must not be cached."""
    out = tmp_path / "count.json"
    command = [sys.executable, str(HERE / "count.py"), preset, *knobs, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    step = json.loads(out.read_text())
    print(f"{preset} {' '.join(knobs)}: {step['launches']} launches, {step['peak_gib']:.2f} GiB")
    return step


def math_at_size(launches: list[dict]) -> list[str]:
    """Attention that holds all its scores in memory, of rows that are not tiny."""
    names = [row["name"] for row in launches if row["name"].startswith("attention by math")]
    return [name for name in names if int(re.findall(r"\d+", name)[2]) >= AT_SIZE]


def test_the_table_names_every_preset():
    assert list(BUDGETS) == SYSTEMS


# ---- One step ----
@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_tiny_step_keeps_its_budget(system, tmp_path):
    step = counted(tmp_path, f"{system}+tiny", "COMPILE=off")
    assert step["launches"] <= BUDGETS[system].tiny


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_at_full_size_keeps_its_budget(system, tmp_path):
    step, budget = counted(tmp_path, system, "COMPILE=off"), BUDGETS[system]
    assert step["launches"] <= budget.eager and step["peak_gib"] <= budget.eager_gib
    assert not math_at_size(step["kernels"])


@pytest.mark.slow
def test_products_of_a_step_are_those_of_the_model(tmp_path):
    """Counted on the device against the trainer's own formula. The backward of fused attention
    computes the scores again (7 products for 6); the optimiser adds half a percent."""
    step, cfg = counted(tmp_path, "baseline", "COMPILE=off"), config("baseline")
    with torch.device("meta"):
        model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics(), cfg.optim)
    known = tg.flops_per_token(model, tg.plans(cfg.model)[0], cfg.data.train_seq_len)
    known *= cfg.data.train_batch_tokens // 8
    attention = [k for k in step["kernels"] if k["name"].startswith("attention by")]
    again = sum(k["flops"] for k in attention) / 7
    assert known <= step["flops"] - again <= 1.01 * known


@pytest.mark.full_size
@pytest.mark.parametrize("system", [name for name, b in BUDGETS.items() if b.compiled])
def test_a_compiled_step_keeps_its_budget_and_compiles_once(system, tmp_path):
    """count.py itself refuses to compile again after the first step."""
    step, budget = counted(tmp_path, system, "COMPILE=on"), BUDGETS[system]
    assert step["launches"] <= budget.compiled and step["peak_gib"] <= budget.compiled_gib
    assert not math_at_size(step["kernels"])


# ---- Whole runs ----
def whole_run(tmp_path: Path, monkeypatch, **knobs) -> dict:
    """The report of a run that trains, exports, reloads and scores."""
    monkeypatch.setenv("NULL_GPU_REPORT", str(tmp_path / "report.json"))
    done = run_script(
        DEVICE="cuda",
        ALLOW_NONCOMPLIANT=1,
        MAX_WALLCLOCK_SECONDS=0,
        RUNS_DIR=tmp_path,
        RUN_ID="x",
        timeout=1800,
        **knobs,
    )
    assert done.code == 0, done.err[-3000:]
    assert official(done.out)
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_tiny_preset_runs_to_its_end(system, tmp_path, brief, monkeypatch):
    knobs = dict(PRESET=f"{system}+tiny", DATA_PATH=brief, ITERATIONS=4, COMPILE="off")
    made = whole_run(tmp_path, monkeypatch, **knobs)
    assert made["peak_gib"] < 1 and not math_at_size(made["launches"])


@pytest.fixture
def longer(tmp_path, toy):
    """The toy dataset with 6,000 tokens to score, more than the longest row."""
    folder = tmp_path / "longer"
    folder.mkdir()
    for path in toy.iterdir():
        if "_val_" not in path.name:
            (folder / path.name).hardlink_to(path)
    shard = (toy / "fineweb_train_000000.bin").read_bytes()
    write_shard(folder / "fineweb_val_000000.bin", struct.unpack_from("<6000H", shard, 1024))
    return folder


@pytest.mark.full_size
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_preset_of_full_size_runs_to_its_end(system, tmp_path, longer, monkeypatch):
    """On the embedded text, whose vocabulary is the smaller one."""
    seq = config(system).data.train_seq_len
    knobs = dict(PRESET=system, DATA_PATH=longer, VOCAB_SIZE=1024, CASEOPS=0, COMPILE="off")
    knobs |= dict(ITERATIONS=3, WARMUP_STEPS=1, HELD_OUT_TOKENS=seq + 1, CALIBRATION_TOKENS=seq)
    knobs |= dict(EVAL_SEQ_LEN=1024, EVAL_STRIDE=512, TTT_PHASE_DOCS=1, PREQUANT_EPOCHS=1)
    made = whole_run(tmp_path, monkeypatch, **knobs)
    print(f"{system}: peak {made['peak_gib']:.2f} GiB")
    assert made["peak_gib"] < 70 and not math_at_size(made["launches"])

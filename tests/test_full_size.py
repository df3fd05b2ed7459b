"""Every preset at full size: three steps, export, reload and score on two cores, packed script and
model within the budget. Minutes each, so not part of the suite: python -m pytest -n 0 -m full_size
[-k PRESET] -s"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_sample
import pytest
from conftest import ROOT, official, run_script
from helpers import SYSTEMS, config

pytestmark = pytest.mark.full_size
BUDGET = 16_000_000
PREPARE = [sys.executable, str(ROOT / "data" / "prepare.py")]


def shards(folder: Path, vocab: int, caseops: bool) -> Path:
    """The embedded sample in a vocabulary of any size, with a validation text of some thousand
    tokens."""
    documents = build_sample.documents()
    short = min(documents, key=lambda text: abs(len(text) - 24_000))
    texts = [short, *(text for text in documents if text != short)]
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    tokenizer = folder / f"own_{vocab}.model"
    train = ["train-tokenizer", source, "--vocab-size", vocab, "--out", tokenizer, "--val-docs", 1]
    if caseops:
        train.append("--caseops")
    encode = ["encode", source, "--tokenizer", tokenizer, "--out", folder / "shards"]
    for command in (train, encode):
        words = [*PREPARE, *map(str, command), "--val-docs", "1"]
        subprocess.run(words, check=True, capture_output=True)
    return folder / "shards"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_preset_trains_exports_and_fits(system, tmp_path):
    """Finding "Budgets": depth_recurrent ended at 16,386,472 bytes."""
    cfg = config(system)
    seq = cfg.data.train_seq_len
    knobs = dict(
        PRESET=system,
        DATA_PATH=shards(tmp_path, cfg.data.vocab_size, cfg.data.caseops),
        DEVICE="cpu",
        COMPILE="off",
        ALLOW_NONCOMPLIANT=1,
        RUNS_DIR=tmp_path,
        RUN_ID="full",
        ITERATIONS=3,
        TRAIN_BATCH_TOKENS=8192,
        MICRO_BATCH_TOKENS=8192,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        CHECKPOINT_EVERY=0,
        HELD_OUT_TOKENS=seq + 1,
        CALIBRATION_TOKENS=seq,
        EVAL_STRIDE=cfg.eval.eval_seq_len // 2,
        EVAL_BATCH_TOKENS=8192,
        TTT_LORA_DOCS=4,
        PREQUANT_EPOCHS=1,
        PREQUANT_ROWS=2,
    )
    done = run_script(timeout=3600, **knobs)
    print(done.out)
    assert done.code == 0, done.err
    steps = re.findall(r"^step:\d/3 train_loss:", done.out, re.MULTILINE)
    assert len(steps) == 3 and "OVER BUDGET" not in done.out
    submission = tmp_path / "full" / "submission"
    sizes = {path.name: path.stat().st_size for path in submission.iterdir()}
    assert set(sizes) == {"train_gpt.py", "model.golf"} and sum(sizes.values()) <= BUDGET
    assert f"Total submission size: {sum(sizes.values())} bytes" in done.out
    shutil.copytree(submission, tmp_path / "alone")
    scoring = knobs | dict(RUN_MODE="eval", ARTIFACT=tmp_path / "alone" / "model.golf")
    again = run_script(script=tmp_path / "alone" / "train_gpt.py", timeout=3600, **scoring)
    assert again.code == 0 and official(again.out) == official(done.out), again.err

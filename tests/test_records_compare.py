"""Statistics against simulations and published figures, units by hand, and what must be refused."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import RUNS, TEXT_BYTES, TOKENS, Record, changed

sys.path.insert(0, str(ROOT / "records"))
from facts import statistics  # noqa: E402
from toolkit import compare  # noqa: E402

TOOLS = [sys.executable, str(ROOT / "records" / "tools.py")]


@pytest.mark.parametrize(
    "bytes_per_token, bpb",
    [(2.43592, 0.00296), (3.31968, 0.00217), (3.72663, 0.00194), (3.15715, 0.00228)],
)
def test_the_margin_is_worth_less_where_tokens_are_longer(bytes_per_token, bpb):
    assert statistics.margin_in_bpb(0.005, bytes_per_token) == pytest.approx(bpb, abs=5e-6)


@pytest.mark.parametrize("n, gain", [(3, 0.00184), (5, 0.00110), (8, 0.00079)])
def test_smallest_significant_gain_is_the_published_one(n, gain):
    assert statistics.smallest_significant(n, 0.0006) == pytest.approx(gain, abs=5e-6)


@pytest.mark.slow
def test_welch_by_hand_and_its_rate_of_false_alarms():
    base, new, margin = np.array([1.10, 1.12, 1.11]), np.array([1.05, 1.09, 1.04, 1.06]), 0.01
    va, vb = base.var(ddof=1) / 3, new.var(ddof=1) / 4
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    t = (base.mean() - new.mean() - margin) / math.sqrt(va + vb)
    draws = np.random.default_rng(0).standard_t(
        df, 300_000
    )  # the tail by simulation, not by the same library call
    found = statistics.welch(base, new, margin)
    assert found["df"] == pytest.approx(df) and found["p"] == pytest.approx(
        (draws > t).mean(), abs=3e-3
    )
    half = np.quantile(np.abs(draws), 0.95) * math.sqrt(va + vb)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.01)
    rng = np.random.default_rng(1)
    alarms = [
        statistics.welch(rng.normal(margin, 1, 4), rng.normal(0, 1, 4), margin)["p"] < 0.1
        for _ in range(700)
    ]
    assert 0.07 < np.mean(alarms) < 0.13


def test_number_of_seeds_reaches_the_promised_power():
    n = statistics.seeds_needed(0.001, 0.0006, alpha=0.05)
    rng = np.random.default_rng(2)

    def power(n: int) -> float:
        a, b = rng.normal(0.001, 0.0006, (6000, n)), rng.normal(0, 0.0006, (6000, n))
        pooled = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / n)
        critical = np.quantile(rng.standard_t(2 * n - 2, 400_000), 0.95)
        return ((a.mean(1) - b.mean(1)) / pooled > critical).mean()

    assert power(n) > 0.78 and power(n - 1) < 0.82
    assert (
        statistics.seeds_needed(-0.001, 0.0006) is None
        and statistics.seeds_needed(1e-7, 0.1) is None
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(1e-9, 1)), max_size=7))
def test_holm_against_its_definition(p):
    """The smallest level at which the step-down procedure rejects each hypothesis."""
    known = sorted(x for x in p if x is not None)

    def rejected(level: float) -> int:
        for rank, x in enumerate(known):
            if x * (len(known) - rank) > level:
                return rank
        return len(known)

    for x, adjusted in zip(p, statistics.holm(p)):
        if x is None:
            assert adjusted is None
        elif adjusted < 1:
            assert known.index(x) < rejected(adjusted * (1 + 1e-12))
            assert known.index(x) >= rejected(adjusted * (1 - 1e-9))


def documents(rng, n=400, gain=0.02, noise=0.01):
    size = rng.integers(50, 5000, n).astype(np.float32)
    hard = rng.normal(0.8, 0.2, n).clip(0.2)  # documents differ far more than the two models do
    base = np.stack([hard * size, size], 1)
    new = np.stack([(hard - gain + rng.normal(0, noise, n)) * size, size], 1)
    return base, new


def test_document_bootstrap_cancels_what_both_share():
    rng = np.random.default_rng(3)
    base, new = documents(rng)
    found = statistics.document_bootstrap(base, new)
    assert found["gain"] == pytest.approx(
        (base[:, 0].sum() - new[:, 0].sum()) / math.log(2) / base[:, 1].sum()
    )
    # The interval against the delta method of a ratio, worked out here.
    d, w = (base - new)[:, 0] / math.log(2), base[:, 1]
    error = np.std(d - found["gain"] * w, ddof=1) / w.mean() / math.sqrt(len(w))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert found["p"] < 0.001 and statistics.document_bootstrap(base, new, margin=0.04)["p"] > 0.99
    with pytest.raises(ValueError, match="same documents"):
        statistics.document_bootstrap(base, new[:-1])
    with pytest.raises(ValueError, match="same documents"):
        statistics.document_bootstrap(base, new * [1, 2])
    with pytest.raises(ValueError, match="one document"):
        statistics.document_bootstrap(base[:1], new[:1])


def test_document_files_are_checked(tmp_path):
    path = tmp_path / "doc_loss.npy"
    for bad in (
        np.zeros((4, 3), np.float32),
        np.ones((4, 2)),
        np.full((4, 2), np.nan, np.float32),
        np.zeros((4, 2), np.float32),
        np.array([{}, {}], object),
    ):
        np.save(path, bad)
        with pytest.raises(ValueError):
            statistics.read_documents(path)


def group(tmp_path, name: str, gain: float, **what) -> str:
    runs = tuple(
        replace(r, bpb=round(r.bpb - gain * (1 + 0.05 * i), 6))
        for i, r in enumerate(changed(**what))
    )
    return str(Record(runs, name=name).write(tmp_path))


LINE = dict(train_seq_len=2048, train_batch_tokens=786432, num_layers=11, model_dim=512)


def run(*args: str):
    return subprocess.run([*TOOLS, "compare", *args], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_chain_of_records(tmp_path):
    names = [group(tmp_path, f"2026-05-0{i}_Step", 0.003 * i) for i in (1, 2, 3)]
    results = json.loads(run(*names, "--json").stdout)
    assert len(results) == 2
    for r in results:
        assert r["bytes_per_token"] == pytest.approx(TEXT_BYTES / TOKENS, rel=1e-5)
        assert r["gain_nats_per_token"] == pytest.approx(
            r["gain_bpb"] * math.log(2) * TEXT_BYTES / TOKENS, rel=1e-5
        )
        assert r["gain_bpb"] == pytest.approx(0.00315, abs=1e-6) and r["p_margin"] > r["p_any_gain"]
        assert r["p_any_gain_holm"] >= r["p_any_gain"]
    text = "\n".join(compare.as_text(r, True) for r in compare.compare_all(names))
    assert (
        "0.005 nats per token = 0.00194 bits per byte at 3.72670 bytes per token" in text
        and "Holm" in text
    )


def test_pairs_only_within_a_lineage(tmp_path):
    base, new = (
        group(tmp_path, "2026-05-01_A", 0.0, knobs=LINE),
        group(tmp_path, "2026-05-02_B", 0.01, knobs=LINE | dict(matrix_lr=0.03)),
    )
    other = group(tmp_path, "2026-05-03_C", 0.01, knobs=LINE | dict(num_layers=12))
    single = str(Record(RUNS[:1], name="2026-05-04_D").write(tmp_path))
    paired = compare.compare_all([base, new], pair=True)[0]
    gains = 0.01 * np.array([1, 1.05, 1.1])
    assert paired["test"] == "paired_one_sided" and paired["gain_bpb"] == pytest.approx(
        gains.mean(), abs=1e-6
    )
    half = 4.302653 * gains.std(ddof=1) / math.sqrt(3)  # t of 0.975 with two degrees of freedom
    assert (paired["high"] - paired["low"]) / 2 == pytest.approx(half, rel=1e-3)
    for wrong, reason in ((other, "other num_layers"), (single, "other seeds")):
        with pytest.raises(ValueError, match=reason):
            compare.compare_all([base, wrong], pair=True)
    assert compare.compare_all([base, single])[0]["p_any_gain"] is None


@pytest.mark.slow
def test_unknown_lineage_and_other_tokenizers_are_not_paired(tmp_path):
    """Finding R5: what both logs left out counted as equal, and groups of other tokenizers were
    paired."""
    groups = dict(
        base=dict(knobs=LINE),
        silent=dict(),
        short=dict(knobs=LINE | dict(model_dim="")),
        smaller=dict(
            knobs=LINE | dict(vocab_size=1024), tokens=62_021_632, ratio=TEXT_BYTES / 62_021_632
        ),
        recut=dict(knobs=LINE, tokens=TOKENS + 2048, ratio=TEXT_BYTES / (TOKENS + 2048)),
        uncounted=dict(knobs=LINE, count_shown=False),
        shards=dict(knobs=LINE | dict(train_shards=10)),
    )
    made = {
        name: group(tmp_path, f"2026-05-0{i + 1}_{name}", 0.01 * i, **what)
        for i, (name, what) in enumerate(groups.items())
    }
    reasons = dict(
        silent="unknown train_seq_len, unknown train_batch_tokens, unknown num_layers",
        short="other model_dim",
        smaller="other vocabulary, other tokenizer",
        recut="other tokenizer",
        uncounted="unknown tokenizer",
        shards="other data",
    )
    for name, reason in reasons.items():
        done = run(made["base"], made[name], "--paired")
        assert done.returncode == 2 and reason in done.stderr, (name, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    done = run(made["silent"], made["silent"], "--paired")
    assert done.returncode == 2 and "unknown model_dim" in done.stderr
    assert run(made["base"], made["smaller"]).returncode == 0, "unpaired, on the same text"


@pytest.mark.slow
def test_other_texts_are_refused_and_documents_are_used(tmp_path):
    base = group(tmp_path, "2026-05-01_A", 0.0)
    other = group(tmp_path, "2026-05-02_B", 0.0, ratio=TEXT_BYTES / TOKENS * 1.18)
    done = run(base, other)
    assert done.returncode == 2 and "same text" in done.stderr
    new = group(tmp_path, "2026-05-03_C", 0.001)
    for path, array in zip((base, new), documents(np.random.default_rng(4))):
        np.save(f"{path}/doc_loss_seed42.npy", array.astype(np.float32))
    text = compare.as_text(compare.compare_all([base, new])[0])
    assert re.search(
        r"documents +seed 42: \+0\.02\d+ \(.*400 documents\), of these two artifacts", text
    )

"""The planner: work counted by hand, what may never get faster, totals, errors on published runs,
evenness of evaluation lanes."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
from toolkit import lanes, plan, step_time  # noqa: E402
from toolkit.step_time import CARDS, Cluster, Shape, block_matrices, cluster  # noqa: E402

RATES = step_time.PRIOR
EIGHT = cluster("8xH100")


def shape(slots=9, seq=1024, **other) -> Shape:
    """The baseline's, or near it."""
    values = dict(
        dim=512,
        hidden=1024,
        vocab=1024,
        seq=seq,
        batch_tokens=524_288,
        slots=slots,
        matrices=block_matrices(512, 1024, slots),
        keys=seq / 2,
        parameters=17_000_000,
    )
    return Shape(**values | other)


def seconds(s: Shape, on: Cluster = EIGHT) -> float:
    return step_time.step_time(s, on, RATES).seconds


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "records" / "tools.py"), "plan", *words],
        capture_output=True,
        encoding="utf-8",
    )


# Work --------------------------------------------------------------------------------------------
def test_flops_of_a_token_by_hand():
    # One layer of width 4, one KV head of two: q 16, k 8, v 8, out 16, MLP 4x8 twice = 112 weights;
    # a head of 4 x 10; 3 keys on average. Forward and backward are 6 FLOPs a weight and, per key
    # and channel, 4 forward and 8 backward.
    tiny = shape(1, dim=4, hidden=8, vocab=10, keys=3.0, matrices=block_matrices(4, 8, 1))
    assert tiny.weights == 112
    assert tiny.flops_per_token == 6 * (112 + 40) + 12 * 4 * 3


@pytest.mark.parametrize(
    "preset, number, mega", [("baseline", 0, 131), ("score_first_ttt", 1, 426)]
)
def test_flops_of_presets_are_the_published_and_the_scripts(preset, number, mega):
    planned = plan.Planned(plan.configuration([preset]), EIGHT)
    row = planned.cfg.data.train_seq_len
    ours = planned.shape(number)
    theirs = plan.train_gpt.flops_per_token(planned.model, planned.plans[number], row)
    assert ours.flops_per_token == pytest.approx(theirs)
    assert ours.flops_per_token / 1e6 == pytest.approx(mega, abs=0.6)


def test_parts_and_totals_agree():
    step = step_time.step_time(shape(), EIGHT, RATES)
    assert min(step) > 0
    assert step.seconds == pytest.approx(math.fsum(step))
    tokens = 524_288 / 8
    ideal = 3 * 2 * 512 * 1024 * tokens / (989e12 * RATES.matmul)  # the head alone
    assert step.matmul > ideal
    result = plan.Planned(plan.configuration(["baseline"]), EIGHT).result()
    (told,) = result["steps"]
    assert told["total_ms"] == pytest.approx(sum(told["milliseconds"].values()))
    evaluation = result["evaluation"]
    assert evaluation["seconds"] == pytest.approx(sum(p["seconds"] for p in evaluation["phases"]))
    training = result["training"]
    assert training["seconds"] == pytest.approx(600, abs=0.1)
    assert training["steps"] == pytest.approx(600e3 / told["total_ms"], rel=1e-3)
    assert training["tokens"] == training["steps"] * 524_288
    assert told["mfu"] < 1


# What may never get faster -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "more",
    [
        shape(10),
        shape(seq=2048),
        shape(hidden=2048, matrices=block_matrices(512, 2048, 9)),
        shape(vocab=8192),
        shape(batch_tokens=786_432),
        shape(heads=2),
        shape(parameters=30_000_000),
        shape(attention="fa2"),
    ],
)
def test_more_work_is_never_faster(more):
    assert seconds(more) > seconds(shape())


def test_slower_cards_are_never_faster():
    order = [seconds(shape(), cluster(f"8x{name}")) for name in ("H200", "H100", "A100", "4090")]
    assert order == sorted(order)
    wide = cluster("2x8xH100"), cluster("1x16xH100")
    assert seconds(shape(), wide[0]) > seconds(shape(), wide[1])  # a network between
    assert seconds(shape(), EIGHT) < seconds(shape(), cluster("4xH100"))


def test_efficiency_falls_with_cards_and_rises_with_the_batch():
    card, big = CARDS["h100"], shape(11, 2048, batch_tokens=786_432)
    found = [step_time.efficiency(big, card, n, RATES) for n in (8, 16, 64, 512)]
    assert found[0] == pytest.approx(1)
    assert found == sorted(found, reverse=True)
    for n in (16, 64, 512):
        assert step_time.efficiency(big.widened(3), card, n, RATES) > found[-1]


def test_loops_and_the_clock_shape_a_run():
    one = plan.Planned(plan.configuration(["phased_ttt"]), EIGHT)
    before, after = (s["total_ms"] for s in one.steps())
    run = one.training()
    # Loops begin at 35 % of the clock.
    steps = 1e3 * 599.5 * (0.35 / before + 0.65 / after)
    assert run["steps"] == pytest.approx(steps, rel=0.01)
    short = plan.Planned(plan.configuration(["phased_ttt", "ITERATIONS=100"]), EIGHT)
    assert short.training()["steps"] == 100


# Published runs ----------------------------------------------------------------------------------
def test_errors_on_held_out_published_runs():
    found = plan.checked()
    steps = found["training steps, s"]
    assert len(steps["rows"]) >= 40 and steps["families"] >= 8
    assert steps["median"] <= plan.ALLOWED and steps["median_of_families"] <= plan.ALLOWED
    assert not plan.too_wrong(found)
    assert found["peak memory, GiB"]["median"] < 0.05
    assert found["sliding evaluation, s"]["median"] < 0.15
    assert found["test-time training, s"]["median"] < 0.15


def test_held_out_rows_never_see_their_family():
    seen = []
    rows = [("a", 1), ("a", 2), ("b", 3)]
    step_time.held_out(rows, lambda r: r[0], lambda others, row: seen.append((row, others)) or 0.0)
    assert all(row[0] not in {r[0] for r in others} for row, others in seen)


def test_a_median_over_the_bound_fails_the_check():
    bad = {"training steps, s": dict(median=0.01, median_of_families=0.08)}
    assert plan.too_wrong(bad)


def test_presets_come_near_their_published_steps():
    # Naive baseline; PR 1089; PR 1855 before and after loops begin.
    published = {"baseline": [42.9], "turbo_engram": [93.16], "phased_ttt": [96.4, 140.8]}
    for preset, times in published.items():
        told = [s["total_ms"] for s in plan.Planned(plan.configuration([preset]), EIGHT).steps()]
        assert told == pytest.approx(times, rel=plan.ALLOWED)


# Documents and lanes -----------------------------------------------------------------------------
@pytest.mark.parametrize("text", lanes.TEXTS)
def test_document_lengths_are_those_of_the_text(text):
    lengths = lanes.known_lengths(text)
    assert len(lengths) == 50_000 and (np.diff(lengths) >= 0).all()
    assert lengths.sum() == pytest.approx(lanes.TEXTS[text], rel=1e-4)


def test_published_statistics_of_lengths():
    lengths = lanes.known_lengths("sp8192")
    assert np.median(lengths) == pytest.approx(475, rel=0.01)
    assert (lengths > 2048).mean() == pytest.approx(0.064, abs=0.002)
    assert lanes.mean_keys(lengths, 2048) == pytest.approx(625, rel=0.01)


def test_mean_keys_by_counting():
    lengths = np.array([3, 5, 12])
    counted = [i % 4 + 0.5 for n in lengths for i in range(n)]  # rows of 4, half the own key
    assert lanes.mean_keys(lengths, 4) == pytest.approx(np.mean(counted))


@pytest.mark.parametrize("words", [["EVAL=doc"], ["EVAL=doc", "TTT=lora"], ["EVAL=sliding"]])
def test_the_scripts_batches_score_every_target_once_and_lanes_are_never_shorter_than_the_mean(
    words,
):
    cfg = plan.configuration(["baseline+tiny", *words])
    lengths = np.random.default_rng(0).integers(1, 300, 40)
    scored = np.zeros(lengths.sum(), int)
    for part in lanes.rounds(cfg, lengths):
        for batch in part.batches:
            for _, first, count in batch.items.tolist():
                scored[first : first + count] += 1
        for ranks in (1, 2, 3, 8):
            load = lanes.loads(part.batches, lambda b: b.rows * b.width, ranks)
            assert load.critical >= load.mean and load.imbalance >= 1
            assert sum(load.ranks) == sum(b.rows * b.width for b in part.batches)
    assert (scored == 1).all()


def test_a_load_by_hand():
    items = np.zeros((1, 3), int)
    batches = [lanes.train_gpt.Batch(items, 1, w, 1, lane=i) for i, w in enumerate([5, 1, 1])]
    load = lanes.loads(batches, lambda b: float(b.width), 2)
    assert load.ranks == (6.0, 1.0)
    assert load.imbalance == pytest.approx(6 / 3.5)


def test_updates_of_all_weights_are_noted():
    cfg = plan.configuration(["baseline+tiny", "EVAL=sliding", "TTT=sgd", "TTT_EPOCHS=2"])
    parts = list(lanes.rounds(cfg, np.full(10, 300)))
    chunks = -(-3000 // cfg.eval.ttt_chunk_tokens)
    assert len(parts) == chunks
    assert [len(p.updates) for p in parts] == [2] * (chunks - 1) + [0]  # the last teaches nobody


# The command -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, told",
    [
        (["--on", "8xB200"], "unknown card"),
        (["--on", "0xH100"], "--on 0xH100"),
        (["--on", "2x3x4xH100"], "--on 2x3x4xH100"),
        (["nosuch"], "unknown preset"),
        (["NUM_LAYER=3"], "NUM_LAYERS"),
        (["NUM_LAYERS=900"], "NUM_LAYERS=900"),
        (["baseline", "turbo_engram"], "two presets"),
        (["--price", "-1"], "--price"),
        (["--json", "baseline"], "--json"),
        (["--check", "baseline"], "--check"),
    ],
)
def test_bad_input_is_one_line(words, told, capsys):
    import tools

    assert tools.main(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and told in message


def test_the_command_prints_and_writes(tmp_path):
    out = tmp_path / "plan.json"
    done = command("baseline+tiny", "--on", "4090", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "milliseconds" not in done.stdout and "critical / mean" in done.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["on"] == "1x4090" and found["dollars"] > 0

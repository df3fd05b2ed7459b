"""The probes of an evaluation: legal and illegal predictors are told apart, planted defects are
found."""

import functools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import ALONE, SYSTEMS, config, random_model

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))
import tools  # noqa: E402
from toolkit import probes  # noqa: E402

# ---- Toy evaluators over bigram tables: text -> (loss of each token, how often it is scored), as
# rules_and_records.md
V, CHUNK, RNG = 32, 16, np.random.default_rng(0)
TABLES, HINT = RNG.normal(0, 0.7, (2, V, V)), RNG.integers(0, V, V)


def logs(z):
    """Log-softmax over the last axis."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def chunks(x):
    return [(s, min(s + CHUNK, len(x))) for s in range(1, len(x), CHUNK)]


def scored(w, x, s, e, bias=0.0):
    """Losses of tokens s..e under a bigram table."""
    return -logs(w[x[s - 1 : e - 1]] + bias)[np.arange(e - s), x[s:e]]


def trained(w, x, s, e, lr=2.0):
    """One gradient step of the table on tokens s..e."""
    slope = np.exp(logs(w[x[s - 1 : e - 1]]))
    slope[np.arange(e - s), x[s:e]] -= 1
    g = np.zeros_like(w)
    np.add.at(g, x[s - 1 : e - 1], slope)
    return w - lr * g / (e - s)


def by_chunk(
    x,
    before=lambda w, x, s, e: w,
    after=lambda w, x, s, e: w,
    w=TABLES[0],
    bias=lambda x, s, e: 0.0,
):
    """Score chunk by chunk; a table may change before and after each."""
    out = np.zeros(len(x))
    for s, e in chunks(x):
        w = before(w, x, s, e)
        out[s:e] = scored(w, x, s, e, bias(x, s, e))
        w = after(w, x, s, e)
    return out


def each(x, loss):
    """Token by token: loss(t) in nats."""
    return np.array([0.0, *(loss(t) for t in range(1, len(x)))])


def probability(w, x, t):
    return np.exp(logs(w[x[t - 1]]))


def ngram(x):
    counts = np.zeros((V, V, V))

    def loss(t):
        seen = counts[x[t - 2] if t > 1 else 0, x[t - 1]]
        q = probability(TABLES[0], x, t)
        q = q if not seen.sum() else 0.7 * q + 0.3 * seen / seen.sum()
        result = -np.log(q[x[t]])
        seen[x[t]] += 1
        return result

    return each(x, loss)


def tilted(x, wanted):
    """Raise one logit where `wanted(t)` names it."""

    def loss(t):
        z = TABLES[0][x[t - 1]].copy()
        if (hint := wanted(t)) is not None:
            z[hint] += 1
        return -logs(z)[x[t]]

    return each(x, loss)


def slot_bias(x, s, e):
    b = np.zeros(V)
    for _ in range(5):
        g = np.exp(logs(TABLES[0][x[s - 1 : e - 1]] + b)).sum(0) - np.bincount(x[s:e], minlength=V)
        b -= 0.5 * g / (e - s)
    return b


def hash_cache(x):
    n, m = np.zeros(64), np.zeros(64)

    def loss(t):
        h, k = (x[t - 1] * 7919) % 64, (x[t - 1] * 7919 + x[t] * 104729) % 64
        q = probability(TABLES[0], x, t)[x[t]]
        q = q if not m[h] else 0.5 * q + 0.5 * min(n[k], m[h]) / m[h]
        n[k] += 1
        m[h] += 1
        return -np.log(q)

    return each(x, loss)


def two_pass(x):
    n = np.ones((V, V))
    np.add.at(n, (x[:-1], x[1:]), 1)
    return each(
        x,
        lambda t: (
            -np.log(0.5 * probability(TABLES[0], x, t) + 0.5 * n[x[t - 1]] / n[x[t - 1]].sum())[
                x[t]
            ]
        ),
    )


def calibrated(x):
    s = np.percentile(np.abs(TABLES[0][x[:-1]]), 99)
    return by_chunk(x, w=np.clip(np.round(TABLES[0] / s * 7), -8, 7) * s / 7)


def byte_spread(x):
    def loss(t):
        k = 1 + x[t] % 4
        return -k * np.log(0.6 * probability(TABLES[0], x, t)[x[t]] ** (1 / k) + 0.4 / 6)

    return each(x, loss)


def all_chunks(x):
    return functools.reduce(lambda w, c: trained(w, x, *c), chunks(x), TABLES[0])


LEGAL = {
    "fixed": by_chunk,
    "score-first training": lambda x: by_chunk(x, after=trained),
    "normalised n-gram": ngram,
    "tilt by the prefix": lambda x: tilted(x, lambda t: HINT[x[t - 2] if t > 1 else 0]),
    "sliding": lambda x: each(x, lambda t: scored(TABLES[1], x, t, t + 1)[0]),
}
ILLEGAL = {  # with the probe that must find it
    "trained on the text": (lambda x: by_chunk(x, w=all_chunks(x)), "suffix"),
    "adapts, then scores": (lambda x: by_chunk(x, before=trained), "suffix"),
    "bias fitted to what it scores": (lambda x: by_chunk(x, bias=slot_bias), "suffix"),
    "cache keyed by the target": (hash_cache, "sum"),
    "second pass": (two_pass, "suffix"),
    "better of two models": (lambda x: np.minimum(*(by_chunk(x, w=w) for w in TABLES)), "sum"),
    "gate reads the target": (
        lambda x: tilted(x, lambda t: HINT[x[t - 1]] if x[t] % 2 == 0 else None),
        "sum",
    ),
    "gate reads the next": (
        lambda x: tilted(
            x, lambda t: HINT[x[t - 1]] if t + 1 < len(x) and x[t + 1] % 2 == 0 else None
        ),
        "target",
    ),
    "scale calibrated on the text": (calibrated, "suffix"),
    "probability spread over bytes": (byte_spread, "sum"),
    "drops the tail": (by_chunk, "once"),
    "scores twice": (by_chunk, "once"),
}
BORDERLINE = {
    "schedule from future documents": lambda x: by_chunk(
        x, after=lambda w, x, s, e: trained(w, x, s, e, 8.0 / max(1, (x == 1).sum()))
    )
}


class Toy(tg.Fixed):
    """Plays the losses of a toy evaluator through score(), chunk by chunk, as windows that hold all
    before them."""

    def __init__(self, name: str, losses, tokens: np.ndarray):
        self.found = losses(tokens.astype(int))[1:]
        self.drop, self.again = name == "drops the tail", name == "scores twice"

    def rounds(self, borders, ledger):
        n = int(borders[-1])
        items = [[0, s, min(CHUNK, n - s)] for s in range(0, n, CHUNK)]
        items = items[:-1] if self.drop else items
        items = [[0, max(0, s - 4), m + min(s, 4)] for _, s, m in items] if self.again else items
        yield [tg.Batch(np.array([item]), 1, n, CHUNK + 4) for item in items]

    def losses(self, batch, ids, targets, rows):
        _, first, n = batch.items[0]
        return torch.nn.functional.pad(
            torch.tensor(self.found[first : first + n]), (0, CHUNK + 4 - n)
        )[None]


def toy_text() -> np.ndarray:
    x = np.random.default_rng(1).integers(2, V, 201).astype(np.uint16)
    x[::37] = x[-1] = 1
    return x


def toy_audit(name: str, losses) -> dict:
    return probes.audit(
        lambda x: Toy(name, losses, x),
        toy_text(),
        V,
        ALONE,
        cuts=8,
        positions=4,
        tolerance=1e-6,
        digest=probes.no_digest,
    )


@pytest.mark.parametrize("name", LEGAL)
def test_legal_evaluators_pass(name):
    found = toy_audit(name, LEGAL[name])
    assert (
        found["flags"] == found["warnings"] == [] and found["once"] and found["compared"] > 200
    ), found
    assert found["suffix"] < 1e-6 and found["sum"] < 1e-5 and found["chronological"]


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_evaluators_are_flagged(name):
    losses, probe = ILLEGAL[name]
    found = toy_audit(name, losses)
    assert probe in found["flags"], found
    assert probe != "once" or found["refused"], "score() itself refuses"


@pytest.mark.parametrize("name", BORDERLINE)
def test_what_reads_lengths_ahead_is_a_warning(name):
    found = toy_audit(name, BORDERLINE[name])
    assert found["flags"] == [] and found["warnings"] == ["schedule"], found


# ---- The real path ----
FEW = dict(cuts=2, positions=1)


# Learning rates are so high here that what a system learns from its text cannot be missed.
@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs, warned",
    [
        *(
            (
                dict(PRESET=name, TTT_LR=0.05, TTT_LORA_LR=0.01),
                ["schedule", "order"] * (name == "phased_ttt"),
            )
            for name in SYSTEMS
            if config(name).eval.compliant
        ),
        (dict(PRESET="turbo_engram", EVAL="doc", DOC_ATTENTION=1, BOS_ID=5), []),
        (dict(PRESET="turbo_engram", EVAL="chunked", TTT="sgd", TTT_LR=0.05), []),
        (
            dict(PRESET="turbo_engram", EVAL="doc", TTT="lora", SMEAR_GATE="D", TTT_LORA_LR=0.01),
            ["order"],
        ),
    ],
    ids=lambda knobs: " ".join(map(str, knobs.values())) if isinstance(knobs, dict) else "",
)
def test_the_real_path_passes(knobs, warned):
    found = probes.probe({"THREADS": "1"} | {k: str(v) for k, v in knobs.items()}, length=80, **FEW)
    assert found["flags"] == [] and found["compared"] > 20 and found["once"], found
    assert set(found["warnings"]) <= set(warned), found


@pytest.mark.slow
def test_training_on_the_text_before_it_is_scored_is_flagged():
    found = probes.probe(
        dict(PRESET="baseline", TTT="prequant", ALLOW_NONCOMPLIANT="1"), 80, cuts=2, positions=1
    )
    assert {"suffix", "states"} <= set(found["flags"]), found


def planted(edit, kind: str = "sliding", **knobs) -> dict:
    """audit() of a real strategy after `edit` has broken it."""
    cfg = config(
        VOCAB_SIZE=17,
        MODEL_DIM=32,
        EVAL=kind,
        EVAL_SEQ_LEN=16,
        EVAL_STRIDE=4,
        EVAL_BATCH_TOKENS=32,
        **knobs,
    )
    model, tokens = random_model(cfg), probes.probe_text(100, 17)

    def make(x):
        strategy = tg.strategy_of(
            tg.Subject(cfg, ALONE, model, tg.Numerics(), tg.schedule(cfg.model))
        )
        edit(strategy)
        return strategy

    return probes.audit(make, tokens, 17, ALONE, isolated=kind == "doc", **FEW)


def test_an_off_by_one_is_flagged():
    def edit(strategy):
        nll = strategy.nll
        strategy.nll = lambda ids, targets, rows: nll(
            ids, targets, (rows + 1).clamp(max=ids.size(1) - 1)
        )

    assert {"sum"} <= set(planted(edit)["flags"])


def test_a_double_count_is_flagged():
    def edit(strategy):
        batches = strategy.windows.batches
        strategy.rounds = lambda borders, ledger: iter(
            [batches(borders, 32) + batches(borders, 32)[-1:]]
        )

    assert planted(edit)["flags"][0] == "once"


def test_a_leak_across_documents_is_flagged():
    """A window that begins one token before its document lets the last token before BOS through."""

    def edit(strategy):
        batches = strategy.windows.batches
        strategy.rounds = lambda borders, ledger: iter(
            [
                [
                    b._replace(
                        items=b.items
                        - np.stack(
                            [np.minimum(b.items[:, 0], 1), *np.zeros((2, len(b.items)), int)], 1
                        ),
                        width=b.width + 1,
                    )
                    for b in batches(borders, 32)
                ]
            ]
        )

    assert planted(lambda strategy: None, "doc")["flags"] == []
    assert "documents" in planted(edit, "doc")["flags"]


@pytest.mark.slow
def test_the_command_prints_its_findings(capsys):
    assert tools.main(["probes", "PRESET=baseline", "THREADS=1"]) == 0
    assert json.loads(capsys.readouterr().out)["flags"] == []
    assert tools.main(["probes", "TTT=lora"]) == 2 and "TTT=lora" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        tools.main(["probes", "quick"])
    assert ended.value.code == 2 and "NAME=VALUE" in capsys.readouterr().err

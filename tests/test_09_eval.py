"""Scoring: the window rule, the sums, causality and the audit, against brute force and through
whole runs."""

import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch
from conftest import official, run_script
from helpers import config
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Batch, DocumentWindows, Windows, schedule, score

VOCAB = 61
RICH = dict(
    NUM_LAYERS=3,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    SMEAR_GATE="B",
    BIGRAM_BUCKETS=32,
    XSA_LAST_N=2,
    ROPE_DIMS=4,
    LEAKY_SLOPE=0.5,
)


@pytest.fixture(scope="module")
def rt():
    """A single-rank CPU runtime."""
    return train_gpt.Runtime(config(), {})


def rule(targets: int, size: int, stride: int) -> list[tuple[int, int]]:
    """The competition's rule in its own words: (window start, target) for every scored target."""
    scored, start, context = [], 0, size - stride
    while start == 0 or start + context < targets:
        inputs = range(start, min(start + size, targets))
        scored += [(start, p) for p in inputs if start == 0 or p - start >= context]
        start += stride
    return scored


def expanded(strategy: Windows, targets: int) -> list[tuple[int, int]]:
    """The same list as the code under test schedules it."""
    return [
        (start, p)
        for start, first, n in strategy.items(targets).tolist()
        for p in range(first, first + n)
    ]


# ---- Which window scores which target ----

SIZES = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@settings(deadline=None, max_examples=400, derandomize=True)
@given(targets=st.integers(1, 300), window=SIZES)
@example(targets=1, window=(1, 1))
@example(targets=10, window=(40, 3))
def test_windows_follow_the_rule_and_score_every_target_once(targets, window):
    strategy = Windows(*window)
    scored = expanded(strategy, targets)
    assert scored == rule(targets, *window)
    assert [p for _, p in scored] == list(range(targets))
    items = strategy.items(targets)
    assert items[:, 2].min() >= 1 and items[:, 2].max() <= strategy.stride, (
        "one batch shape must hold every item"
    )


@pytest.mark.parametrize(
    "targets, size, stride, windows",
    [
        (5000, 2048, 64, 48),
        (2048, 2048, 64, 1),
        (2049, 2048, 64, 2),
        (1984, 2048, 64, 1),
        (1985, 2048, 64, 1),
        (1, 2048, 64, 1),
        (5000, 1000, 1000, 5),
        (5001, 1000, 1000, 6),
    ],
)
def test_the_number_of_windows_is_the_published_one(targets, size, stride, windows):
    scored = expanded(Windows(size, stride), targets)
    assert scored == rule(targets, size, stride)
    assert len({start for start, _ in scored}) == windows


def test_the_published_window_count_of_the_competition_is_met():
    starts = np.unique(Windows(2048, 64).items(62_021_632)[:, 0])
    assert len(starts) == 969_057


@settings(deadline=None, max_examples=100, derandomize=True)
@given(targets=st.integers(1, 300), window=SIZES)
def test_later_windows_give_at_least_the_full_context(targets, window):
    size, stride = window
    for start, p in expanded(Windows(*window), targets):
        assert start == 0 or p - start >= size - stride


# ---- What reaches the model ----


class Stub:
    """A model whose loss is 1024 * target + context length; NaN when the context is not the text
    before the target."""

    def __call__(self, ids, targets, rows):
        losses = torch.empty(targets.shape)
        for b, s in np.ndindex(*targets.shape):
            target, row = int(targets[b, s]), int(rows[b, s])
            context = list(range(target - row - 1, target))
            losses[b, s] = (
                1024 * target + row + 1 if ids[b, : row + 1].tolist() == context else math.nan
            )
        return losses


class Bare(train_gpt.Fixed):
    """A strategy made of windows and a bare loss function."""

    def __init__(self, windows, nll, budget: int):
        self.windows, self.nll, self.budget = windows, nll, budget


def scored(nll, tokens, sizes, windows, rt, budget: int, observer=None):
    """score() by a fixed predictor."""
    return score(tokens, sizes, Bare(windows, nll, budget), rt, observer)


class Recorder:
    """An observer that keeps the banked loss of each target and how often it was seen."""

    def __init__(self, targets: int):
        self.losses, self.seen = np.zeros(targets), np.zeros(targets, int)

    def __call__(self, batch, losses):
        for (_, first, n), row in zip(batch.items.tolist(), losses):
            self.losses[first : first + n] = row[:n]
            self.seen[first : first + n] += 1


def banked(nll, tokens, strategy, rt, batch_tokens: int = 200) -> np.ndarray:
    """Loss of each target as it was banked."""
    recorder = Recorder(len(tokens) - 1)
    result = scored(nll, tokens, np.ones(len(tokens) - 1), strategy, rt, batch_tokens, recorder)
    assert (recorder.seen == 1).all()
    assert result.nats == pytest.approx(recorder.losses.sum(), rel=1e-9)
    return recorder.losses


@settings(deadline=None, max_examples=60, derandomize=True)
@given(targets=st.integers(1, 120), window=SIZES, batch=st.integers(1, 400))
def test_each_target_is_scored_from_the_text_that_its_window_holds(rt, targets, window, batch):
    tokens = np.arange(targets + 1, dtype=np.uint16)  # a token is its own position
    losses = banked(Stub(), tokens, Windows(*window), rt, batch)
    assert losses.tolist() == [
        1024 * (p + 1) + p - start + 1 for start, p in rule(targets, *window)
    ]


@pytest.mark.parametrize("window", [(64, 64), (64, 16), (64, 1)])
def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(rt, window):
    rng = np.random.default_rng(0)
    tokens, sizes = (
        rng.integers(0, VOCAB, 500).astype(np.uint16),
        rng.integers(0, 9, 499).astype(np.int16),
    )
    model = random_model(config(**RICH))
    model.embed.data.zero_()
    result = scored(bind(model), tokens, sizes, Windows(*window), rt, 640)
    assert (result.tokens, result.bytes) == (499, sizes.sum())
    assert result.bpb == pytest.approx(math.log2(VOCAB) * 499 / sizes.sum(), rel=1e-6)
    assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_byte_sums_do_not_overflow(rt):
    sizes = np.full(3000, 30, np.int16)
    result = scored(
        lambda i, t, r: torch.zeros(t.shape),
        np.zeros(3001, np.uint16),
        sizes,
        Windows(64, 64),
        rt,
        640,
    )
    assert result.bytes == 90_000


# ---- A real model ----


def random_model(cfg, seed: int = 0) -> train_gpt.GPT:
    """A model in which every weight matters: random, also where training starts at zero."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(cfg.model, VOCAB, train_gpt.Numerics())
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5) + (0.5 if p.dim() == 1 else 0)
    return model.eval().requires_grad_(False)


def exact_model(cfg, seed: int = 0):
    """The same in float64, so that what remains is the difference between two ways of scoring, not
    of rounding."""
    model = random_model(cfg, seed).double()
    model.dtype = torch.float64
    return model


def bind(model):
    """The loss function that score() calls."""
    plan = schedule(model.cfg)
    return lambda ids, targets, rows: model.nll(ids, targets, rows, plan)


@pytest.fixture(scope="module")
def model():
    return random_model(config(**RICH))


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(1).integers(0, VOCAB, 151).astype(np.uint16)


def oracle(model, tokens, size: int, stride: int) -> list[float]:
    """One target at a time: the model sees the window up to the target and nothing else, the
    softmax is written out."""
    losses, ids = [], torch.from_numpy(tokens.astype(np.int64))
    for start, p in rule(len(tokens) - 1, size, stride):
        h = model.hidden(ids[None, start : p + 1], schedule(model.cfg))[0, -1]
        cap = model.cfg.logit_softcap
        logits = cap * torch.tanh((model.embed @ h) / cap)
        losses.append(float(logits.double().logsumexp(0) - logits[ids[p + 1]].double()))
    return losses


@pytest.mark.parametrize("window", [(32, 32), (32, 8), (32, 5), (256, 64)], ids=str)
def test_losses_equal_a_full_recomputation_per_target(rt, text, window):
    model = exact_model(config(**RICH))
    losses = banked(bind(model), text, Windows(*window), rt)
    exact = oracle(model, text, *window)
    assert np.abs(losses - exact).max() < 1e-5
    assert np.ptp(exact) > 1, "the model must tell targets apart"


@pytest.mark.parametrize("window", [(32, 32), (32, 8)], ids=str)
def test_the_batch_size_does_not_change_the_result(rt, model, text, window):
    results = [
        scored(bind(model), text, np.ones(150), Windows(*window), rt, n)
        for n in (1, 64, 100, 10_000)
    ]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)
        assert (result.tokens, result.bytes, result.coverage) == (150, 150, results[0].coverage)


def test_padding_never_reaches_a_score(model, text):
    items = Windows(32, 8).items(150)
    ids, targets, rows = train_gpt.window_batch(
        torch.from_numpy(text.astype(int)), Batch(items, len(items), 32, 8)
    )
    counts = torch.from_numpy(items[:, 2])
    last = rows.gather(
        1, counts[:, None] - 1
    )  # the last row that is scored; after it come later text or padding
    other = torch.where(torch.arange(32) > last, (ids + 7) % VOCAB, ids)
    assert (other != ids).any(1).sum() > 3
    scored = torch.arange(8) < counts[:, None]
    plan = schedule(model.cfg)
    before, after = model.nll(ids, targets, rows, plan), model.nll(other, targets, rows, plan)
    assert (before - after)[scored].abs().max() < 1e-6


@pytest.mark.parametrize("window", [(32, 32), (32, 8)], ids=str)
def test_changing_a_token_leaves_every_earlier_loss_alone(rt, model, text, window):
    """Through the whole scoring path: neither the future nor the target itself is seen."""
    before = banked(bind(model), text, Windows(*window), rt)
    for t in (1, 2, 31, 32, 33, 77, 149, 150):
        changed = text.copy()
        changed[t] = (changed[t] + 5) % VOCAB
        after = banked(bind(model), changed, Windows(*window), rt)
        assert np.abs(after - before)[: t - 1].max(initial=0) < 1e-6, f"token {t}"
        assert abs(after - before)[t - 1] > 1e-4, "the loss of the changed target itself must move"


@pytest.mark.slow
def test_the_losses_of_all_possible_targets_form_a_distribution(rt, model, text):
    """Target swap: the probabilities of every token of the alphabet at one position sum to one."""
    for t in (1, 40, 150):
        total = 0.0
        for token in range(VOCAB):
            changed = text.copy()
            changed[t] = token
            total += math.exp(-banked(bind(model), changed[: t + 1], Windows(32, 8), rt)[t - 1])
        assert total == pytest.approx(1, abs=1e-5)


# ---- Inside documents ----


def with_documents(length: int, seed: int = 3) -> np.ndarray:
    """Random text with beginnings of documents at random places, two in a row among them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, length).astype(np.uint16)
    tokens[[0, 5, 6, *rng.integers(7, length, length // 30)]] = 1
    return tokens


@pytest.mark.parametrize("first_is_bos", [True, False])
def test_documents_reach_from_bos_to_bos(first_is_bos):
    tokens = with_documents(300)
    tokens[0] = 1 if first_is_bos else 9
    borders, documents = train_gpt.document_borders(tokens).tolist(), [[]]
    for p in range(299):  # by hand: target p belongs to the document of the token before it
        if p and tokens[p] == 1:
            documents.append([])
        documents[-1].append(p)
    assert [list(range(a, b)) for a, b in zip(borders, borders[1:])] == documents


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    window=SIZES,
    budget=st.integers(1, 400),
)
@example(lengths=[40, 41, 10, 11], window=(40, 3), budget=100)
def test_document_windows_follow_the_rule_inside_each_document(rt, lengths, window, budget):
    """The first window of a document needs no slide; every later target has the context that
    sliding gives."""
    borders = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(borders[-1] + 1).astype(np.uint16) + 2
    tokens[borders[:-1]] = 1
    found = {}
    for batch in DocumentWindows(*window).batches(borders, budget):
        assert (
            len(batch.items) <= batch.rows == max(1, min(budget // batch.width, batch.rows)) <= 400
        )
        for start, first, n in batch.items.tolist():
            assert 1 <= n <= batch.scored and first + n - start <= batch.width
            for p in range(first, first + n):
                assert p not in found
                found[p] = start
    wanted = {
        a + p: a + start for a, n in zip(borders.tolist(), lengths) for start, p in rule(n, *window)
    }
    assert found == wanted


def test_document_scores_equal_a_full_recomputation_per_target(rt):
    """Every document alone, every target alone, through several window widths; and no document sees
    another."""
    model, tokens = exact_model(config(**RICH)), with_documents(400)
    borders = train_gpt.document_borders(tokens)
    losses = banked(bind(model), tokens, DocumentWindows(16, 5), rt)
    exact = np.concatenate(
        [oracle(model, tokens[a : b + 1], 16, 5) for a, b in zip(borders, borders[1:])]
    )
    assert np.abs(losses - exact).max() < 1e-5 and np.diff(borders).max() > 24
    other = tokens.copy()
    other[borders[3] + 1 : borders[4]] = (other[borders[3] + 1 : borders[4]] + 1) % 50 + 2
    moved = banked(bind(model), other, DocumentWindows(16, 5), rt) != losses
    assert moved.any() and not moved[: borders[3]].any() and not moved[borders[4] :].any()


def test_permuted_documents_have_the_same_losses(rt):
    model, tokens = random_model(config(**RICH)), with_documents(400)
    borders = train_gpt.document_borders(tokens)
    order = np.random.default_rng(0).permutation(len(borders) - 1)
    shuffled = np.concatenate([*(tokens[borders[i] : borders[i + 1]] for i in order), [1]]).astype(
        np.uint16
    )
    a, b = (
        banked(bind(model), x, DocumentWindows(16, 5), rt)
        for x in (np.append(tokens[:-1], [1]), shuffled)
    )
    moved = np.concatenate([a[borders[i] : borders[i + 1]] for i in order])
    ends = np.cumsum([borders[i + 1] - borders[i] for i in order]) - 1
    assert np.abs(np.delete(moved - b, ends)).max() < 1e-5, (
        "only a last target, the next BOS, may change"
    )


def test_documents_cost_a_quarter_of_sliding():
    """Forward tokens of 2048/64 on lengths like the competition's: a mean of 811, 19 % of the
    tokens past 2,048."""
    lengths = np.random.default_rng(0).lognormal(6.04, 1.15, 20_000).astype(int) + 1
    borders = np.concatenate([[0], np.cumsum(lengths)])
    assert (
        780 < lengths.mean() < 840
        and 0.18 < np.maximum(lengths - 2048, 0).sum() / lengths.sum() < 0.2
    )
    cost = {
        kind: sum(b.rows * b.width for b in windows.batches(borders, 131_072))
        for kind, windows in (("doc", DocumentWindows(2048, 64)), ("sliding", Windows(2048, 64)))
    }
    assert cost["sliding"] > 4 * cost["doc"], cost


# ---- score() is its own auditor ----


class Edited(Windows):
    """A strategy whose list of windows is changed by `edit`."""

    edit = staticmethod(lambda items: items)

    def items(self, targets):
        return self.edit(super().items(targets))


@pytest.mark.parametrize(
    "edit",
    [
        lambda items: items[:-1],
        lambda items: items[1:],
        lambda items: np.concatenate([items, items[-1:]]),
        lambda items: items - [0, 0, 1],
        lambda items: np.delete(items, 5, 0),
    ],
    ids=["drops the tail", "drops the start", "scores twice", "one too few", "skips one"],
)
def test_a_strategy_that_skips_or_repeats_is_caught(rt, model, text, edit):
    class Broken(Edited):
        pass

    Broken.edit = staticmethod(edit)
    scored(bind(model), text, np.ones(150), Edited(32, 8), rt, 200)
    with pytest.raises(RuntimeError):
        scored(bind(model), text, np.ones(150), Broken(32, 8), rt, 200)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_caught(rt, text, value):
    def nll(ids, targets, rows):
        return torch.where(targets == int(text[100]), value, 1.0)

    with pytest.raises(RuntimeError):
        scored(nll, text, np.ones(150), Windows(32, 8), rt, 200)


def test_losses_are_banked_and_observed_before_the_strategy_adapts(rt, model, text):
    events = []

    class Spy(Bare):
        def learn(self, batch, losses):
            events.append(("learn", batch.items.tolist(), losses[: len(batch.items)].tolist()))
            losses.fill_(math.nan)  # too late to change what is banked

    def observer(batch, losses):
        events.append(("bank", batch.items.tolist(), losses.tolist()))

    result = score(text, np.ones(150), Spy(Windows(32, 8), bind(model), 64), rt, observer)
    assert [name for name, *_ in events] == ["bank", "learn"] * (len(events) // 2)
    assert all(events[i][1:] == events[i + 1][1:] for i in range(0, len(events), 2))
    seen = [
        p for _, items, _ in events[::2] for _, first, n in items for p in range(first, first + n)
    ]
    assert seen == list(range(150)), "every target once, in order"
    assert result == scored(bind(model), text, np.ones(150), Windows(32, 8), rt, 64)


def test_what_a_strategy_learns_changes_later_losses_only(rt, model, text):
    learned = []

    class Learner(Bare):
        def learn(self, batch, losses):
            learned.append(len(batch.items))

    def nll(ids, targets, rows):
        return torch.full(targets.shape, float(sum(learned)))

    recorder = Recorder(150)
    score(text, np.ones(150), Learner(Windows(8, 8), nll, 32), rt, recorder)  # 4 windows per batch
    assert recorder.losses.tolist() == [4 * (p // 32) for p in range(150)]


def test_a_strategy_can_read_only_what_is_banked(rt, text):
    """Between rounds the ledger gives out scored targets, and refuses a single one that is not
    scored yet."""

    class Reader(Bare):
        def rounds(self, borders, ledger):
            batches, done = self.windows.batches(borders, 32), 0
            for batch in batches:
                yield [batch._replace(lane=0)]
                done = int(batch.items[-1, 1:].sum())
                ids, targets = ledger.read(np.array([[0, done], [done - 1, done]]))
                assert (
                    ids[0].tolist() == text[:done].tolist()
                    and targets[0].tolist() == text[1 : done + 1].tolist()
                )
                assert targets[1].tolist() == [text[done]] + [-100] * (done - 1)
                if done < 150:
                    with pytest.raises(train_gpt.RunFailed, match="not scored yet"):
                        ledger.read(np.array([[0, done], [done - 1, done + 1]]))

    score(text, np.ones(150), Reader(Windows(8, 8), lambda i, t, r: torch.ones(t.shape), 0), rt)


# ---- Whole runs ----

RUN = dict(PRESET="baseline+tiny", NUMERICS="fp32", ATTENTION="sdpa", DEVICE="cpu")


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """The log of a tiny run and the environment that scores its artifact."""
    folder = tmp_path_factory.mktemp("runs")
    run = run_script(**RUN, DATA_PATH=toy, RUNS_DIR=folder, RUN_ID="run")
    assert run.code == 0, run.err
    run.env = dict(RUN_MODE="eval", ARTIFACT=folder / "run" / "model.golf", DATA_PATH=toy)
    return run


@pytest.fixture
def evaluate(trained):
    """Score the artifact through main() in this process, with more environment; returns the log."""

    def call(**knobs):
        env = {k: str(v) for k, v in ({"DEVICE": "cpu"} | trained.env | knobs).items()}
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            assert train_gpt.main([], env) == 0, err.getvalue()
        return out.getvalue()

    return call


def numbers(line: str) -> dict[str, float]:
    """The name:number pairs of a log line."""
    return {
        name: float(value) for name, value in re.findall(r"(\w+):(-?[\d.]+)(?:ms)?(?:\s|$)", line)
    }


@pytest.mark.slow
def test_official_line_equals_its_own_formula_and_the_bytes_of_the_text(trained, toy, tokenizer):
    ids = np.fromfile(toy / "fineweb_val_000000.bin", "<u2")[512:].tolist()
    line = numbers(official(trained.out))
    assert line["tokens"] == len(ids) - 1
    assert line["bytes"] == len(tokenizer.decode(ids[1:]).encode())
    assert line["val_bpb"] == pytest.approx(
        line["val_loss"] / math.log(2) * line["tokens"] / line["bytes"], abs=1e-7
    )


@pytest.mark.slow
def test_every_score_of_the_log_implies_the_same_bytes(trained):
    known = numbers(official(trained.out))
    lines = [
        line for line in trained.out.splitlines() if "val_loss:" in line and "val_bpb:" in line
    ]
    assert len(lines) == 6, lines
    for line in map(numbers, lines):
        implied = line["val_loss"] / math.log(2) / line["val_bpb"] * known["tokens"]
        assert implied == pytest.approx(known["bytes"], rel=1e-4)


@pytest.mark.slow
def test_a_fresh_process_repeats_the_official_line(trained):
    again = run_script(PRESET="baseline+tiny", **trained.env)
    assert again.code == 0, again.err
    assert official(again.out) == official(trained.out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        dict(),
        dict(PRESET="mlp3x_seq4096+cpu"),
        dict(PRESET="baseline+tiny", NUM_LAYERS=4, MODEL_DIM=128, LEAKY_SLOPE=0.5),
        dict(
            LOGIT_SOFTCAP=5,
            ROPE_BASE=100,
            SMEAR_GATE="B",
            XSA_LAST_N=2,
            BIGRAM_BUCKETS=64,
            SKIPS="none",
        ),
    ],
    ids=str,
)
def test_the_environment_cannot_change_the_model_of_an_artifact(trained, evaluate, knobs):
    assert official(evaluate(**knobs)) == official(trained.out)


@pytest.mark.slow
def test_a_knob_that_an_artifact_decides_is_said_to_have_no_effect(trained, evaluate):
    run = run_script(PRESET="baseline+tiny", **trained.env, NUM_LAYERS=5, TRAIN_SEQ_LEN=128)
    assert run.code == 0
    notes = [line for line in run.out.splitlines() if line.startswith("warning: ")]
    assert [note.split()[1] for note in notes] == ["TRAIN_SEQ_LEN", "NUM_LAYERS"]
    assert all("has no effect: the artifact's own" in note for note in notes)
    strict = run_script(PRESET="baseline+tiny", **trained.env, NUM_LAYERS=5, STRICT_ENV=1)
    assert strict.code == 2 and "NUM_LAYERS has no effect" in strict.err


@pytest.mark.slow
def test_another_way_of_scoring_has_another_name_and_score(trained, evaluate):
    found, labels = {}, []
    for knobs in (
        dict(),
        dict(EVAL="sliding"),
        dict(EVAL="sliding", EVAL_STRIDE=16),
        dict(EVAL="sliding", EVAL_SEQ_LEN=48, EVAL_STRIDE=16),
        dict(EVAL="doc", EVAL_STRIDE=8),
        dict(EVAL="sliding", TTT="sgd", TTT_CHUNK_TOKENS=512, TTT_LR=0.05),
    ):
        out = evaluate(**knobs)
        labels += re.findall(r"^final_int8_zlib_(\w+)_exact ", out, re.MULTILINE)
        line = official(out)
        found[line.split("variant:")[1].split()[0]] = numbers(line)
    assert list(found) == [
        "chunked",
        "sliding_64_32",
        "sliding_64_16",
        "sliding_48_16",
        "doc_64_8",
        "sliding_64_32+sgd",
    ]
    assert [labels[0], labels[1], labels[-1]] == [
        "roundtrip",
        "sliding_window",
        "sliding_window_ttt_sgd",
    ]
    assert len({line["val_loss"] for line in found.values()}) == 6
    assert len({(line["tokens"], line["bytes"]) for line in found.values()}) == 1


def test_what_was_learnt_is_in_the_name_of_every_score():
    """Finding M12: sliding with TTT=sgd was labelled as plain sliding in the competition's line."""
    plain, learnt = set(), set()
    for kind in train_gpt.STRATEGIES:
        for ttt in train_gpt.LEARNERS:
            c = train_gpt.EvalConfig(eval=kind, ttt=ttt)
            label, name = train_gpt.final_label(c), train_gpt.variant(c)
            (plain if ttt == "none" else learnt).update({label, name})
            assert ttt == "none" or label.endswith(f"_ttt_{ttt}") and name.endswith(f"+{ttt}")
            assert re.fullmatch(r"\w+", label), "one word, for those who read logs"
    assert len(learnt) == 2 * 3 * 4 and not plain & learnt


@pytest.mark.slow
def test_scoring_needs_no_training_text(trained, evaluate, toy, tmp_path):
    for name in ("fineweb_val_000000.bin", "tokenizer.model"):
        (tmp_path / name).write_bytes((toy / name).read_bytes())
    assert official(evaluate(DATA_PATH=tmp_path)) == official(trained.out)


@pytest.mark.slow
def test_chunks_of_another_length_have_another_name(trained, evaluate):
    line = official(evaluate(TRAIN_SEQ_LEN=256))
    assert line == official(trained.out) or "variant:chunked " not in line


@pytest.mark.slow
def test_the_batch_of_the_evaluation_does_not_change_the_score(trained, evaluate):
    reference = numbers(official(trained.out))
    for size in (1, 500, 100_000):
        assert numbers(official(evaluate(EVAL_BATCH_TOKENS=size)))["val_loss"] == pytest.approx(
            reference["val_loss"], abs=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_score(trained, evaluate, ranks):
    run = run_script(nproc=ranks, PRESET="baseline+tiny", EVAL="sliding", **trained.env)
    alone = evaluate(EVAL="sliding")
    assert run.code == 0 and f"world_size:{ranks}" in run.out, run.err
    ours, theirs = numbers(official(run.out)), numbers(official(alone))
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-6)
    assert (ours["tokens"], ours["bytes"]) == (theirs["tokens"], theirs["bytes"])
    coverage = [re.findall(r"scored_once:1 coverage:(\w+)", text) for text in (run.out, alone)]
    assert coverage[0] == coverage[1] and len(coverage[0]) == 1

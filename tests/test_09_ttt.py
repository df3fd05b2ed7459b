"""Test-time training: against plain loops written out here, legal by construction, the same on any
number of ranks."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import build_sample, official, run_script, write_shard
from helpers import ALONE, TECHNIQUES, config, random_batch, random_model, token_losses
from ranks import JOBS, LORA, SMALL, VOCAB, documents, on_ranks, scores
from running import FAST, log, metrics, refused, train

import train_gpt as tg

LOOPED = dict(NUM_LOOPS=2, LOOP_START=1, LOOP_END=1)


def score(cfg, model, tokens, observer=None) -> tuple[np.ndarray, tg.Score]:
    """(loss of each target, score) of a copy of a model."""
    model, plan, losses = (
        copy.deepcopy(model),
        tg.schedule(cfg.model),
        np.full(len(tokens) - 1, np.nan),
    )

    def watch(batch, found):
        for (_, first, n), row in zip(batch.items.tolist(), found):
            losses[first : first + n] = row[:n]
        if observer:
            observer(batch, found)

    strategy = tg.strategy_of(tg.Subject(cfg, ALONE, model, tg.Numerics(), plan))
    score.strategy = strategy
    return losses, tg.score(tokens, np.ones(len(tokens) - 1), strategy, ALONE, watch)


# ---- All weights, chunk by chunk ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_score_first_sgd_equals_a_plain_loop(kind):
    """Chunk by chunk: every target alone with the weights of the chunk, then plain SGD on the
    chunk's mean loss."""
    cfg = config(
        **SMALL
        | LOOPED
        | dict(
            EVAL=kind,
            EVAL_SEQ_LEN=16,
            EVAL_STRIDE=4,
            TTT="sgd",
            TTT_CHUNK_TOKENS=32,
            TTT_LR=0.1,
            TTT_EPOCHS=2,
            TRAIN_SEQ_LEN=16,
        )
    )
    model, tokens = random_model(cfg), documents(150)
    found, _ = score(cfg, model, tokens)
    ids, expected = torch.from_numpy(tokens.astype(np.int64)), np.zeros(149)
    stride = 4 if kind == "sliding" else 16
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for k in range(5):
        for p in range(32 * k, min(32 * k + 32, 149)):
            start = (
                p // 16 * 16
                if kind == "chunked"
                else 0
                if p < 16
                else (p - 16) // stride * stride + stride
            )
            with torch.no_grad():
                expected[p] = token_losses(
                    model, ids[None, start : p + 1], ids[None, start + 1 : p + 2]
                )[0, -1]
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * k / 4))
        for _ in range(2):
            begin, end = 32 * k, min(32 * k + 32, 149)
            loss = sum(
                token_losses(
                    model, ids[None, a : min(a + 16, end)], ids[None, a + 1 : min(a + 16, end) + 1]
                ).sum()
                for a in range(begin, end, 16)
            ) / (end - begin)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    assert np.abs(found - expected).max() < 2e-4
    fixed, _ = score(
        tg.replace(cfg, eval=tg.replace(cfg.eval, ttt="none")), random_model(cfg), tokens
    )
    assert np.abs(found - fixed)[:32].max() < 1e-5 and np.abs(found - fixed)[32:].min(initial=1) > 0
    assert np.abs(found - fixed)[32:].max() > 0.05, "it must learn something"


# ---- Adapters of documents ----


@pytest.mark.slow
def test_a_text_of_any_length_is_scored_whatever_the_chunk():
    """Finding M8, a brother: a last chunk whose targets earlier windows had scored ended in a
    traceback, after the whole run had been paid for."""
    cfg = config(
        ttt="sgd", eval="sliding", eval_seq_len=16, eval_stride=8, ttt_chunk_tokens=9, ttt_epochs=1
    )
    text = documents()
    for length in range(20, 60):
        _, result = score(cfg, random_model(cfg), text[:length])
        assert result.tokens == length - 1


def written_out(cfg, model, tokens, documents, initial) -> np.ndarray:
    """Document by document, unbatched and unpadded: adapters by hooks on modules, AdamW with beta1
    = 0 by formula."""
    c, ids, plan = cfg.eval, torch.from_numpy(tokens.astype(np.int64)), tg.schedule(cfg.model)
    losses, scale = np.zeros(len(tokens) - 1), c.ttt_lora_alpha / c.ttt_lora_rank
    for begin, end in documents:
        places = [m for b in model.blocks for m in (b.attn.q, b.attn.k, b.attn.v, b.attn, b.mlp)]
        a = [
            [x.clone().requires_grad_(True) for x in initial[begin][i]]
            for i in range(len(places) + 1)
        ]
        b = [
            [torch.zeros(n, c.ttt_lora_rank, requires_grad=True) for _ in a[i]]
            for i, n in enumerate([*(initial["outs"])])
        ]
        state = [torch.zeros_like(p) for pair in zip(a, b) for side in pair for p in side]
        visits, step = [0] * len(places), 0

        def hook(i, visits=visits, a=a, b=b):
            def add(module, inputs, out):
                visit, visits[i] = visits[i], visits[i] + 1
                return out + scale * inputs[0] @ a[i][visit].T @ b[i][visit].T

            return add

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(places)]
        for first in range(begin, end, c.ttt_lora_chunk):
            last = min(first + c.ttt_lora_chunk, end)
            start, visits[:] = max(begin, last - cfg.eval.eval_seq_len), [0] * len(places)
            h = model.hidden(ids[None, start:last], plan)
            z = model.logits(h) + scale * h @ a[-1][0].T @ b[-1][0].T
            cap = model.cfg.logit_softcap
            logits = cap * torch.tanh(z / cap)
            own = logits.gather(-1, ids[None, start + 1 : last + 1, None])[..., 0]
            nll = (logits.logsumexp(-1) - own)[0, first - start :]
            losses[first:last] = nll.detach().numpy()
            if last < end:
                params = [p for pair in zip(a, b) for side in pair for p in side]
                step += 1
                for i, (p, g) in enumerate(zip(params, torch.autograd.grad(nll.mean(), params))):
                    state[i] = c.ttt_lora_beta2 * state[i] + (1 - c.ttt_lora_beta2) * g.square()
                    root = (state[i] / (1 - c.ttt_lora_beta2**step)).sqrt() + 1e-10
                    p.data = p.data * (1 - c.ttt_lora_lr * c.ttt_lora_wd) - c.ttt_lora_lr * g / root
        for handle in handles:
            handle.remove()
    return losses


@pytest.mark.parametrize(
    "knobs",
    [
        dict(),
        LOOPED
        | dict(
            OUTPUT_GATE_SCALE=1,
            SMEAR_GATE="D",
            XSA_LAST_N=2,
            LN_SCALE=1,
            PARALLEL="D",
            PARALLEL_START=2,
            VALUE_EMBED_LAST_N=1,
            DOC_ATTENTION=1,
        ),
    ],
    ids=["plain", "rich"],
)
def test_document_adapters_equal_a_loop_over_documents(knobs):
    cfg, tokens = config(**LORA | knobs), documents()
    model, initial = random_model(cfg).requires_grad_(False), {}

    def catch(batch, losses):
        """The A matrices that each document begins with, by place and slot."""
        if batch.part == 0:
            attached = [lora for _, lora in score.strategy.attached]
            initial["outs"] = [lora.b[0].size(1) for lora in attached]
            for row, first in enumerate(batch.items[:, 1].tolist()):
                initial[first] = [[x.detach()[row].clone() for x in lora.a] for lora in attached]
            assert not any(b.any() for lora in attached for b in lora.b)

    found, result = score(cfg, model, tokens, catch)
    borders = tg.document_borders(tokens).tolist()
    pairs = list(zip(borders, borders[1:]))
    expected = written_out(cfg, model, tokens, pairs, initial)
    assert np.abs(found - expected).max() < 5e-4
    fixed = score(
        tg.replace(cfg, eval=tg.replace(cfg.eval, ttt="none", eval_stride=7)), model, tokens
    )[0]
    first_chunk = np.concatenate([np.arange(a, min(a + 7, b)) for a, b in pairs])
    assert np.abs(found - fixed)[first_chunk].max() < 1e-5, (
        "before any update the model is the fixed one"
    )
    assert np.abs(np.delete(found - fixed, first_chunk)).max() > 0.01
    assert not [m for m in model.modules() if isinstance(m, tg.LoRA)]


@pytest.fixture(scope="module")
def adapted():
    """Losses of a model of some techniques under the same random adapters; zero ones change
    nothing, on the way."""

    def losses(knobs: dict) -> torch.Tensor:
        cfg = config(**SMALL | dict(EVAL="doc", TTT="lora", TTT_LORA_RANK=2, NUM_LAYERS=3) | knobs)
        model, (ids, targets) = random_model(cfg), random_batch(cfg, 3, 12)
        ids[:, 5] = 1
        subject = tg.Subject(cfg, ALONE, model, tg.Numerics(), tg.schedule(cfg.model))
        strategy = tg.DocumentLoRA(tg.DocumentWindows(16, 4), subject)
        base, strategy.rows = token_losses(model, ids, targets), 3
        with torch.no_grad(), strategy.adapted():
            strategy.forget(tg.Batch(np.array([[0, 0, 4]]), 3, 16, 4))
            assert token_losses(model, ids, targets).equal(base)
            torch.manual_seed(5)
            for _, lora in strategy.attached:
                for b in lora.b:
                    b.normal_(0, 0.2)
            found = token_losses(model, ids, targets)
        assert (found - base).abs().max() > 1e-2
        return found

    return losses, losses({})


@pytest.mark.parametrize("name", sorted({*TECHNIQUES} - {"plain", "shifted"}))
def test_with_zero_b_nothing_changes_and_every_technique_is_active(name, adapted):
    """What the adapted forward gives differs from that of a model without the technique (shifted
    computes the same)."""
    losses, plain = adapted
    small = dict(mup=dict(mup_base_width=64), partial_rope=dict(rope_dims=4)).get(name, {})
    assert (losses(TECHNIQUES[name] | small) - plain).abs().max() > 1e-4, "the technique takes part"


def test_warm_a_is_kept_within_a_lane_and_b_never():
    cfg = config(**LORA | dict(TTT_LORA_DOCS=1))
    model, seen, tokens = (
        random_model(cfg),
        {},
        np.random.default_rng(0).integers(2, VOCAB, 401).astype(np.uint16),
    )
    tokens[::20] = 1  # twenty documents in eight lanes
    for warm in (False, True):
        knobs = tg.replace(cfg, eval=tg.replace(cfg.eval, ttt_warm_a=warm))

        def catch(batch, losses, warm=warm):
            lora = score.strategy.attached[0][1]
            seen.setdefault((warm, batch.lane), []).append((batch.part, lora.a[0].detach().clone()))
            assert batch.part or not any(b.any() for _, x in score.strategy.attached for b in x.b)

        score(knobs, model, tokens, catch)
    first, kept = seen[False, 0][0][1], []
    for (warm, _), states in seen.items():
        assert states[0][1].equal(first) and not states[0][0], "every lane begins alike"
        for (_, before), (part, after) in zip(states, states[1:]):
            assert part or warm or after.equal(first), "without warm A, every document begins alike"
            assert part or not warm or float((after - before).abs().max()) < 0.1, (
                "at most a step further"
            )
            kept += [not after.equal(first)] * (warm and not part)
    assert any(kept), "what a document left behind is used"


# ---- Phases ----


@pytest.mark.slow
def test_phases_train_on_the_longest_documents_once_they_are_scored():
    cfg = config(
        **LORA
        | dict(TTT="phased", TTT_PHASES=2, TTT_PHASE_DOCS=6, TTT_CHUNK_TOKENS=40, TTT_LR=0.05)
    )
    tokens = documents()
    borders = tg.document_borders(tokens)
    longest = np.sort(np.diff(borders))[::-1]
    read, order = [], []
    original = tg.Ledger.read
    try:
        tg.Ledger.read = lambda self, spans: (
            read.append((len(order), spans.tolist())),
            original(self, spans),
        )[1]
        found, _ = score(
            cfg,
            random_model(cfg),
            tokens,
            lambda batch, losses: order.extend(
                batch.items[:, 2].tolist() if batch.part == 0 else []
            ),
        )
    finally:
        tg.Ledger.read = original
    assert sorted({done for done, _ in read}) == [3, 6], "after three and after six documents"
    for bound in (3, 6):
        spans = {tuple(s) for done, rows in read if done == bound for s in rows}
        covered = sum(b - a for a, b in spans)
        assert 0 < covered <= longest[:bound].sum() and all(b - a <= 24 for a, b in spans)
        assert all(((borders[:-1] <= a) & (b <= borders[1:])).any() for a, b in spans), (
            "no row crosses a border"
        )
    alone, _ = score(
        tg.replace(cfg, eval=tg.replace(cfg.eval, ttt="lora")), random_model(cfg), tokens
    )
    first_three = np.argsort(-np.diff(borders), kind="stable")[:3]
    inside = np.concatenate([np.arange(borders[i], borders[i + 1]) for i in first_three])
    assert (
        np.abs(found - alone)[inside].max() < 1e-5 < np.abs(np.delete(found - alone, inside)).max()
    )


# ---- Ranks ----


@pytest.mark.slow
def test_any_number_of_ranks_gives_identical_scores_document_by_document(tmp_path):
    alone = scores(ALONE)
    for world in (2, 3):
        assert on_ranks("scores", world, tmp_path / f"{world}.pt") == alone
    assert len({nats for nats, _, _ in alone.values()}) == len(JOBS)


# ---- Whole runs ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Real text in documents of 20 to 400 tokens, BOS first."""
    folder = tmp_path_factory.mktemp("documents")
    rng, ids = (
        np.random.default_rng(0),
        [t for d in build_sample.documents()[:24] for t in tokenizer.encode(d)],
    )
    for name, lo, hi in (("train", 0, 20_000), ("val", 20_000, 22_500)):
        tokens = []
        while lo < hi:
            n = int(rng.integers(20, 400))
            tokens += [1, *ids[lo : lo + n]]
            lo += n
        write_shard(folder / f"fineweb_{name}_000000.bin", tokens)
    (folder / "tokenizer.model").write_bytes(build_sample.TOKENIZER.read_bytes())
    return folder


TUNED = dict(TTT="prequant", PREQUANT_EPOCHS=2, PREQUANT_LR=0.005, ITERATIONS=20)


@pytest.mark.slow
def test_training_on_the_test_set_must_be_asked_for_twice(corpus, tmp_path):
    done = run_script(**FAST | TUNED | dict(DATA_PATH=corpus, RUNS_DIR=tmp_path, RUN_ID="a"))
    refused(done, "TTT=prequant", "ALLOW_NONCOMPLIANT=1", "PREQUANT_TEXT=train")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "knobs, named",
    [
        (dict(TTT="lora"), "EVAL=chunked does not go with TTT=lora"),
        (dict(TTT="phased", EVAL="sliding"), "EVAL=sliding does not go with TTT=phased"),
        (dict(TTT="sgd", EVAL="doc"), "EVAL=doc does not go"),
        (dict(TTT="sgd", TTT_CHUNK_TOKENS=32), "TTT_CHUNK_TOKENS=32"),
        (dict(TTT="lora", EVAL="doc", TTT_LORA_CHUNK=65), "TTT_LORA_CHUNK=65"),
    ],
)
def test_strategies_that_do_not_go_together_are_refused(knobs, named):
    with pytest.raises(tg.UserError, match=named):
        config(**knobs)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Three runs: without, with the control, and with training on the test set."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, knobs in (
        ("none", dict(TTT="none")),
        ("train", dict(PREQUANT_TEXT="train")),
        ("val", dict(ALLOW_NONCOMPLIANT=1)),
    ):
        found[name] = train(corpus, folder, name, **TUNED | knobs)
        assert found[name].code == 0, found[name].err
    return found


@pytest.mark.slow
def test_training_on_the_test_set_is_marked_everywhere(runs, corpus, tmp_path):
    for name, run in runs.items():
        marked = name == "val"
        assert {line.endswith(" [NONCOMPLIANT]") for line in log(run.folder).splitlines()} == {
            marked
        }
        assert ("warning: weights are trained on validation text" in run.out) == marked
        assert json.loads((run.folder / "config.json").read_text())["compliant"] == (not marked)
        assert [m["compliant"] for m in metrics(run.folder, "final")] == [not marked]
        header = tg.unpack_artifact((run.folder / "model.golf").read_bytes())[0]
        assert header["compliant"] == (not marked)
        assert len(re_phases(run.out)) == (name != "none")
    score_again = dict(
        RUN_MODE="eval", ARTIFACT=runs["val"].folder / "model.golf", DATA_PATH=corpus
    )
    again = run_script(**FAST | score_again | dict(TTT="none"))
    assert again.code == 0 and official(again.out).endswith(" [NONCOMPLIANT]"), (
        "the artifact remembers"
    )
    refused(
        run_script(
            **FAST | score_again | dict(TTT="prequant", ARTIFACT=runs["none"].folder / "model.golf")
        ),
        "TTT=prequant",
        "before the export",
    )


def re_phases(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("phase:prequant ")]


@pytest.mark.slow
def test_the_gain_of_the_test_set_is_memory_and_the_control_shows_it(runs):
    loss = {
        name: float(official(run.out).split("val_loss:")[1].split()[0])
        for name, run in runs.items()
    }
    seen = [
        float(x.split("loss:")[1].split()[0])
        for x in runs["val"].out.splitlines()
        if x.startswith("prequant:")
    ]
    assert len(seen) == 2 and seen[1] < seen[0]
    assert loss["val"] < loss["none"] - 0.02 and loss["val"] < loss["train"]
    control = log(runs["train"].folder)
    dealt, whole = (
        int(
            next(line for line in text.splitlines() if line.startswith("train_loader:"))
            .split("tokens:")[1]
            .split()[0]
        )
        for text in (control, log(runs["none"].folder))
    )
    assert dealt == whole, "the log names the shards; the slice is taken off afterwards"


@pytest.mark.slow
def test_every_official_evaluation_leaves_the_loss_of_each_document(runs, corpus):
    tokens = np.fromfile(corpus / "fineweb_val_000000.bin", "<u2")[512:]
    starts = np.flatnonzero(tokens[:-1] == 1)
    found = {name: np.load(run.folder / "doc_loss.npy") for name, run in runs.items()}
    for name, run in runs.items():
        line = official(run.out)
        totals = [
            float(line.split(f"{key}:")[1].split()[0]) for key in ("val_loss", "tokens", "bytes")
        ]
        assert found[name].shape == (len(starts), 2) and found[name].dtype == np.float32
        assert found[name][:, 0].sum(dtype=float) == pytest.approx(totals[0] * totals[1], rel=1e-6)
        assert found[name][:, 1].sum() == totals[2]
    assert (found["none"][:, 1] == found["val"][:, 1]).all()
    artifact = runs["none"].folder / "model.golf"
    again = run_script(**FAST | dict(RUN_MODE="eval", ARTIFACT=artifact, DATA_PATH=corpus))
    assert again.code == 0, again.err
    assert (np.load(artifact.with_suffix(".chunked.doc_loss.npy")) == found["none"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        dict(
            EVAL="doc",
            TTT="lora",
            TTT_LORA_RANK=8,
            TTT_LORA_DOCS=4,
            TTT_LORA_CHUNK=16,
            TTT_LORA_LR=0.003,
        ),
        dict(EVAL="sliding", TTT="sgd", TTT_CHUNK_TOKENS=256, TTT_LR=0.1),
    ],
    ids=["lora", "sgd"],
)
def test_learning_from_scored_text_helps_a_barely_trained_model(runs, corpus, knobs):
    artifact, losses = runs["none"].folder / "model.golf", {}
    for ttt in ("none", knobs["TTT"]):
        env = (
            FAST
            | dict(RUN_MODE="eval", ARTIFACT=artifact, DATA_PATH=corpus)
            | knobs
            | dict(TTT=ttt)
        )
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert tg.main([], {name: str(value) for name, value in env.items()}) == 0
        losses[ttt] = float(official(out.getvalue()).split("val_loss:")[1].split()[0])
    assert losses[knobs["TTT"]] < losses["none"] - 0.02, losses

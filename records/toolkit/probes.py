#!/usr/bin/env python3
"""Probe an evaluation from outside: run it on texts that differ where nothing scored so far may depend on it.

    python records/toolkit/probes.py [NAME=VALUE ...]     knobs of train_gpt.py, e.g. PRESET=phased_ttt EVAL=doc
    python records/toolkit/probes.py ARTIFACT=FILE [NAME=VALUE ...]   the model of a finished artifact

Without ARTIFACT the preset is shrunk (+tiny, 17 tokens) and every weight is random, so that every technique matters.
The probes know nothing of the method. They see the loss of each target through the observer of score():

suffix    what is not scored yet is replaced, documents keep their borders: no loss so far and no state may move
schedule  the same with moved borders: a warning, for strategies that read lengths ahead
target    one token takes every value: earlier losses stand still, and the probabilities of all values sum to one
once      every target is banked exactly once, and the coverage hash says so
documents reordered, the losses of each stay the same (where a strategy isolates documents)
uniform   a model without knowledge scores exactly log2(V) * tokens / bytes (fixed predictors)
"""
import copy
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as tg  # noqa: E402

import torch  # noqa: E402

VOCAB, LENGTH = 17, 180  # of a shrunk model and of the text it is probed with
Make = Callable[[np.ndarray], tg.Fixed]  # a text -> a fresh strategy that will score it


class Seen(NamedTuple):
    """One evaluation, target by target."""
    losses: np.ndarray   # (N,) nats; NaN where none was banked
    count: np.ndarray    # (N,) how often
    order: np.ndarray    # (N,) number of the batch that banked it
    start: np.ndarray    # (N,) first token that its window held
    digests: list[str]   # per target, of the state that scored it
    error: str           # why score() refused, if it did
    score: tg.Score | None


def state_digests(strategy: tg.Fixed, rows: int) -> list[str]:
    """Digest of what scores each row of a batch: all weights and buffers, and the row's own adapters."""
    own, shared = [hashlib.sha256() for _ in range(rows)], hashlib.sha256()
    attached = {id(t) for _, module in strategy.attached for t in (*module.parameters(), *module.buffers())}
    for tensor in (*strategy.model.parameters(), *strategy.model.buffers()):
        if id(tensor) not in attached:
            shared.update(tensor.detach().cpu().numpy().tobytes())
    for _, module in strategy.attached:
        for tensor in module.parameters():
            for row, digest in enumerate(own):
                digest.update(tensor[row].detach().cpu().numpy().tobytes())
    return [hashlib.sha256(shared.digest() + digest.digest()).hexdigest()[:16] for digest in own]


def observe(make: Make, tokens: np.ndarray, rt: tg.Runtime, digest: Callable = state_digests) -> Seen:
    """Run one evaluation and keep everything; a refusal by score() is kept, not raised."""
    n, strategy, error, result = len(tokens) - 1, make(tokens), "", None
    losses, count, order, start = np.full(n, np.nan), np.zeros(n, int), np.full(n, -1), np.zeros(n, int)
    digests, batches = [""] * n, 0

    def watch(batch: tg.Batch, found: torch.Tensor):
        nonlocal batches
        states = digest(strategy, len(batch.items))
        for (begin, first, many), row, state in zip(batch.items.tolist(), found, states):
            here = slice(first, first + many)
            losses[here], order[here], start[here], digests[here] = row[:many], batches, begin, [state] * many
            count[here] += 1
        batches += 1
    try:
        result = tg.score(tokens, np.ones(n), strategy, rt, watch)
    except tg.RunFailed as refused:
        error = str(refused)
    return Seen(losses, count, order, start, digests, error, result)


def moved(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; a loss that is missing on one side is infinitely different."""
    if (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def swap_unscored(make: Make, tokens: np.ndarray, seen: Seen, rt: tg.Runtime, rng: np.random.Generator,
                  move_borders: bool = False, digest: Callable = state_digests) -> tuple[float, int, int]:
    """Replace every token that is not scored yet at a random moment: after some batch, and some targets into each
    window of the next. (largest change of a loss whose text stayed, states that changed, how many were compared)"""
    n, vocab = len(tokens) - 1, int(tokens.max()) + 1
    moment = int(rng.integers(seen.order.max() + 1))
    current = np.flatnonzero(seen.order == moment)
    keep = seen.order < moment
    into = int(rng.integers(1, max(2, len(current))))
    previous, run = -2, 0
    for p in current:  # the first targets of each of the batch's windows
        run = run + 1 if p == previous + 1 and seen.start[p] == seen.start[previous] else 1
        previous = p
        keep[p] |= run <= into
    kept = np.concatenate([[True], keep])  # by token
    other = tokens.copy()
    free = ~kept & (tokens != tg.BOS)
    other[free] = rng.integers(2, vocab, int(free.sum()))
    if move_borders:
        other[np.flatnonzero(~kept)[::11]] = tg.BOS
    again = observe(make, other, rt, digest)
    whole = np.concatenate([[0], np.cumsum(~kept)])  # replaced tokens before each
    stays = keep & (whole[np.arange(n) + 2] == whole[seen.start])
    states = sum(a != b for a, b, s in zip(seen.digests, again.digests, stays) if s)
    return moved(seen.losses[stays], again.losses[stays]), states, int(stays.sum())


def swap_target(make: Make, tokens: np.ndarray, seen: Seen, at: int, vocab: int, rt: tg.Runtime,
                digest: Callable = state_digests) -> tuple[float, float]:
    """Token `at` takes every value: (error of the sum of its probabilities, largest change of an earlier loss).
    A BOS is a new border. Where borders steer what is learnt first, its probability cannot be seen in this way: then
    only what the other values have above one is an error."""
    before, target, chances, steered = 0.0, at - 1, np.zeros(vocab), False
    earlier = (seen.order < seen.order[target]) | (
        (seen.order == seen.order[target]) & (seen.start == seen.start[target]) & (np.arange(len(tokens) - 1) < target))
    for value in range(vocab):
        other = tokens.copy()
        other[at] = value
        again = observe(make, other, rt, digest if value == tg.BOS else no_digest)
        chances[value] = math.exp(-again.losses[target])
        if value == tg.BOS:
            steered = any(x[target] != y[target] for x, y in ((again.digests, seen.digests), (again.order, seen.order),
                                                              (again.start, seen.start)))
        else:
            before = max(before, moved(seen.losses[earlier], again.losses[earlier]))
    error = max(0.0, chances.sum() - chances[tg.BOS] - 1) if steered else abs(chances.sum() - 1)
    return float(error), before


def reorder(make: Make, tokens: np.ndarray, rt: tg.Runtime, rng: np.random.Generator) -> float:
    """Largest change of a loss when documents come in another order. The text must begin and end with BOS."""
    borders = tg.document_borders(tokens)
    order = rng.permutation(len(borders) - 1)
    other = np.concatenate([*(tokens[borders[i]:borders[i + 1]] for i in order), tokens[-1:]])
    a, b = (observe(make, x, rt, no_digest).losses for x in (tokens, other))
    return moved(np.concatenate([a[borders[i]:borders[i + 1]] for i in order]), b)


def no_digest(strategy: tg.Fixed, rows: int) -> list[str]:
    """For probes that look at losses alone."""
    return [""] * rows


def audit(make: Make, tokens: np.ndarray, vocab: int, rt: tg.Runtime, seed: int = 0, cuts: int = 6, positions: int = 2,
          isolated: bool = False, digest: Callable = state_digests, tolerance: float = 2e-5) -> dict[str, Any]:
    """Every probe of one evaluation of `tokens` (from BOS to BOS). `flags` names what failed, `warnings` what a
    reviewer should know: it learns in another order than the text's, or by lengths read ahead. A difference counts when
    it exceeds that of two equal runs and the tolerance in nats; a sum of probabilities when it is off by 1e-3."""
    rng = np.random.default_rng(seed)
    seen, again = observe(make, tokens, rt, digest), observe(make, tokens, rt, digest)
    floor = moved(seen.losses, again.losses)
    limit = max(tolerance, 2 * floor)
    found: dict[str, Any] = dict(targets=len(tokens) - 1, batches=int(seen.order.max()) + 1, noise_floor=floor)
    coverage = hashlib.sha256(np.ones(len(tokens) - 1, "<i4").tobytes()).hexdigest()[:16]
    found["once"] = not seen.error and bool((seen.count == 1).all()) and seen.score.coverage == coverage
    found["refused"] = seen.error
    found["chronological"] = bool((np.diff(seen.order) >= 0).all())
    swaps = [swap_unscored(make, tokens, seen, rt, rng, digest=digest) for _ in range(cuts)]
    found["suffix"], found["states"], found["compared"] = (f(x) for f, x in zip((max, sum, sum), zip(*swaps)))
    found["schedule"] = max(swap_unscored(make, tokens, seen, rt, rng, True, no_digest)[0] for _ in range(cuts))
    at = rng.choice(np.flatnonzero(tokens[1:-1] != tg.BOS) + 1, positions, replace=False).tolist()
    targets = [swap_target(make, tokens, seen, p, vocab, rt, digest) for p in at]
    found["sum"], found["target"] = (max(x) for x in zip(*targets))
    if isolated:
        found["documents"] = reorder(make, tokens, rt, rng)
    failed = dict(once=not found["once"], suffix=found["suffix"] > limit, states=found["states"] > 0,
                  sum=not found["sum"] < 1e-3, target=found["target"] > limit,
                  documents=found.get("documents", 0) > limit, nothing_compared=found["compared"] == 0)
    found["flags"] = [name for name, bad in failed.items() if bad]
    learns = len(set(seen.digests)) > 1
    found["warnings"] = ["schedule"] * (found["schedule"] > limit) + ["order"] * (learns and not found["chronological"])
    return found


# ---- Presets and artifacts ----
def probe_text(length: int, vocab: int, seed: int = 1) -> np.ndarray:
    """Random tokens in documents of very different lengths, from BOS to BOS."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab, length).astype(np.uint16)
    tokens[[0, length // 12, length // 6, length // 2, -1]] = tg.BOS
    return tokens


def random_weights(model: tg.GPT, seed: int = 0):
    """Every parameter random and of a size that matters, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.size(-1)**-0.5 if p.opt == "matrix" else p + 0.3 * noise)


def subject(env: dict[str, str]) -> tuple[tg.Config, tg.GPT, tg.Plan]:
    """(configuration, model, plan) to probe: a shrunk preset, or an artifact. Raises UserError."""
    if path := env.get("ARTIFACT"):
        rt = tg.Runtime(tg.load(env | {"RUN_MODE": "eval"}), {})
        header, tensors = tg.read_artifact(Path(path), rt)
        cfg = tg.artifact_config(env | {"RUN_MODE": "eval"}, Path(path), header)
        cfg = tg.replace(cfg, model=tg.SEEN_AS.get(cfg.eval.eval, lambda c: c.model)(cfg))
        return cfg, tg.build_from_artifact(cfg, tensors, tg.Numerics()), tg.stored_plan(cfg, header)
    shrunk = dict(VOCAB_SIZE=VOCAB, EVAL_SEQ_LEN=32, EVAL_STRIDE=8, TRAIN_SEQ_LEN=32, EVAL_BATCH_TOKENS=64,
                  TTT_CHUNK_TOKENS=48, TTT_LORA_CHUNK=8, TTT_LORA_DOCS=2, TTT_PHASE_DOCS=3, TTT_PHASES=2, TTT_EPOCHS=1,
                  PREQUANT_EPOCHS=2, PREQUANT_LR=0.01, DEVICE="cpu")
    preset = env.get("PRESET", "baseline")
    cfg = tg.load({k: str(v) for k, v in shrunk.items()} | env | {"PRESET": preset + "+tiny"})
    cfg = tg.replace(cfg, model=tg.SEEN_AS.get(cfg.eval.eval, lambda c: c.model)(cfg))
    model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics())
    random_weights(model)
    return cfg, model, tg.schedule(cfg.model)


def strategy_maker(cfg: tg.Config, model: tg.GPT, plan: tg.Plan, rt: tg.Runtime) -> Make:
    """A fresh copy of the model and a fresh strategy for each text; TTT=prequant trains the copy on that text first, as
    a run would have done."""
    def make(tokens: np.ndarray) -> tg.Fixed:
        mine = copy.deepcopy(model)
        if cfg.eval.ttt == "prequant" and not cfg.eval.compliant:
            tuner = tg.FineTuner(mine, plan, tg.Numerics(), rt, lambda p: torch.optim.AdamW(p, weight_decay=0.0))
            for _ in range(cfg.eval.prequant_epochs):
                tuner.step(*tg.padded_rows(tokens, tg.cut(0, len(tokens) - 1, cfg.data.train_seq_len)),
                           cfg.eval.prequant_lr)
        return tg.strategy_of(cfg, rt, mine, tg.Numerics(), plan, cfg.eval.eval, cfg.eval.ttt)
    return make


def uniform_error(cfg: tg.Config, model: tg.GPT, plan: tg.Plan, rt: tg.Runtime, tokens: np.ndarray) -> float:
    """|bpb - log2(V) * tokens / bytes| of the same windows over a model whose output table is zero."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.output.zero_()
    sizes = np.random.default_rng(0).integers(1, 9, len(tokens) - 1)
    strategy = tg.strategy_of(cfg, rt, blank, tg.Numerics(), plan, cfg.eval.eval, "none")
    result = tg.score(tokens, sizes, strategy, rt)
    return float(abs(result.bpb - math.log2(cfg.data.vocab_size) * (len(tokens) - 1) / sizes.sum()))


def probe(env: dict[str, str], length: int = LENGTH, **options) -> dict[str, Any]:
    """audit() of what a set of knobs describes. Raises UserError for bad knobs."""
    cfg, model, plan = subject(env)
    rt, tokens = tg.Runtime(cfg, {}), probe_text(length, cfg.data.vocab_size)
    alone = cfg.eval.eval == "doc" and (cfg.eval.ttt == "none" or cfg.eval.ttt == "lora" and not cfg.eval.ttt_warm_a)
    found = audit(strategy_maker(cfg, model, plan, rt), tokens, cfg.data.vocab_size, rt, isolated=alone, **options)
    found["uniform"] = uniform_error(cfg, model, plan, rt, tokens)
    found["flags"] += ["uniform"] * (bool(found["uniform"] > 1e-5))
    return dict(strategy=tg.variant(cfg.eval, cfg.eval.eval, cfg.eval.ttt), preset=cfg.preset) | found


def main(args: list[str]) -> int:
    """Print the findings as JSON; 1 when something is flagged, 2 for bad knobs."""
    try:
        if wrong := [a for a in args if "=" not in a]:
            raise tg.UserError(f"{wrong[0]}: want NAME=VALUE")
        found = probe(dict(a.split("=", 1) for a in args))
    except tg.UserError as error:
        print(*(f"error: {message}" for message in error.args), sep="\n", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    return int(bool(found["flags"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

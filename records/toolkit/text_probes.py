"""Probes of an evaluation that know nothing of its method: texts go in, the loss of each target
comes out.

An evaluation is a function look(tokens (N,), digests: bool) -> Seen. The probes run it on texts
that differ where nothing scored so far may depend on it:

suffix     what is not scored yet is replaced, documents keep their borders: no loss so far and no
           state may move
schedule   the same with moved borders: a warning, for strategies that read lengths ahead
target     one token takes every value: earlier losses stand still, and the probabilities of all
           values sum to one
once       every target is banked exactly once
documents  reordered, the losses of each stay the same (where an evaluation isolates documents)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def ordinary(rng: np.random.Generator, vocab: int, count: int, bos: int) -> np.ndarray:
    """Random ids that begin no document."""
    ids = rng.integers(2, vocab, count)
    ids[ids == bos] = 1
    return ids


class Seen(NamedTuple):
    """One evaluation, target by target."""

    losses: np.ndarray  # (N,) nats; NaN where none was banked
    count: np.ndarray  # (N,) how often
    order: np.ndarray  # (N,) number of the batch that banked it
    start: np.ndarray  # (N,) first token that its window held
    digests: list[str]  # per target, of the state that scored it
    error: str  # why it was refused, if it was


Look = Callable[[np.ndarray, bool], Seen]


def moved(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; a loss that is missing on one side is infinitely different."""
    if (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def swap_unscored(
    look: Look,
    tokens: np.ndarray,
    seen: Seen,
    rng: np.random.Generator,
    bos: int,
    move_borders: bool = False,
) -> tuple[float, int, int]:
    """Replace every token that is not scored yet at a random moment: after some batch, and some
    targets into each window of the next. (largest change of a loss whose text stayed, states that
    changed, how many were compared)"""
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
    free = ~kept & (tokens != bos)
    other[free] = ordinary(rng, vocab, int(free.sum()), bos)
    if move_borders:
        other[np.flatnonzero(~kept)[::11]] = bos
    again = look(other, not move_borders)
    whole = np.concatenate([[0], np.cumsum(~kept)])  # replaced tokens before each
    stays = keep & (whole[np.arange(n) + 2] == whole[seen.start])
    states = sum(a != b for a, b, s in zip(seen.digests, again.digests, stays) if s)
    return moved(seen.losses[stays], again.losses[stays]), states, int(stays.sum())


def swap_target(
    look: Look, tokens: np.ndarray, seen: Seen, at: int, vocab: int, bos: int
) -> tuple[float, float]:
    """Token `at` takes every value: (error of the sum of its probabilities, largest change of an
    earlier loss). A BOS is a new border. Where borders steer what is learnt first, its probability
    cannot be seen in this way: then only what the other values have above one is an error."""
    before, target, chances, steered = 0.0, at - 1, np.zeros(vocab), False
    earlier = (seen.order < seen.order[target]) | (
        (seen.order == seen.order[target])
        & (seen.start == seen.start[target])
        & (np.arange(len(tokens) - 1) < target)
    )
    for value in range(vocab):
        other = tokens.copy()
        other[at] = value
        again = look(other, value == bos)
        chances[value] = math.exp(-again.losses[target])
        if value == bos:
            steered = any(
                x[target] != y[target]
                for x, y in (
                    (again.digests, seen.digests),
                    (again.order, seen.order),
                    (again.start, seen.start),
                )
            )
        else:
            before = max(before, moved(seen.losses[earlier], again.losses[earlier]))
    error = max(0.0, chances.sum() - chances[bos] - 1) if steered else abs(chances.sum() - 1)
    return float(error), before


def reorder(look: Look, tokens: np.ndarray, rng: np.random.Generator, bos: int) -> float:
    """Largest change of a loss when documents come in another order. The text must begin and end
    with BOS."""
    borders = np.flatnonzero(tokens == bos)
    order = rng.permutation(len(borders) - 1)
    other = np.concatenate([*(tokens[borders[i] : borders[i + 1]] for i in order), tokens[-1:]])
    a, b = (look(x, False).losses for x in (tokens, other))
    return moved(np.concatenate([a[borders[i] : borders[i + 1]] for i in order]), b)


def audit(
    look: Look,
    tokens: np.ndarray,
    vocab: int,
    seed: int = 0,
    cuts: int = 6,
    positions: int = 2,
    isolated: bool = False,
    tolerance: float = 2e-5,
    bos: int = 1,
) -> dict[str, Any]:
    """Every probe of one evaluation of `tokens` (from BOS to BOS, id `bos`). `flags` names what
    failed, `warnings` what a reviewer should know: it learns in another order than the text's, or
    by lengths read ahead. A difference counts when it exceeds that of two equal runs and the
    tolerance in nats; a sum of probabilities when it is off by 1e-3."""
    rng = np.random.default_rng(seed)
    seen, again = look(tokens, True), look(tokens, True)
    floor = moved(seen.losses, again.losses)
    limit = max(tolerance, 2 * floor)
    found: dict[str, Any] = dict(
        targets=len(tokens) - 1, batches=int(seen.order.max()) + 1, noise_floor=floor
    )
    found["once"] = not seen.error and bool((seen.count == 1).all())
    found["refused"] = seen.error
    found["chronological"] = bool((np.diff(seen.order) >= 0).all())
    swaps = [swap_unscored(look, tokens, seen, rng, bos) for _ in range(cuts)]
    found["suffix"], found["states"], found["compared"] = (
        f(x) for f, x in zip((max, sum, sum), zip(*swaps))
    )
    found["schedule"] = max(
        swap_unscored(look, tokens, seen, rng, bos, True)[0] for _ in range(cuts)
    )
    at = rng.choice(np.flatnonzero(tokens[1:-1] != bos) + 1, positions, replace=False).tolist()
    targets = [swap_target(look, tokens, seen, p, vocab, bos) for p in at]
    found["sum"], found["target"] = (max(x) for x in zip(*targets or [(0.0, 0.0)]))
    if isolated:
        found["documents"] = reorder(look, tokens, rng, bos)
    failed = dict(
        once=not found["once"],
        suffix=found["suffix"] > limit,
        states=found["states"] > 0,
        sum=not found["sum"] < 1e-3,
        target=found["target"] > limit,
        documents=found.get("documents", 0) > limit,
        nothing_compared=found["compared"] == 0,
    )
    found["flags"] = [name for name, bad in failed.items() if bad]
    learns = len(set(seen.digests)) > 1
    found["warnings"] = ["schedule"] * (found["schedule"] > limit) + ["order"] * (
        learns and not found["chronological"]
    )
    return found


def probe_text(length: int, vocab: int, seed: int = 1, bos: int = 1) -> np.ndarray:
    """Random tokens in documents of very different lengths, from BOS to BOS."""
    rng = np.random.default_rng(seed)
    tokens = ordinary(rng, vocab, length, bos).astype(np.uint16)
    tokens[[0, length // 12, length // 6, length // 2, -1]] = bos
    return tokens

"""What scoring the validation text costs, and how evenly ranks share it.

The lengths of its 50,000 documents are known from published logs, which print the shortest and the
longest document of batches of 64 (records/evidence/step_times). The script's own strategies cut
them into batches; each batch costs what toolkit.step_time says of a pass, times what published
evaluations took over that.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

import train_gpt

from .step_time import (
    EIGHT,
    STREAM,
    TARGETS,
    Card,
    Cluster,
    Errors,
    Shape,
    block_matrices,
    forward_seconds,
    held_out,
    rates,
    slowdown,
    step_time,
    table,
)

DOCUMENTS = 50_000  # of the validation text
TEXTS = {"sp8192": 40_540_160, "caseops": 47_851_520}  # tokens whose document lengths are known
PUBLISHED_ROWS = 64  # documents of a published batch


@functools.cache
def known_lengths(text: str) -> np.ndarray:
    """Tokens of each document, shortest first, (50000,) int64. Between the documents that logs
    name, lengths are interpolated geometrically, then scaled to the text's tokens."""
    places, lengths = [], []
    for row in table("document_lengths.csv"):
        if row["text"] == text:
            begin = PUBLISHED_ROWS * (int(row["batch"]) - 1)
            places += [begin, min(begin + PUBLISHED_ROWS, DOCUMENTS) - 1]
            lengths += [int(row["shortest"]), int(row["longest"])]
    found = np.exp(np.interp(np.arange(DOCUMENTS), places, np.log(lengths)))
    return np.maximum(1, np.rint(found * (TEXTS[text] / found.sum()))).astype(np.int64)


def document_lengths(vocab: int, caseops: bool = False) -> np.ndarray:
    """Lengths in tokens of a vocabulary; other tokenizers scale those of 8,192 tokens by the
    published number of targets, or by 1 where none was published."""
    if caseops:
        return known_lengths("caseops")
    factor = TARGETS.get(vocab, TARGETS[8192]) / TARGETS[8192]
    return np.maximum(1, np.rint(known_lengths("sp8192") * factor)).astype(np.int64)


def mean_keys(lengths: np.ndarray, row: int) -> float:
    """Keys that a token attends on average when documents are cut into rows of so many tokens."""
    whole, rest = np.divmod(lengths, row)
    return float((whole * row**2 + rest**2).sum() / (2 * lengths.sum()))


# Loads of ranks ----------------------------------------------------------------------------------
class Load(NamedTuple):
    """Seconds of each rank in one round."""

    ranks: tuple[float, ...]

    @property
    def critical(self) -> float:
        return max(self.ranks)

    @property
    def mean(self) -> float:
        return sum(self.ranks) / len(self.ranks)

    @property
    def imbalance(self) -> float:
        """Critical over mean; 1 is even."""
        return self.critical / self.mean if self.mean else 1.0


def loads(
    batches: Iterable[train_gpt.Batch], cost: Callable[[train_gpt.Batch], float], ranks: int
) -> Load:
    """What each rank does when lanes are dealt to ranks in turn, as train_gpt.score does."""
    seconds = np.zeros(ranks)
    for batch in batches:
        seconds[batch.lane % ranks] += cost(batch)
    return Load(tuple(map(float, seconds)))


class Round(NamedTuple):
    """Batches scored side by side, and the rows of each update of all weights that follows."""

    batches: list[train_gpt.Batch]
    updates: list[np.ndarray]  # spans (n,2) of targets


def rounds(cfg: train_gpt.Config, lengths: np.ndarray) -> Iterator[Round]:
    """What the script's evaluation does with documents of these lengths, without a model: its own
    strategy, whose adapters and updates are replaced by a note of what they would read."""
    updates: list[np.ndarray] = []
    tuner = SimpleNamespace(step=lambda spans, rate: updates.append(spans))
    ledger = SimpleNamespace(read=lambda spans: (spans,))
    model = SimpleNamespace(nll=max)  # never called
    numerics = train_gpt.Numerics(compile=False)
    strategy = train_gpt.strategy_of(train_gpt.Subject(cfg, None, model, numerics, ()))
    strategy.tuner = lambda **numerics: tuner
    strategy.adapted = contextlib.nullcontext
    borders = np.concatenate([[0], np.cumsum(lengths)])
    found = None
    for batches in strategy.rounds(borders, ledger):
        if found is not None:
            yield Round(found, updates.copy())
        found = batches
        updates.clear()
    yield Round(found, updates.copy())


def shuffled(lengths: np.ndarray) -> np.ndarray:
    """The same lengths in a fixed order that no length decides, as in a text."""
    return np.random.default_rng(0).permutation(lengths)


# Learning while scoring --------------------------------------------------------------------------
class Tuning(NamedTuple):
    """What published test-time training took over rooflines."""

    slowdown: float  # of scoring with adapters
    update: float  # seconds of one update of all weights beside its rooflines: launches, host


def adapter_weights(shape: Shape, rank: int) -> int:
    """Of one document: at queries, keys, values, both branches of every slot, and the logits; half
    as many key/value as query heads."""
    return rank * (9 * shape.dim * shape.slots + shape.dim + shape.vocab)


def learning_seconds(
    shape: Shape, card: Card, documents: int, tokens: int, scored: int, rank: int
) -> float:
    """Rooflines of one chunk: forward, gradients of activations, and ten fp32 passes over the
    adapters, seven of AdamW and three of products."""
    traffic = 4.0 * 10 * adapter_weights(shape, rank) * documents
    seconds = forward_seconds(shape, card, rates(), tokens, scored, backward=True)
    return seconds + traffic / (card.bandwidth * STREAM)


class PublishedTuning(NamedTuple):
    """One published evaluation with adapters for each document."""

    name: str
    text: str
    chunk: int
    rank: int
    boundaries: tuple[int, ...]  # documents after which all weights learn
    phases: tuple[float, ...]  # seconds since the start at the end of each phase
    update_s: tuple[float, ...]
    updates: tuple[int, ...]
    total: float

    @property
    def scoring(self) -> float:
        """Seconds without the updates of all weights."""
        return self.total - sum(self.update_s)

    @property
    def family(self) -> tuple:
        return self.text, self.chunk, self.rank, self.boundaries


@functools.cache
def published_tuning() -> tuple[PublishedTuning, ...]:
    """The evaluations of tuning.csv, 11 blocks and 17 slots on eight H100s, windows of 2,048."""
    return tuple(
        PublishedTuning(
            f"{row['record']} {row['log']}",
            row["text"],
            int(row["chunk"]),
            int(row["rank"]),
            tuple(map(int, row["boundaries"].split())),
            tuple(map(float, row["phase_s"].split())),
            tuple(map(float, row["update_s"].split())),
            tuple(map(int, row["updates"].split())),
            float(row["total_s"]),
        )
        for row in table("tuning.csv")
    )


PUBLISHED_SHAPE = Shape(
    512, 2048, 8192, 2048, 786_432, 17, block_matrices(512, 2048, 17), 1024.0, 35_945_671
)


@functools.cache
def published_batches(text: str, chunk: int, rank: int) -> tuple[tuple[int, float], ...]:
    """(documents, roofline seconds) of each batch, longest first: batches of 64 documents,
    every chunk with its whole batch and all logits of its window."""
    lengths, found = known_lengths(text)[::-1], []
    first = DOCUMENTS % PUBLISHED_ROWS  # the batch of the longest is the short one
    for end in range(first, DOCUMENTS + 1, PUBLISHED_ROWS):
        begin = max(0, end - PUBLISHED_ROWS)
        documents, chunks = end - begin, -(-int(lengths[begin] - 1) // chunk)
        window = np.minimum(PUBLISHED_SHAPE.seq, chunk * np.arange(1, chunks + 1))
        seconds = 0.0
        for width, count in zip(*np.unique(window, return_counts=True)):
            tokens, narrow = documents * int(width), PUBLISHED_SHAPE._replace(keys=float(width) / 2)
            seconds += count * learning_seconds(narrow, EIGHT.card, documents, tokens, tokens, rank)
        found.append((documents, seconds))
    return tuple(found)


def queue_seconds(row: PublishedTuning) -> float:
    """Roofline seconds of scoring when ranks take the next batch as soon as they are free; a phase
    ends when as many documents are done as its boundary says and all ranks have finished theirs."""
    free, done, ahead = np.zeros(8), [], list(row.boundaries)
    for documents, seconds in published_batches(row.text, row.chunk, row.rank):
        rank = int(free.argmin())
        if ahead and sum(n for end, n in done if end <= free[rank]) >= ahead[0]:
            del ahead[0]
            free[:] = free.max()
        free[rank] += seconds
        done.append((free[rank], documents))
    return float(free.max())


def update_seconds(shape: Shape, on: Cluster, tokens: int) -> float:
    """Roofline seconds of one update of all weights, shared by at most LANES ranks."""
    busy = on._replace(nodes=1, cards=min(on.world, train_gpt.LANES))
    step = step_time(shape._replace(batch_tokens=tokens, seq=1), busy, rates())
    return step.seconds - step.overhead


UPDATE_TOKENS = 32_768  # of a published update


def fitted_tuning(rows: Iterable[PublishedTuning]) -> Tuning:
    """Medians over kinds of evaluation; within a kind, whose runs differ by the machine, over
    runs."""
    kinds: dict[tuple, list[PublishedTuning]] = {}
    for row in rows:
        kinds.setdefault(row.family, []).append(row)
    ratios = [np.median([r.scoring for r in k]) / queue_seconds(k[0]) for k in kinds.values()]
    updates = [s / n for k in kinds.values() for r in k for s, n in zip(r.update_s, r.updates)]
    beside = np.median(updates) - update_seconds(PUBLISHED_SHAPE, EIGHT, UPDATE_TOKENS)
    return Tuning(float(np.median(ratios)), float(beside))


@functools.cache
def tuning() -> Tuning:
    """Fitted to all published evaluations with adapters."""
    return fitted_tuning(published_tuning())


def tuning_errors() -> Errors:
    """Every published evaluation with adapters predicted from the other kinds'."""

    def predict(others: list[PublishedTuning], row: PublishedTuning) -> float:
        found = fitted_tuning(others)
        update = found.update + update_seconds(PUBLISHED_SHAPE, EIGHT, UPDATE_TOKENS)
        return queue_seconds(row) * found.slowdown + update * sum(row.updates)

    rows = published_tuning()
    guess = held_out(rows, lambda row: row.family, predict)
    return Errors([r.name for r in rows], [r.total for r in rows], guess, [r.family for r in rows])


# The script's evaluation -------------------------------------------------------------------------
class Phase(NamedTuple):
    """One part of an evaluation."""

    name: str
    seconds: float
    imbalance: float  # critical over mean seconds of ranks; 1 = even, or nothing to share


@functools.cache
def batch_seconds(
    shape: Shape, card: Card, rank: int, rows: int, width: int, scored: int, learns: bool
) -> float:
    """Seconds of a batch of this form; `rank` of adapters, 0 = none."""
    shape, tokens, scored = shape._replace(keys=width / 2), rows * width, rows * scored
    if rank and learns:
        return tuning().slowdown * learning_seconds(shape, card, rows, tokens, scored, rank)
    over = tuning().slowdown if rank else slowdown()
    return over * forward_seconds(shape, card, rates(), tokens, scored)


class Evaluation:
    """What scoring with a configuration costs; made once, asked for any number of cards."""

    def __init__(self, cfg: train_gpt.Config, shape: Shape, lengths: np.ndarray):
        self.cfg, self.shape = cfg, shape
        self.learns = cfg.eval.ttt in ("lora", "phased")
        self.rounds = list(rounds(cfg, shuffled(lengths)))

    def cost(self, batch: train_gpt.Batch, card: Card) -> float:
        """Seconds of one batch on a card."""
        rank = self.cfg.eval.ttt_lora_rank if self.learns else 0
        form = batch.rows, batch.width, batch.scored, bool(batch.learners)
        return batch_seconds(self.shape, card, rank, *form)

    def loads(self, card: Card, ranks: int) -> list[Load]:
        """Of every round."""
        return [loads(r.batches, lambda b: self.cost(b, card), ranks) for r in self.rounds]

    def phases(self, on: Cluster) -> list[Phase]:
        """In order. More than ten rounds, as of TTT=sgd, are told together."""
        found, every = [], self.loads(on.card, on.world)
        for number, (load, done) in enumerate(zip(every, self.rounds), 1):
            name = f"scoring, part {number}" if len(every) > 1 else "scoring"
            found.append(Phase(name, load.critical, load.imbalance))
            seconds = [self.update(spans, on) for spans in done.updates]
            if seconds:
                found.append(Phase(f"{len(seconds)} updates of all weights", sum(seconds), 1.0))
        if len(every) <= 10:
            return found
        scored = sum(load.critical for load in every)
        mean = sum(load.mean for load in every)
        updates = sum(len(r.updates) for r in self.rounds)
        rest = sum(phase.seconds for phase in found) - scored
        return [
            Phase(f"scoring, {len(every)} parts", scored, scored / mean),
            Phase(f"{updates} updates of all weights", rest, 1.0),
        ]

    def update(self, spans: np.ndarray, on: Cluster) -> float:
        """Seconds of one update of all weights on spans of text."""
        tokens = int((spans[:, 1] - spans[:, 0]).sum())
        return tuning().update + update_seconds(self.shape, on, tokens)

    def imbalance(self, card: Card, ranks: int) -> float:
        """Critical over mean seconds, all rounds together."""
        every = self.loads(card, ranks)
        return sum(load.critical for load in every) / sum(load.mean for load in every)

    def most_alive(self) -> tuple[int, int, int]:
        """(documents, inputs, scored targets) of the largest batch that learns; zeros if none."""
        batches = [b for r in self.rounds for b in r.batches if b.learners and self.learns]
        return max(
            ((b.rows, b.rows * b.width, b.rows * b.scored) for b in batches), default=(0,) * 3
        )

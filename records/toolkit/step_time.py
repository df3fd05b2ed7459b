"""What a training step costs on a card: time by class of kernel, memory, and how well both agree
with published runs.

A step is described by its Shape, never by a preset. Each class of kernel takes its work over what
the card does at peak, times a rate: the part of the peak that the published scripts reached. The
few rates are fitted to the published step times of records/evidence/step_times whenever they are
asked for; nothing fitted is stored.
"""

import csv
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence" / "step_times"
PACKED_KEYS = 625.0  # mean keys a token attends in packed rows of 2,048, SP8192: evidence README
STREAM = 0.9  # of the data sheet's memory bandwidth that a long copy reaches (3.0 of 3.35 TB/s)
LINK = 0.8  # of a link's bandwidth that a ring of ranks reaches
NETWORK = 50e9  # bytes/s and direction of one card between machines: 400 Gb/s InfiniBand each
HIDDEN_PASSES = 6  # over the MLP's hidden layer: written, activated, saved, and back
LOSS_PASSES = 5  # over bf16 logits: written, softcap and loss, gradient, read by two products
OPTIMISER_BYTES = 28  # per parameter and step: gradient, moment, weight, average, read and written
POLAR_STEPS = 5  # Newton-Schulz steps of Muon, three products each


class Card(NamedTuple):
    """One accelerator, from its maker's data sheet."""

    name: str
    peak: float  # FLOP/s of bf16 products with fp32 sums, dense
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    link: float  # bytes/s to its neighbours in a machine, in one direction
    attention: str  # fastest published kernel that runs on it
    price: float  # dollars an hour, an assumption; --price says another


CARDS = {
    card.name.lower(): card
    for card in (
        # nvidia.com/en-us/data-center/h100, SXM column; half of the figure with sparsity
        Card("H100", 989e12, 3.35e12, 80e9, 450e9, "fa3", 2.5),
        # nvidia.com/en-us/data-center/h200
        Card("H200", 989e12, 4.8e12, 141e9, 450e9, "fa3", 3.5),
        # NVIDIA A100 datasheet, 80GB SXM
        Card("A100", 312e12, 2.039e12, 80e9, 300e9, "fa2", 1.5),
        # NVIDIA Ada GPU architecture whitepaper, appendix A; no NVLink: PCIe 4.0 x16
        Card("4090", 165.2e12, 1.008e12, 24e9, 32e9, "fa2", 0.4),
    )
}


class Cluster(NamedTuple):
    """Equal machines of equal cards."""

    card: Card
    nodes: int = 1
    cards: int = 8  # of each machine

    @property
    def world(self) -> int:
        return self.nodes * self.cards

    def __str__(self) -> str:
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.cards}x{self.card.name}"


def cluster(text: str) -> Cluster:
    """H100, 8xH100 or 2x8xH100 (machines, cards of each, kind). Raises ValueError."""
    *numbers, kind = text.lower().split("x")
    if kind not in CARDS:
        known = ", ".join(card.name for card in CARDS.values())
        raise ValueError(f"--on {text}: unknown card {kind!r}; known: {known}")
    if len(numbers) > 2 or not all(n.isdecimal() and 0 < int(n) < 10**6 for n in numbers):
        raise ValueError(f"--on {text}: want CARD, CARDSxCARD or MACHINESxCARDSxCARD")
    return Cluster(CARDS[kind], *[1, 1, *map(int, numbers)][-2:])


class Shape(NamedTuple):
    """All that a training step's cost depends on."""

    dim: int
    hidden: int
    vocab: int
    seq: int  # tokens of a row
    batch_tokens: int  # of one step, all ranks
    slots: int  # applications of a block
    matrices: tuple[tuple[int, int, int], ...]  # (inputs, outputs, uses by a token), no head
    keys: float  # that a token attends on average
    parameters: int
    heads: int = 1  # tables of logits
    attention: str = ""  # kernel; "" = the card's
    pass_tokens: int = 2**40  # most tokens of a rank's pass

    @property
    def weights(self) -> int:
        """Matrix weights that a token meets, the head apart."""
        return sum(n_in * n_out * uses for n_in, n_out, uses in self.matrices)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 6 per weight met, 12 x slots x dim x keys of attention."""
        head = self.heads * self.dim * self.vocab
        return 6.0 * (self.weights + head) + 12.0 * self.slots * self.dim * self.keys

    def tokens(self, world: int) -> int:
        """Of the busiest rank in a step: whole rows."""
        return -(-self.batch_tokens // (self.seq * world)) * self.seq

    def widened(self, factor: int) -> "Shape":
        """The same with a batch so many times larger."""
        return self._replace(batch_tokens=self.batch_tokens * factor)


def block_matrices(dim: int, hidden: int, uses: int) -> tuple[tuple[int, int, int], ...]:
    """Matrices of one block with half as many key/value as query heads, applied `uses` times."""
    attention = ((dim, dim, 2 * uses), (dim, dim // 2, 2 * uses))
    return *attention, (dim, hidden, uses), (hidden, dim, uses)


class Rates(NamedTuple):
    """What the published scripts reached; see fitted()."""

    matmul: float  # part of peak
    fa2: float  # part of peak, attention kernels forward and backward
    fa3: float
    passes: float  # over a slot's (tokens, dim) stream, forward and backward
    overhead: float  # seconds of a step in launches, host work and waiting


# A measured profile of an 11-layer model (two H100s, PRs 1105 and 1420: products at 62 % of peak,
# FA3 at 49 %, about 90 passes a layer of which the hidden layer has 24) says where the rates lie,
# within these factors; the step times say the rest.
PRIOR = Rates(0.62, 0.35, 0.49, 66.0, 0.0045)
PRIOR_SPREAD = Rates(0.1, 0.25, 0.15, 0.4, 0.4)
NOISE = 0.05  # of a published step time, as a factor; larger residuals count less


class Step(NamedTuple):
    """Seconds of one step by class of kernel."""

    matmul: float
    attention: float
    loss: float  # softcap, cross-entropy and their gradient
    memory: float  # elementwise work and norms
    optimiser: float
    communication: float
    overhead: float

    @property
    def seconds(self) -> float:
        return sum(self)


def product_seconds(shape: Shape, card: Card, rates: Rates, tokens: float) -> float:
    """One forward product with each matrix that a token meets; a thin one waits for memory."""
    seconds = 0.0
    for n_in, n_out, uses in shape.matrices:
        compute = 2.0 * n_in * n_out / (card.peak * rates.matmul)
        traffic = 2.0 * (n_in + n_out) / (card.bandwidth * STREAM)
        seconds += tokens * uses * max(compute, traffic)
    return seconds


def head_seconds(shape: Shape, card: Card, rates: Rates, tokens: float) -> float:
    """One forward product with the tables of logits."""
    return 2.0 * shape.heads * shape.dim * shape.vocab * tokens / (card.peak * rates.matmul)


def attention_seconds(shape: Shape, card: Card, rates: Rates, tokens: float) -> float:
    """Attention of a forward pass: 4 FLOPs per slot, channel and key."""
    rate = getattr(rates, shape.attention or card.attention)
    return 4.0 * shape.slots * shape.dim * shape.keys * tokens / (card.peak * rate)


def stream_seconds(shape: Shape, card: Card, rates: Rates, tokens: float) -> float:
    """Elementwise traffic of a slot's stream and hidden layer, forward and backward, bf16."""
    size = 2.0 * shape.slots * (rates.passes * shape.dim + HIDDEN_PASSES * shape.hidden)
    return size * tokens / (card.bandwidth * STREAM)


def loss_seconds(shape: Shape, card: Card, tokens: float) -> float:
    """Traffic of the logits, forward and backward."""
    size = 2.0 * LOSS_PASSES * shape.heads * shape.vocab
    return size * tokens / (card.bandwidth * STREAM)


def optimiser_seconds(shape: Shape, on: Cluster, rates: Rates) -> float:
    """Traffic of all parameters on each rank; Newton-Schulz of the matrices, shared by ranks."""
    traffic = OPTIMISER_BYTES * shape.parameters / (on.card.bandwidth * STREAM)
    stored = max(0, shape.parameters - shape.vocab * shape.dim)
    polar = POLAR_STEPS * 3 * 2.0 * stored * shape.dim
    return traffic + polar / (on.card.peak * rates.matmul * on.world)


def communication_seconds(shape: Shape, on: Cluster) -> float:
    """Reduce-scatter and all-gather of bf16 gradients and weights, inside machines and then
    between them, none of it hidden behind the backward pass."""
    size = 2 * 2.0 * shape.parameters
    inside = size * (1 - 1 / on.cards) / (on.card.link * LINK)
    between = size / on.cards * (1 - 1 / on.nodes) / (NETWORK * LINK)
    return inside + between


def step_time(shape: Shape, on: Cluster, rates: Rates) -> Step:
    """Seconds of one step by class; the backward pass costs two forward ones."""
    tokens = shape.tokens(on.world)
    products = product_seconds(shape, on.card, rates, tokens)
    products += head_seconds(shape, on.card, rates, tokens)
    return Step(
        matmul=3 * products,
        attention=3 * attention_seconds(shape, on.card, rates, tokens),
        loss=loss_seconds(shape, on.card, tokens),
        memory=stream_seconds(shape, on.card, rates, tokens),
        optimiser=optimiser_seconds(shape, on, rates),
        communication=communication_seconds(shape, on),
        overhead=rates.overhead,
    )


def forward_seconds(
    shape: Shape, card: Card, rates: Rates, tokens: float, scored: float, backward: bool = False
) -> float:
    """A pass of one rank over `tokens` inputs of which `scored` get logits; `backward` adds the
    gradients of activations, not of weights. Elementwise traffic is shared as the products are."""
    products = product_seconds(shape, card, rates, tokens)
    products += head_seconds(shape, card, rates, scored)
    attention = attention_seconds(shape, card, rates, tokens)
    traffic = stream_seconds(shape, card, rates, tokens) + loss_seconds(shape, card, scored)
    if backward:
        return 2 * products + 3 * attention + traffic
    return products + attention + traffic / 3


def mfu(shape: Shape, on: Cluster, seconds: float) -> float:
    """Part of the cards' peak: FLOPs of flops_per_token, causal half counted, no optimiser."""
    return shape.flops_per_token * shape.batch_tokens / seconds / (on.world * on.card.peak)


# Published runs ----------------------------------------------------------------------------------
class Published(NamedTuple):
    """One published step time, and what else its log says (None: nothing)."""

    record: str
    shape: Shape
    seconds: float
    peak_gib: float | None
    sliding: float | None  # seconds of the sliding evaluation

    @property
    def family(self) -> tuple:
        """Widths, vocabulary and row length: all runs that share them, whatever their number of
        layers or passes, are held out together."""
        return self.shape.dim, self.shape.hidden, self.shape.vocab, self.shape.seq


def table(name: str) -> list[dict[str, str]]:
    """Rows of a file of the evidence."""
    with open(EVIDENCE / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def published() -> tuple[Published, ...]:
    """The step times of steps.csv, all on eight H100s."""
    found = []
    for row in table("steps.csv"):
        dim, hidden, vocab, seq, slots, batch = (
            int(row[k]) for k in ("dim", "hidden", "vocab", "seq", "slots", "batch_tokens")
        )
        shape = Shape(
            dim,
            hidden,
            vocab,
            seq,
            batch,
            slots,
            block_matrices(dim, hidden, slots),
            keys=PACKED_KEYS if row["documents"] == "packed" else seq / 2,
            parameters=round(float(row["million_params"]) * 1e6),
            attention=row["attention"],
        )
        peak, sliding = (float(row[k]) if row[k] else None for k in ("peak_gib", "sliding_s"))
        found.append(Published(row["record"], shape, float(row["ms"]) / 1e3, peak, sliding))
    return tuple(found)


EIGHT = Cluster(CARDS["h100"], 1, 8)


def fitted(rows: Sequence[Published]) -> Rates:
    """The rates that explain step times best, near those of the profile. Least squares over
    logarithms; an outlier, such as a slow machine, counts little (arctangent)."""
    from scipy.optimize import least_squares

    prior, spread = np.log(PRIOR), np.array(PRIOR_SPREAD)
    seconds = np.log([row.seconds for row in rows])

    def residuals(x):
        rates = Rates(*np.exp(x))
        guess = np.log([step_time(row.shape, EIGHT, rates).seconds for row in rows])
        return np.concatenate([np.arctan((guess - seconds) / NOISE), (x - prior) / spread])

    return Rates(*map(float, np.exp(least_squares(residuals, prior).x)))


@functools.cache
def rates() -> Rates:
    """Fitted to all published step times."""
    return fitted(published())


def held_out(rows: Sequence[Any], family: Callable, predict: Callable) -> list[float]:
    """For each row what `predict(others, row)` says from the rows of other families."""
    made: dict[Any, list] = {}
    for row in rows:
        made.setdefault(family(row), [r for r in rows if family(r) != family(row)])
    return [predict(made[family(row)], row) for row in rows]


class Errors(NamedTuple):
    """Predictions of families that the fit did not see, against what was published."""

    names: list[str]
    truth: list[float]
    guess: list[float]
    families: list[Any]

    @property
    def relative(self) -> np.ndarray:
        return np.array(self.guess) / np.array(self.truth) - 1

    @property
    def median(self) -> float:
        """Median absolute error over rows."""
        return float(np.median(np.abs(self.relative)))

    @property
    def median_of_families(self) -> float:
        """The same with one vote for each family, its rows' median: many runs of one architecture
        do not hide few of another."""
        groups: dict[Any, list[float]] = {}
        for family, error in zip(self.families, np.abs(self.relative)):
            groups.setdefault(family, []).append(error)
        return float(np.median([np.median(errors) for errors in groups.values()]))


def step_errors() -> Errors:
    """Every published step predicted from the other architectures' steps alone."""
    rows = published()

    @functools.cache
    def rates_without(family) -> Rates:
        return fitted([row for row in rows if row.family != family])

    guess = [step_time(r.shape, EIGHT, rates_without(r.family)).seconds for r in rows]
    names = [f"{r.record}, {r.shape.slots} slots" for r in rows]
    return Errors(names, [r.seconds for r in rows], guess, [r.family for r in rows])


# Memory and forward passes -----------------------------------------------------------------------
def memory_terms(shape: Shape, world: int) -> np.ndarray:
    """Bytes of one activation of each kind in a rank's pass: streams, hidden layers, logits."""
    tokens = min(shape.tokens(world), max(shape.pass_tokens // shape.seq, 1) * shape.seq)
    sizes = (shape.slots * shape.dim, shape.slots * shape.hidden, shape.heads * shape.vocab)
    return 2.0 * tokens * np.array(sizes)


STATE_BYTES = 16  # per parameter: weight, gradient, moment, average, fp32


def fitted_memory(rows: Iterable[Published]) -> np.ndarray:
    """How many activations of each kind are alive at the peak."""
    from scipy.optimize import nnls

    rows = [row for row in rows if row.peak_gib]
    peaks = np.array([row.peak_gib * 2**30 for row in rows])
    state = np.array([STATE_BYTES * row.shape.parameters for row in rows])
    terms = np.stack([memory_terms(row.shape, 8) for row in rows])
    return nnls(terms / peaks[:, None], (peaks - state) / peaks)[0]


@functools.cache
def alive() -> np.ndarray:
    """Activations alive at the peak, fitted to all published peaks."""
    return fitted_memory(published())


def peak_bytes(shape: Shape, world: int, counts: np.ndarray | None = None) -> float:
    """Estimated peak memory of training on a rank."""
    counts = alive() if counts is None else counts
    return STATE_BYTES * shape.parameters + float(memory_terms(shape, world) @ counts)


def memory_errors() -> Errors:
    """Every published peak predicted from other architectures' peaks."""
    rows = [row for row in published() if row.peak_gib]
    guess = held_out(
        rows,
        lambda row: row.family,
        lambda others, row: peak_bytes(row.shape, 8, fitted_memory(others)) / 2**30,
    )
    names = [f"{r.record}, {r.shape.slots} slots" for r in rows]
    return Errors(names, [r.peak_gib for r in rows], guess, [r.family for r in rows])


TARGETS = {1024: 62.02e6, 4096: 45.51e6, 8192: 40.54e6}  # of the validation text, by vocabulary
STRIDE = 64  # of the published sliding evaluations


def sliding_model(row: Published, rate: Rates) -> float:
    """Seconds that eight ranks take by rooflines: windows of a row's length, all logits."""
    tokens = TARGETS[row.shape.vocab] * row.shape.seq / STRIDE / 8
    return forward_seconds(row.shape, EIGHT.card, rate, tokens, tokens)


def fitted_slowdown(rows: Iterable[Published]) -> float:
    """Seconds of published sliding evaluations over those of rooflines: median."""
    found = [row.sliding / sliding_model(row, rates()) for row in rows if row.sliding]
    return float(np.median(found))


@functools.cache
def slowdown() -> float:
    """fitted_slowdown of all runs."""
    return fitted_slowdown(published())


def sliding_errors() -> Errors:
    """Every published sliding evaluation predicted from the others'."""
    rows = [row for row in published() if row.sliding]
    guess = held_out(
        rows,
        lambda row: row.family,
        lambda others, row: sliding_model(row, rates()) * fitted_slowdown(others),
    )
    return Errors(
        [r.record for r in rows], [r.sliding for r in rows], guess, [r.family for r in rows]
    )


def efficiency(shape: Shape, card: Card, world: int, rate: Rates) -> float:
    """Tokens per second and card with this batch on machines of eight, over those of one machine
    with it."""
    nodes = max(1, math.ceil(world / 8))
    on = Cluster(card, nodes, world // nodes)
    alone = step_time(shape, Cluster(card, 1, 8), rate).seconds
    return 8 * alone / (world * step_time(shape, on, rate).seconds)

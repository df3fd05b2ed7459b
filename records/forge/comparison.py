"""What counts as better. The search may follow luck; a claim must survive paired looks and then
fresh seeds.

Scores are bits per byte, lower is better. sigma is the standard deviation of one configuration's
score over seeds on one rung and one class of hosts, sigma_d that of the difference of two runs.
Error rates of `look` + `fresh_test` (20 degrees of freedom, differences in sigma_d): a change that
does nothing is accepted in about 0.3 % of cases, one worth 2 in about 91 %;
tests/test_forge_statistics.py simulates both.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

# Pairs so far: go to fresh seeds when t is below the first, reject when it is above the second.
LOOKS = {1: (-3.0, -0.25), 2: (-2.5, -0.5), 3: (-2.2, -0.8), 5: (-1.9, -1.9)}
FRESH = 3  # runs per arm of the last test
ALPHA = 0.05  # its one-sided level
SUSPICION = 0.2  # chance that a design without interactions suspects one
PAIRABLE = 6  # most changes among which a design of twelve runs can tell the pairs apart


class Noise(NamedTuple):
    """Standard deviation of one run in bits per byte, and the degrees of freedom behind it."""

    sigma: float
    df: float

    @property
    def sigma_d(self) -> float:
        return math.sqrt(2) * self.sigma


class Test(NamedTuple):
    """A one-sided comparison: mean difference, two-sided 95 % interval, t, degrees of freedom, p
    for "not lower"."""

    delta: float
    low: float
    high: float
    t: float
    df: float
    p: float


def noise(groups: Sequence[Sequence[float]], prior_sigma: float, prior_df: float = 1.0) -> Noise:
    """Pooled over groups of replicates, shrunk towards a prior with its own degrees of freedom."""
    groups = [np.asarray(g, float) for g in groups if len(g) > 1]
    squares = sum(((g - g.mean()) ** 2).sum() for g in groups)
    df = sum(len(g) - 1 for g in groups)
    return Noise(math.sqrt((prior_df * prior_sigma**2 + squares) / (prior_df + df)), prior_df + df)


def compare(new: Sequence[float], old: Sequence[float], noise: Noise) -> Test:
    """Difference of means under a known pooled noise."""
    delta = float(np.mean(new) - np.mean(old))
    error = noise.sigma * math.sqrt(1 / len(new) + 1 / len(old))
    half = stdtrit(noise.df, 0.975) * error
    t = delta / error
    return Test(delta, delta - half, delta + half, t, noise.df, float(stdtr(noise.df, t)))


def look(differences: Sequence[float], sigma_d: float) -> str:
    """What to do after this many paired differences (new minus old): "fresh", "reject" or
    "more"."""
    n = len(differences)
    if n not in LOOKS:
        return "more"
    t = float(np.mean(differences)) / (sigma_d / math.sqrt(n))
    accept, reject = LOOKS[n]
    if t < accept:
        return "fresh"
    return "reject" if t > reject else "more"


def next_look(pairs: int) -> int:
    """How many pairs the next look needs."""
    return min(n for n in LOOKS if n > pairs)


def fresh_test(new: Sequence[float], old: Sequence[float], noise: Noise) -> tuple[bool, Test]:
    """The deciding test on seeds that nothing was chosen by: whether the new arm is lower at level
    ALPHA."""
    test = compare(new, old, noise)
    return test.p < ALPHA, test


def anchor_step(
    new: Sequence[float],
    anchor: Sequence[float],
    sigma: float,
    race_above: float = 0.0025,
    limit: int = 5,
) -> str:
    """Whether the search moves to a configuration: "move", "stay", or one more seed for the "new"
    or the "anchor".

    Quiet rungs decide by one run that is a sigma below the anchor's mean. Noisy ones race: while
    the challenger is ahead both sides get further seeds, up to `limit`, until the means differ by
    half their standard error.
    """
    gap = float(np.mean(new) - np.mean(anchor))
    if sigma <= race_above:
        return "move" if gap < -sigma else "stay"
    if gap >= 0:
        return "stay"
    n, m = len(new), len(anchor)
    if n >= 2 and gap < -0.5 * sigma * math.sqrt(1 / n + 1 / m):
        return "move"
    if n >= limit and m >= limit:
        return "stay"
    return "new" if n <= m and n < limit or m >= limit else "anchor"


def minimal_gain(rung: str, noise: Noise) -> float:
    """The smallest difference worth knowing: 0.0005 bits per byte on `target`, one sigma
    elsewhere."""
    return 0.0005 if rung == "target" else noise.sigma


def plackett_burman(factors: int) -> np.ndarray:
    """(12, factors) of +1 (change kept) and -1 (change undone): main effects of up to 11 changes in
    12 runs. Source: Plackett and Burman 1946."""
    if not 1 <= factors <= 11:
        raise ValueError(f"{factors} factors: want 1 to 11")
    row = np.array([1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1])
    return np.vstack([np.stack([np.roll(row, i) for i in range(11)]), -np.ones(11, int)])[
        :, :factors
    ].astype(int)


def effects(design: np.ndarray, scores: Sequence[float], noise: Noise) -> list[Test]:
    """Each change's own effect: mean with it minus mean without it."""
    y = np.asarray(scores, float)
    return [compare(y[column > 0], y[column < 0], noise) for column in design.T]


def suspect(
    design: np.ndarray, scores: Sequence[float], noise: Noise, known: Sequence[tuple[int, int]] = ()
) -> tuple[int, int] | None:
    """The pair of changes that a design suspects most of helping or harming each other, or None.

    A pair is suspected when the part of its product column that neither the main effects nor the
    `known` pairs can imitate follows the scores: |t| beyond the two-sided level SUSPICION, shared
    among all pairs (Bonferroni). That part is 1 - (factors - 2) / 9 of a column. Beyond PAIRABLE
    changes nothing is suspected: there the parts of several pairs are the same. After Hamada and Wu
    1992 on the interactions that such designs hide.
    """
    if np.shape(design)[1] > PAIRABLE:
        return None
    design = np.asarray(design, float)
    y = np.asarray(scores, float)
    found = []

    def product(pair: tuple[int, int]) -> np.ndarray:
        return design[:, pair[0]] * design[:, pair[1]]

    model = np.column_stack([np.ones(len(y)), design, *map(product, known)])
    for pair in itertools.combinations(range(design.shape[1]), 2):
        own = product(pair) - model @ np.linalg.lstsq(model, product(pair), rcond=None)[0]
        if pair not in known:
            found.append((abs(float(own @ y)) / math.sqrt(own @ own) / noise.sigma, pair))
    most = max(found, default=(0.0, None))
    return most[1] if found and most[0] > -stdtrit(noise.df, SUSPICION / 2 / len(found)) else None


def interaction(
    both: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    none: Sequence[float],
    noise: Noise,
) -> Test:
    """What two changes do together beyond the sum of what each does alone: negative when they help
    each other. It is claimed when the two-sided 95 % interval excludes zero."""
    groups = [np.asarray(g, float) for g in (both, first, second, none)]
    delta = float(sum(sign * g.mean() for sign, g in zip((1, -1, -1, 1), groups)))
    error = noise.sigma * math.sqrt(sum(1 / len(g) for g in groups))
    half = stdtrit(noise.df, 0.975) * error
    t = delta / error
    return Test(delta, delta - half, delta + half, t, noise.df, float(stdtr(noise.df, t)))


def carries(test: Test) -> bool:
    """Whether a change may stay after an ablation: the one-sided 80 % bound of its effect lies
    below zero."""
    return test.delta + stdtrit(test.df, 0.8) * abs(test.delta / test.t if test.t else 0.0) < 0


def best_corner(corners: dict[tuple[int, int], Sequence[float]], noise: Noise) -> tuple[int, int]:
    """The settings (+1 or -1) of two changes with the lowest mean, less those changes that do not
    carry there."""
    best = min(corners, key=lambda c: float(np.mean(corners[c])))
    for i in (0, 1):
        without = (-1, best[1]) if i == 0 else (best[0], -1)
        if best[i] > 0 and not carries(compare(corners[best], corners[without], noise)):
            best = without
    return best

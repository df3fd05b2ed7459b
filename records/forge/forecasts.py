"""What a small run says about a large one: rank transfer between rungs, and where a learning curve
will end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from .space import Space
from .state import State

TOO_FEW = 8  # shared configurations: with fewer, no statement
ENOUGH = 12  # from here on, a rule
TRANSFERS = 0.4  # least lower bound of tau
FAILS = 0.3  # greatest upper bound of tau
FORECAST_FROM = 8  # finished runs before a forecast
HOPELESS = 0.05  # chance below which a run is not worth its end
PRIOR = dict(
    schedule="does not transfer",
    batch="does not transfer",
    eval="does not transfer",
    shape="transfers",
)


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of the last axis: 1 for the same order, -1 for the opposite one. Batches give
    batches."""
    i, j = np.triu_indices(x.shape[-1], 1)
    a, b = np.sign(x[..., i] - x[..., j]), np.sign(y[..., i] - y[..., j])
    norm = np.sqrt((a != 0).sum(-1) * (b != 0).sum(-1))
    return (a * b).sum(-1) / np.where(norm == 0, 1, norm)


def transfer(
    low: Sequence[float],
    high: Sequence[float],
    base: tuple[float, float] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether the order on one rung holds on the next, from configurations that ran on both.

    tau with a bootstrap 80 % interval, the part of configurations whose difference to the base
    keeps its sign, the loss of choosing the lower rung's best, and a word: "transfers", "does not
    transfer", "unknown", or "too few".
    """
    x, y = np.asarray(low, float), np.asarray(high, float)
    if len(x) != len(y):
        raise ValueError("scores of the same configurations on two rungs")
    if len(x) < TOO_FEW:
        return dict(n=len(x), word="too few")
    rows = np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))
    tau = float(kendall(x, y))
    (lo, hi) = np.quantile(kendall(x[rows], y[rows]), [0.1, 0.9])
    word = "unknown"
    if len(x) >= ENOUGH:
        if lo >= TRANSFERS:
            word = "transfers"
        elif hi <= FAILS:
            word = "does not transfer"
    signs = float((np.sign(x - base[0]) == np.sign(y - base[1])).mean()) if base else None
    return dict(
        n=len(x),
        tau=tau,
        low=float(lo),
        high=float(hi),
        signs=signs,
        regret=float(y[x.argmin()] - y.min()),
        word=word,
    )


def report(state: State, space: Space) -> list[dict]:
    """Transfer of every pair of neighbouring rungs, for all configurations and per knob class."""
    rungs = [r for r in state.config["rungs"] if r in state.reference]
    found = []
    for lower, upper in zip(rungs, rungs[1:]):
        shared = {}
        for x in state.experiments.values():
            a, b = state.scores(x.change, lower), state.scores(x.change, upper)
            if a and b and x.change:
                shared[x.cid] = (float(np.mean(a)), float(np.mean(b)), space.classes(x.change, {}))
        base = tuple(float(np.mean(state.reference[r]["scores"])) for r in (lower, upper))
        for klass in ("all", *sorted({k for s in shared.values() for k in s[2]})):
            mine = [s for s in shared.values() if klass == "all" or klass in s[2]]
            points = [s[:2] for s in mine]
            found.append(
                dict(
                    lower=lower,
                    upper=upper,
                    klass=klass,
                    prior=PRIOR.get(klass, "unknown"),
                    points=points,
                    **transfer([p[0] for p in points], [p[1] for p in points], base),
                )
            )
    return found


# ---- Forecasts -----------------------------------------------------------------------------------
def forecast(
    seen: Sequence[tuple[float, float]], reading: float, bar: float, level: float = 0.9
) -> dict | None:
    """Where a run will end whose training loss partway is `reading`, from the finished runs of its
    rung: (their loss at the same part of the run, their score). {"low", "middle", "high"} of a new
    score at `level`, and the chance that it ends below `bar`. None with fewer than FORECAST_FROM
    finished runs, or when all their readings are equal.

    Ordinary least squares with its prediction interval: the shape of the curve behind that part,
    decay of the rate included, is what finished runs share. After Baker et al. 2017, arXiv
    1705.10823.
    """
    x, y = np.array(seen, float).reshape(-1, 2).T
    if len(x) < FORECAST_FROM or not np.ptp(x):
        return None
    df = len(x) - 2
    square = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / square
    middle = float(y.mean() + slope * (reading - x.mean()))
    rest = y - y.mean() - slope * (x - x.mean())
    error = (
        float(np.sqrt((rest**2).sum() / df * (1 + 1 / len(x) + (reading - x.mean()) ** 2 / square)))
        + 1e-12
    )
    half = float(stdtrit(df, (1 + level) / 2)) * error
    return dict(
        low=middle - half,
        middle=middle,
        high=middle + half,
        chance=float(stdtr(df, (bar - middle) / error)),
    )


def calibration(state: State) -> tuple[int, float]:
    """How many of the last 20 forecasts have met their score, and the part of them that covered
    it."""
    met = [
        r.forecast["low"] <= r.score <= r.forecast["high"]
        for r in state.runs.values()
        if r.forecast and r.score is not None
    ][-20:]
    return len(met), sum(met) / len(met) if met else 0.0


def trusted(state: State) -> bool:
    """Whether forecasts have shown that they may end runs: five have met their score, three of four
    covered it."""
    n, covered = calibration(state)
    return n >= 5 and covered >= 0.75


# ---- Projection ----------------------------------------------------------------------------------
def constant_part(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The readings [tokens, bits per byte, learning-rate multiplier] before the rate first changes:
    a power law across a change of rate would describe the schedule, not the model."""
    kept: list[tuple[float, float]] = []
    for row in curve:
        if len(row) > 2 and kept and row[2] != curve[0][2]:
            break
        kept.append((row[0], row[1]))
    return kept


def project(
    curve: Sequence[Sequence[float]],
    tokens: float | Sequence[float],
    sigma: float = 0.002,
    level: float = 0.9,
) -> dict[str, Any]:
    """Where bits per byte = c + a * tokens^-alpha will be, as an interval at `level` for a new
    reading.

    A grid posterior over c (uniform below the lowest reading) and alpha (normal, 0.45 +- 0.2), `a`
    by least squares, readings with noise `sigma`. Raises ValueError below three readings at
    constant rate.
    """
    points = constant_part(curve)
    if len(points) < 3:
        raise ValueError(f"{len(points)} readings at constant rate, want at least 3")
    t, y = np.array(points, float).T
    want = np.atleast_1d(np.asarray(tokens, float))
    scale = t[-1]
    alphas = np.linspace(0.02, 1.2, 119)
    # c uniform from zero to the lowest reading; the amplitude integrates out under a flat prior,
    # given its maximum.
    cs = y.min() - (y.min() - 0.0) * np.linspace(0, 1, 400) ** 2
    basis = (t / scale) ** -alphas[:, None]  # (A, n)
    rest = y[None, :] - cs[:, None]  # (C, n)
    norm = (basis**2).sum(1)
    a = np.maximum(rest @ basis.T / norm, 0.0)  # (C, A)
    error = ((rest[:, None, :] - a[..., None] * basis[None]) ** 2).sum(-1)
    width = np.abs(np.gradient(cs))  # of each grid cell of c
    log = (
        -error / (2 * sigma**2)
        - 0.5 * ((alphas - 0.45) / 0.2) ** 2
        + np.log(width + 1e-300)[:, None]
    )
    weight = np.exp(log - log.max()).ravel()
    weight /= weight.sum()
    rng = np.random.default_rng(0)
    out = []
    pick = rng.choice(len(weight), 8000, p=weight)
    noise = rng.normal(0, sigma, len(pick))
    fitted_error = sigma / np.sqrt(norm)[None, :]  # of a, given c and alpha
    amplitude = (
        a.ravel()[pick]
        + rng.normal(0, 1, len(pick)) * np.broadcast_to(fitted_error, a.shape).ravel()[pick]
    )
    exponent = np.broadcast_to(alphas, a.shape).ravel()[pick]
    floor = np.repeat(cs, len(alphas))[pick]
    for w in want:
        values = floor + amplitude * (w / scale) ** -exponent + noise
        out.append(np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2]))
    low, middle, high = np.array(out).T
    return dict(
        tokens=want.tolist(),
        low=low.tolist(),
        middle=middle.tolist(),
        high=high.tolist(),
        n=len(points),
    )

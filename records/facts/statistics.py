"""Tests, intervals and the numbers of seeds that they need. Scores are bits per byte: less is
better."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000


MAX_DOCUMENTS = 1 << 22


def margin_in_bpb(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte that a difference of nats per token is worth."""
    return nats_per_token / math.log(2) / bytes_per_token


def welch(base: np.ndarray, new: np.ndarray, margin: float = 0.0) -> dict[str, Any]:
    """One-sided Welch test of H0: mean(base) - mean(new) <= margin, with a two-sided 95 % interval
    of the gain. Raises ValueError when the seeds of neither group vary."""
    if min(len(base), len(new)) < 2:
        return dict(p=None, low=None, high=None, df=None)
    if np.ptp(base) == 0 and np.ptp(new) == 0:
        raise ValueError(
            "the seeds of neither group differ in score; nothing can be said about noise"
        )
    test = stats.ttest_ind(base - margin, new, equal_var=False, alternative="greater")
    both = stats.ttest_ind(base, new, equal_var=False).confidence_interval(0.95)
    return dict(p=float(test.pvalue), low=float(both.low), high=float(both.high), df=float(test.df))


def paired(base: np.ndarray, new: np.ndarray, margin: float = 0.0) -> dict[str, Any]:
    """The same with one pair per seed: what a seed does to both cancels."""
    gains = base - new
    if np.ptp(gains) == 0:
        raise ValueError("all seeds gain the same; nothing can be said about noise")
    both = stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    return dict(
        p=float(stats.ttest_1samp(gains, margin, alternative="greater").pvalue),
        low=float(both.low),
        high=float(both.high),
        df=float(len(gains) - 1),
    )


def pooled_sd(*groups: np.ndarray) -> float | None:
    """Standard deviation of a seed around the mean of its group; None without a group of two."""
    freedom = sum(len(g) - 1 for g in groups)
    return (
        math.sqrt(sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / freedom)
        if freedom
        else None
    )


def smallest_significant(n: int, sd: float, alpha: float = 0.01) -> float:
    """Observed gain from which n seeds against n seeds reach p < alpha, one-sided."""
    return float(stats.t.ppf(1 - alpha, 2 * n - 2)) * sd * math.sqrt(2 / n)


def seeds_needed(
    gain: float, sd: float, alpha: float = 0.01, power: float = 0.8, most: int = 200
) -> int | None:
    """Fewest seeds of each group with which a true gain is seen with that probability; None = more
    than `most`."""
    for n in range(2, most + 1) if gain > 0 and sd > 0 else ():
        df = 2 * n - 2
        if stats.nct.sf(stats.t.ppf(1 - alpha, df), df, gain / (sd * math.sqrt(2 / n))) >= power:
            return n
    return None


def holm(p: list[float | None]) -> list[float | None]:
    """Holm's adjusted p-values of a family of tests; unknown ones stay unknown and do not count."""
    order = sorted((i for i, x in enumerate(p) if x is not None), key=lambda i: p[i])
    adjusted, worst = list(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def read_documents(path: Path) -> np.ndarray:
    """(documents, 2) float64: nats and bytes of each. Raises ValueError naming the file."""
    if path.stat().st_size > 8 * MAX_DOCUMENTS + 4096:
        raise ValueError(f"{path.name}: {path.stat().st_size:,} bytes")
    array = np.load(path, allow_pickle=False)
    if (
        array.ndim != 2
        or array.shape[1] != 2
        or array.dtype != np.float32
        or not np.isfinite(array).all()
        or not len(array)
        or (array[:, 1] < 0).any()
        or array[:, 1].sum() == 0
    ):
        raise ValueError(
            f"{path.name}: want float32 (documents, 2), nats and bytes of each document"
        )
    return array.astype(np.float64)


def document_bootstrap(
    base: np.ndarray,
    new: np.ndarray,
    margin: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Gain in bits per byte of two evaluations of the same documents, resampled by document: both
    scores see the same draw. Takes (documents, 2) arrays of nats and bytes. Raises ValueError when
    they are not of the same documents."""
    if base.shape != new.shape or not np.array_equal(base[:, 1], new[:, 1]):
        raise ValueError("the per-document losses are not of the same documents")
    if len(base) < 2:
        raise ValueError("one document cannot be resampled")
    gain, size = base[:, 0] - new[:, 0], base[:, 1]
    rng, n, drawn = np.random.default_rng(seed), len(gain), []
    chunk = max(1, 4_000_000 // n)
    for first in range(0, resamples, chunk):
        rows = rng.integers(n, size=(min(chunk, resamples - first), n))
        drawn.append(gain[rows].sum(1) / size[rows].sum(1) / math.log(2))
    values = np.concatenate(drawn)
    low, high = np.quantile(values, (0.025, 0.975))
    at_most = float(((values <= margin).sum() + 1) / (resamples + 1))
    return dict(
        documents=n,
        gain=float(gain.sum() / size.sum() / math.log(2)),
        low=float(low),
        high=float(high),
        p=at_most,
        resamples=resamples,
    )

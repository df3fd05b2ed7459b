"""Is one group of runs better than another? Effects with intervals first, p-values second, units always said.

A score is in bits per byte. The rule's margin of 0.005 nats is per token, so it is worth a different number of bits per
byte for every tokenizer; it is converted by the ratio of bytes to tokens of the new group, which is printed.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from folder import read_folder
from logs import Log, read_log
from scipy import stats

MARGIN_NATS = 0.005
RESAMPLES = 2000
MAX_DOCUMENTS = 1 << 22
# What two lineages have in common when a seed means the same start and the same order of text in both.
LINEAGE = (
    "vocab_size",
    "train_seq_len",
    "train_batch_tokens",
    "loader",
    "num_layers",
    "model_dim",
    "init",
    "embed_init",
    "mlp_mult",
    "num_heads",
    "num_kv_heads",
)


@dataclass
class Group:
    """Runs of one configuration, by seed."""

    name: str
    logs: dict[int, Log]
    documents: dict[int, Path] = field(default_factory=dict)  # doc_loss files

    @property
    def seeds(self) -> list[int]:
        return sorted(self.logs)

    @property
    def scores(self) -> np.ndarray:
        return np.array([self.logs[s].official.bpb for s in self.seeds])

    @property
    def bytes_per_token(self) -> float:
        """What the logs' losses and scores imply, the same for every run of one text and tokenizer."""
        return float(
            np.mean([g.official.loss / math.log(2) / g.official.bpb for g in self.logs.values()])
        )


def read_group(text: str) -> Group:
    """A record folder, or run folders joined by commas. Raises ValueError naming what is wrong."""
    logs, documents = {}, {}
    for part in map(Path, text.split(",")):
        if (part / "log.txt").is_file():
            found = [(read_log(part / "log.txt"), part / "doc_loss.npy")]
        else:
            folder = read_folder(part)
            found = [(g, part / f"doc_loss_seed{g.seed}.npy") for g in folder.seed_logs]
        for log, document in found:
            if log.official is None or not log.finished:
                raise ValueError(f"{part}/{Path(log.name).name}: has no final score")
            if log.seed is None or log.seed in logs:
                raise ValueError(
                    f"{part}/{Path(log.name).name}: seed {log.seed} is unknown or stands twice"
                )
            logs[log.seed] = log
            if document.is_file() and not document.is_symlink():
                documents[log.seed] = document
    if not logs:
        raise ValueError(f"{text}: no logs of finished runs")
    return Group(text.split(",")[0].rstrip("/").rsplit("/", 1)[-1], logs, documents)


def margin_in_bpb(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte that a difference of nats per token is worth."""
    return nats_per_token / math.log(2) / bytes_per_token


def welch(base: np.ndarray, new: np.ndarray, margin: float = 0.0) -> dict[str, Any]:
    """One-sided Welch test of H0: mean(base) - mean(new) <= margin, with a two-sided 95 % interval of the gain.
    Raises ValueError when the seeds of neither group vary."""
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
    """Fewest seeds of each group with which a true gain is seen with that probability; None = more than `most`."""
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
    """Gain in bits per byte of two evaluations of the same documents, resampled by document: both scores see the same
    draw. Takes (documents, 2) arrays of nats and bytes. Raises ValueError when they are not of the same documents."""
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


def lineage(base: Group, new: Group) -> list[str]:
    """Why seeds cannot be paired; empty when they can."""
    one, other = base.logs[base.seeds[0]], new.logs[new.seeds[0]]
    reasons = [] if base.seeds == new.seeds and len(base.seeds) > 1 else ["other seeds"]
    reasons += [f"other {k}" for k in LINEAGE if one.knobs.get(k) != other.knobs.get(k)]
    reasons += [] if one.parameters == other.parameters else ["another number of parameters"]
    return reasons + ([] if one.manifest == other.manifest else ["other data"])


def document_gains(base: Group, new: Group, margin: float) -> list[dict[str, Any]]:
    """Document bootstrap of each seed that both groups kept losses of."""
    found = []
    for seed in sorted(set(base.documents) & set(new.documents)):
        tables = [read_documents(group.documents[seed]) for group in (base, new)]
        if len(tables[0]) == len(tables[1]) == 1:  # a smoke test's text
            continue
        result = document_bootstrap(*tables, margin)
        same = base.logs[seed].artifact_sha256
        found.append(
            dict(
                seed=seed, same_artifact=same is not None and same == new.logs[seed].artifact_sha256
            )
            | result
        )
    return found


def compare(
    base: Group, new: Group, pair: bool = False, margin_nats: float = MARGIN_NATS
) -> dict[str, Any]:
    """Everything that is said about two groups. Raises ValueError when they cannot be compared."""
    texts = [
        g.implied_bytes for group in (base, new) for g in group.logs.values() if g.implied_bytes
    ]
    if texts and max(texts) > 1.002 * min(texts):
        raise ValueError(
            f"{base.name} and {new.name} were not scored on the same text "
            f"({min(texts):,.0f} and {max(texts):,.0f} bytes)"
        )
    if pair and (reasons := lineage(base, new)):
        raise ValueError(
            f"seeds of {base.name} and {new.name} cannot be paired: {', '.join(reasons)}"
        )
    a, b, ratio = base.scores, new.scores, new.bytes_per_token
    margin, test = margin_in_bpb(margin_nats, ratio), paired if pair else welch
    sd, plain = pooled_sd(a, b), test(a, b)
    gain = float(a.mean() - b.mean())
    return dict(
        base=dict(name=base.name, seeds=base.seeds, mean=float(a.mean()), sd=pooled_sd(a)),
        new=dict(name=new.name, seeds=new.seeds, mean=float(b.mean()), sd=pooled_sd(b)),
        test="paired_one_sided" if pair else "welch_one_sided",
        gain_bpb=gain,
        low=plain["low"],
        high=plain["high"],
        gain_nats_per_token=gain * math.log(2) * ratio,
        bytes_per_token=ratio,
        margin_nats_per_token=margin_nats,
        margin_bpb=margin,
        p_any_gain=plain["p"],
        p_margin=test(a, b, margin)["p"],
        pooled_sd=sd,
        smallest_significant=sd and smallest_significant(max(2, min(len(a), len(b))), sd),
        seeds_needed_any=sd and seeds_needed(gain, sd),
        seeds_needed_margin=sd and seeds_needed(gain - margin, sd),
        documents=document_gains(base, new, 0.0),
    )


def compare_all(
    texts: list[str], pair: bool = False, margin_nats: float = MARGIN_NATS
) -> list[dict[str, Any]]:
    """Each group with the one before it; p-values of a chain are corrected by Holm's method."""
    groups = [read_group(t) for t in texts]
    results = [compare(a, b, pair, margin_nats) for a, b in zip(groups, groups[1:])]
    for key in ("p_any_gain", "p_margin"):
        for result, p in zip(results, holm([r[key] for r in results])):
            result[f"{key}_holm"] = p
    return results


def record_statistics(folder: Path, r: dict[str, Any]):
    """Put a comparison into the new record's submission.json and README. Raises ValueError when there is none."""
    from snapshot import refreshed

    path = folder / "submission.json"
    submission = json.loads(path.read_text()) if path.is_file() else {}
    if "evidence" not in submission:
        raise ValueError(f"{folder}: --write wants a record folder that `new` made")
    submission["evidence"]["statistics"] = dict(
        baseline=r["base"]["name"],
        test=r["test"],
        delta_bpb=r["gain_bpb"],
        delta_nats_per_token=r["gain_nats_per_token"],
        margin_nats_per_token=r["margin_nats_per_token"],
        p_value=r["p_margin"],
        p_any_gain=r["p_any_gain"],
        n=[len(r["base"]["seeds"]), len(r["new"]["seeds"])],
    )
    path.write_text(json.dumps(submission, indent=1))
    (folder / "README.md").write_text(refreshed(folder))


def show_p(p: float | None) -> str:
    return "unknown (one seed)" if p is None else f"{p:.2g}"


def as_text(r: dict[str, Any], chain: bool = False) -> str:
    """A result for people."""

    def group(g: dict) -> str:
        return (
            f"{g['mean']:.5f}"
            + (f" ± {g['sd']:.5f}" if g["sd"] is not None else "")
            + f" (n={len(g['seeds'])})"
        )

    interval = (
        f", 95 % interval {r['low']:+.5f} to {r['high']:+.5f}" if r["low"] is not None else ""
    )
    lines = [
        f"{r['base']['name']}  {group(r['base'])}  ->  {r['new']['name']}  {group(r['new'])}   bits per byte",
        f"gain             {r['gain_bpb']:+.5f} bits per byte = {r['gain_nats_per_token']:+.5f} nats per token"
        + interval,
        f"margin           {r['margin_nats_per_token']} nats per token = {r['margin_bpb']:.5f} bits per byte at "
        f"{r['bytes_per_token']:.5f} bytes per token",
        f"{r['test']:17}p = {show_p(r['p_any_gain'])} for any gain, p = {show_p(r['p_margin'])} for more than the "
        "margin",
    ]
    if chain:
        lines.append(
            f"{'Holm':17}p = {show_p(r['p_any_gain_holm'])} and {show_p(r['p_margin_holm'])} in this chain"
        )
    if r["pooled_sd"]:
        needed = [
            str(n or "more than 200") for n in (r["seeds_needed_any"], r["seeds_needed_margin"])
        ]
        lines.append(
            f"power            with a seed's deviation of {r['pooled_sd']:.5f} these seeds reach p < 0.01 "
            f"from {r['smallest_significant']:.5f} on; to show this gain in 4 of 5 tries takes {needed[0]} "
            f"seeds each, beyond the margin {needed[1]}"
        )
    for d in r["documents"]:
        lines.append(
            f"documents        seed {d['seed']}: {d['gain']:+.5f} ({d['low']:+.5f} to {d['high']:+.5f}, p = "
            f"{d['p']:.2g}, {d['documents']:,} documents), "
            + (
                "the same artifact"
                if d["same_artifact"]
                else "of these two artifacts; says nothing about other seeds"
            )
        )
    return "\n".join(lines)

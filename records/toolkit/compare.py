"""Is one group of runs better than another? Effects with intervals first, p-values second, units
always said.

A score is in bits per byte. The rule's margin of 0.005 nats is per token, so it is worth a
different number of bits per byte for every tokenizer; it is converted by the ratio of bytes to
tokens of the new group, which is printed.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from facts.files import write_atomic
from facts.folder import read_folder
from facts.limits import MARGIN_NATS
from facts.logs import Log, read_log
from facts.statistics import (
    document_bootstrap,
    holm,
    margin_in_bpb,
    paired,
    pooled_sd,
    read_documents,
    seeds_needed,
    smallest_significant,
    welch,
)

from .readme import refreshed

# What two lineages have in common when a seed means the same start and the same order of text in
# both. The first ones must be known: a log that does not print them says nothing about its lineage.
NECESSARY = ("train_seq_len", "train_batch_tokens", "num_layers", "model_dim")
LINEAGE = (
    *NECESSARY,
    "loader",
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
        """What the logs' losses and scores imply, the same for every run of one text and
        tokenizer."""
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


def lineage(base: Group, new: Group) -> list[str]:
    """Why seeds cannot be paired, each reason once; empty when they can. What is unknown is a
    reason."""
    if base.seeds != new.seeds or len(base.seeds) < 2:
        return ["other seeds"]
    found = [r for s in base.seeds for r in other_lineage(base.logs[s], new.logs[s])]
    return list(dict.fromkeys(found))


def other_lineage(one: Log, other: Log) -> Iterator[str]:
    """Reasons why one seed does not mean the same start and order of text in two logs."""
    for name in LINEAGE:
        values = one.knobs.get(name), other.knobs.get(name)
        if name in NECESSARY and None in values:
            yield f"unknown {name}"
        elif values[0] != values[1]:
            yield f"other {name}"
    facts = dict(
        vocabulary=(one.vocabulary, other.vocabulary),
        parameters=(one.parameters, other.parameters),
        data=known(one.manifest, other.manifest, one.train_shards, other.train_shards),
        tokenizer=known(
            one.tokenizer_sha256, other.tokenizer_sha256, one.val_tokens, other.val_tokens
        ),
    )
    for name, (a, b) in facts.items():
        if a is None or b is None:
            yield f"unknown {name}"
        elif a != b:
            yield f"other {name}"


def known(one: Any, other: Any, second: Any, second_other: Any) -> tuple[Any, Any]:
    """A pair of facts: the hashes where both logs have one, else what stands for them (numbers of
    shards or of tokens of the same text), which logs of other scripts print."""
    return (one, other) if one is not None and other is not None else (second, second_other)


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
    reasons = lineage(base, new) if pair else []
    if reasons:
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
    """Put a comparison into the new record's submission.json and README. Raises ValueError when
    there is none."""
    path = folder / "submission.json"
    submission = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
    write_atomic(path, json.dumps(submission, indent=1))
    write_atomic(folder / "README.md", refreshed(folder))


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
    base, new = r["base"], r["new"]
    lines = [
        f"{base['name']}  {group(base)}  ->  {new['name']}  {group(new)}   bits per byte",
        f"gain             {r['gain_bpb']:+.5f} bits per byte = "
        f"{r['gain_nats_per_token']:+.5f} nats per token{interval}",
        f"margin           {r['margin_nats_per_token']} nats per token = "
        f"{r['margin_bpb']:.5f} bits per byte at {r['bytes_per_token']:.5f} bytes per token",
        f"{r['test']:17}p = {show_p(r['p_any_gain'])} for any gain, "
        f"p = {show_p(r['p_margin'])} for more than the margin",
    ]
    if chain:
        lines.append(
            f"{'Holm':17}p = {show_p(r['p_any_gain_holm'])} and {show_p(r['p_margin_holm'])} "
            "in this chain"
        )
    if r["pooled_sd"]:
        needed = [
            str(n or "more than 200") for n in (r["seeds_needed_any"], r["seeds_needed_margin"])
        ]
        lines.append(
            f"power            with a seed's deviation of {r['pooled_sd']:.5f} these seeds reach "
            f"p < 0.01 from {r['smallest_significant']:.5f} on; to show this gain in 4 of 5 tries "
            f"takes {needed[0]} seeds each, beyond the margin {needed[1]}"
        )
    for d in r["documents"]:
        lines.append(
            f"documents        seed {d['seed']}: {d['gain']:+.5f} ({d['low']:+.5f} to "
            f"{d['high']:+.5f}, p = {d['p']:.2g}, {d['documents']:,} documents), "
            + (
                "the same artifact"
                if d["same_artifact"]
                else "of these two artifacts; says nothing about other seeds"
            )
        )
    return "\n".join(lines)

"""One page about a run or a record: a single HTML file with its pictures inside, no script and nothing to load."""

import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from facts.limits import ARTIFACT_BYTES
from facts.logs import Log, read_ends, read_log
from facts.statistics import read_documents

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{border:1px solid #ccc;
padding:.2rem .6rem;text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}
.note{color:#666}"""


@dataclass
class Curve:
    """What one run said while it ran."""

    name: str
    log: Log
    train: list[tuple[int, float, float]] = field(default_factory=list)  # step, nats, seconds
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, bits per byte
    ramps: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl
    last_step: int = 0  # at which the run ends or would end
    documents: np.ndarray | None = None
    artifact: Path | None = None
    analysis: dict[str, Any] = field(default_factory=dict)  # what `analyze` left


def read_curve(log_path: Path, beside: dict[str, Path]) -> Curve:
    """A run's log, and what lies beside it: metrics, doc_loss, artifact."""
    text, _ = read_ends(log_path)
    curve = Curve(
        log_path.stem if log_path.name != "log.txt" else log_path.parent.name, read_log(log_path)
    )
    for step, limit, loss, spent, left in re.findall(
        r"^step:(\d+)/(\d+) train_loss:(\S+) train_time:(\d+)ms \S+ \S+ left:(\d+)s",
        text,
        re.MULTILINE,
    ):
        curve.train.append((int(step), float(loss), int(spent) / 1e3))
        if not curve.log.finished:
            pace = int(step) / max(int(spent), 1)
            curve.last_step = min(int(limit), int(step) + round(1e3 * int(left) * pace))
    curve.validation = [
        (int(step), float(bpb))
        for step, bpb in re.findall(
            r"^step:(\d+)/\d+ val_loss:\S+ val_bpb:(\S+)", text, re.MULTILINE
        )
    ]
    curve.last_step = curve.last_step or (curve.train[-1][0] if curve.train else 0)
    if beside["metrics"].is_file():
        lines = [
            json.loads(line)
            for line in read_ends(beside["metrics"])[0].splitlines()
            if line.endswith("}")
        ]
        curve.ramps = [line for line in lines if line.get("event") == "train"]
    if beside["documents"].is_file():
        curve.documents = read_documents(beside["documents"])
    if beside["analysis"].is_file():
        curve.analysis = json.loads(beside["analysis"].read_text())
    curve.artifact = beside["artifact"] if beside["artifact"].is_file() else None
    return curve


def read_curves(folder: Path) -> list[Curve]:
    """The run of a run folder or every seed of a record. Raises ValueError when there is none."""
    if (folder / "log.txt").is_file():
        return [
            read_curve(
                folder / "log.txt",
                dict(
                    metrics=folder / "metrics.jsonl",
                    documents=folder / "doc_loss.npy",
                    artifact=folder / "model.golf",
                    analysis=folder / "analysis.json",
                ),
            )
        ]
    logs = sorted(folder.glob("train_seed*.log"))
    if not logs:
        raise ValueError(f"{folder}: neither log.txt nor train_seed*.log")
    seeds = [p.stem.removeprefix("train_seed") for p in logs]
    return [
        read_curve(
            p,
            dict(
                metrics=folder / f"metrics_seed{s}.jsonl",
                documents=folder / f"doc_loss_seed{s}.npy",
                artifact=folder / f"model_seed{s}.golf",
                analysis=folder / f"analysis_seed{s}.json",
            ),
        )
        for p, s in zip(logs, seeds)
    ]


def projection(curve: Curve) -> tuple[np.ndarray, np.ndarray] | None:
    """Training loss to the end of the run: a straight line in log(step) through the second half of what there is."""
    points = (
        np.array([(s, loss) for s, loss, _ in curve.train if s * 2 >= curve.train[-1][0]])
        if curve.train
        else np.zeros((0, 2))
    )
    if len(points) < 3 or curve.last_step <= points[-1, 0]:
        return None
    slope, start = np.polyfit(np.log(points[:, 0]), points[:, 1], 1)
    steps = np.geomspace(points[-1, 0], curve.last_step, 50)
    return steps, start + slope * np.log(steps)


# Pictures: each draws on axes, or returns False when there is nothing to draw.
def draw_loss(axes, curves: list[Curve]) -> bool:
    twin = axes.twinx()
    for i, c in enumerate(curves):
        if c.train:
            axes.plot(
                [s for s, _, _ in c.train],
                [loss for _, loss, _ in c.train],
                color=f"C{i}",
                lw=1,
                label=c.name,
            )
        if (line := projection(c)) is not None:
            axes.plot(*line, "--", color=f"C{i}", lw=1, label=f"{c.name}, projected")
        twin.plot(
            [s for s, _ in c.validation], [b for _, b in c.validation], "o", color=f"C{i}", ms=5
        )
        if c.log.official:
            twin.plot([c.last_step], [c.log.official.bpb], "*", color=f"C{i}", ms=10)
    axes.set(xlabel="step", ylabel="training loss, nats (lines)", xscale="log")
    twin.set(ylabel="bits per byte (dots; star: official)")
    axes.legend(loc="upper right")
    return any(c.train for c in curves)


def draw_ramps(axes, curves: list[Curve]) -> bool:
    for c in curves[:1]:
        for name in ("lr", "momentum", "wd"):
            points = [(r["step"], r[name]) for r in c.ramps if name in r]
            if points:
                axes.plot(*zip(*points), label=name)
    axes.set(xlabel="step", ylabel="multiplier or value")
    if axes.lines:
        axes.legend()
    return bool(axes.lines)


def draw_phases(axes, curves: list[Curve]) -> bool:
    names = list(dict.fromkeys(n for c in curves for n in c.log.phases))
    left = np.zeros(len(curves))
    for i, name in enumerate(names):
        width = np.array([c.log.phases.get(name, 0.0) for c in curves])
        axes.barh(
            [c.name for c in curves],
            width,
            left=left,
            color=f"C{i % 10}",
            label=f"{name} {width.max():.1f} s",
        )
        left += width
    axes.set(xlabel="seconds")
    if names:
        axes.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.45))
    return bool(names)


def stored_bytes(path: Path) -> dict[str, float]:
    """Bytes of an artifact by role of its tensors: each stream is shared out by numbers of entries."""
    import train_gpt

    header, tensors = train_gpt.unpack_artifact(path.read_bytes())
    counts: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        role = [part for part in name.split(".") if not part.isdigit() and part != "weight"][-1]
        for key, part in train_gpt.stored_parts(tensor):
            counts.setdefault(key, {})[role] = counts.get(key, {}).get(role, 0) + part.numel()
    found: dict[str, float] = {}
    for key, _, _, size, _ in header["streams"]:
        for role, entries in counts[key].items():
            share = size * entries / max(1, sum(counts[key].values()))
            found["row scales" if key == "scale" else role] = (
                found.get("row scales" if key == "scale" else role, 0.0) + share
            )
    return found | {"header": path.stat().st_size - sum(found.values())}


def draw_bytes(axes, curves: list[Curve]) -> bool:
    c = curves[0]
    parts = {"code": float(max(c.log.code_bytes, default=0))}
    try:
        parts |= (
            stored_bytes(c.artifact) if c.artifact else {"model": float(c.log.model_bytes or 0)}
        )
    except ValueError:  # an artifact of another format
        parts["model"] = float(c.log.model_bytes or 0)
    left = 0.0
    for i, (name, size) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
        axes.barh([c.name], [size], left=left, color=f"C{i % 10}", label=f"{name} {size:,.0f}")
        left += size
    axes.axvline(ARTIFACT_BYTES, color="red", lw=1)
    axes.set(xlabel=f"bytes: {left:,.0f} of {ARTIFACT_BYTES:,} (red)")
    axes.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.45))
    return left > 0


def draw_documents(axes, curves: list[Curve]) -> bool:
    for i, c in enumerate(curves):
        if c.documents is not None:
            kept = c.documents[c.documents[:, 1] > 0]
            axes.scatter(
                kept[:, 1],
                kept[:, 0] / math.log(2) / kept[:, 1],
                s=4,
                color=f"C{i}",
                alpha=0.5,
                label=c.name,
            )
    axes.set(xlabel="bytes of the document", ylabel="bits per byte", xscale="log")
    return any(c.documents is not None for c in curves)


def rounding_noise(path: Path) -> dict[str, float]:
    """Of each quantised matrix: deviation of rounding to its levels, relative to its weights; clipping not counted."""
    import train_gpt

    _, tensors = train_gpt.unpack_artifact(path.read_bytes())
    quantised = {name: t for name, t in tensors.items() if t.scale is not None}
    steps = {
        name: t._replace(
            values=t.values.new_ones(t.values.shape), trellis=False, correction=None
        ).dequant()
        for name, t in quantised.items()
    }  # of each entry
    return {
        name: float(
            (steps[name].double().square().mean() / 12).sqrt()
            / t.dequant().double().square().mean().sqrt().clamp(min=1e-30)
        )
        for name, t in quantised.items()
    }


def draw_rounding(axes, curves: list[Curve]) -> bool:
    try:
        noise = rounding_noise(curves[0].artifact) if curves[0].artifact else {}
    except ValueError:  # an artifact of another format
        noise = {}
    axes.bar(range(len(noise)), list(noise.values()))
    axes.set_xticks(
        range(len(noise)),
        [n.removesuffix(".weight") for n in noise],
        rotation=90,
        fontsize=max(3, min(8, 300 / max(1, len(noise)))),
    )
    axes.set(ylabel="rounding noise / weights")
    return bool(noise)


def draw_positions(axes, curves: list[Curve]) -> bool:
    for c in curves:
        if rows := c.analysis.get("tokens", {}).get("position"):
            axes.plot([r["name"] for r in rows], [r["nats"] for r in rows], "o-", label=c.name)
    axes.set(xlabel="position in the document, tokens", ylabel="nats per token")
    if axes.lines:
        axes.legend()
    return bool(axes.lines)


def draw_entropy(axes, curves: list[Curve]) -> bool:
    rows = curves[0].analysis.get("weights", {}).get("matrices", [])
    axes.bar(range(len(rows)), [8 * r["bytes"] / r["weights"] for r in rows], label="paid")
    axes.plot(range(len(rows)), [r["bits"] for r in rows], "k_", ms=8, label="entropy")
    axes.set_xticks(
        range(len(rows)),
        [r["name"].removesuffix(".weight") for r in rows],
        rotation=90,
        fontsize=max(3, min(8, 300 / max(1, len(rows)))),
    )
    axes.set(ylabel="bits per weight")
    axes.legend()
    return bool(rows)


def draw_seeds(axes, curves: list[Curve]) -> bool:
    from scipy import stats

    scores = [c.log.official.bpb for c in curves if c.log.official]
    if len(scores) < 2:
        return False
    mean, half = statistics.mean(scores), stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
    axes.errorbar([mean], ["mean"], xerr=[half], fmt="D", color="black", capsize=4)
    axes.plot(scores, [c.name for c in curves if c.log.official], "o")
    axes.set(xlabel=f"bits per byte; mean {mean:.4f}, 95 % interval of the mean ± {half:.4f}")
    return True


PICTURES: dict[str, tuple[Callable[..., bool], float]] = {  # title: (drawing, height in inches)
    "Loss and score": (draw_loss, 4),
    "Learning rate, momentum, weight decay": (draw_ramps, 2.5),
    "Where the time went": (draw_phases, 2.5),
    "Bytes": (draw_bytes, 2.2),
    "Quantisation by matrix": (draw_rounding, 3),
    "Entropy of the levels": (draw_entropy, 3),
    "Loss by position": (draw_positions, 3),
    "Documents": (draw_documents, 3),
    "Seeds": (draw_seeds, 2),
}


def picture(title: str, curves: list[Curve]) -> str:
    """One drawing as inline SVG; empty when there is nothing to draw. The same data give the same text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    draw, height = PICTURES[title]
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        drawn, out = draw(axes, curves), io.StringIO()
        if drawn:
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :] if drawn else ""


def facts(curves: list[Curve]) -> str:
    """A table of what matters, one line per run."""
    head = [
        "run",
        "bits per byte",
        "nats per token",
        "before quantisation",
        "steps",
        "training s",
        "bytes",
    ]

    def cells(c: Curve) -> list[str]:
        g = c.log
        return [
            c.name,
            f"{g.official.bpb:.4f}" if g.official else "unknown",
            f"{g.official.loss:.4f}" if g.official else "unknown",
            f"{g.before_quantisation.bpb:.4f}" if g.before_quantisation else "unknown",
            str(g.steps),
            f"{g.train_seconds:.1f}" if g.train_seconds else "unknown",
            f"{max(g.total_bytes):,}" if g.total_bytes else "unknown",
        ]

    return table([head, *map(cells, curves)])


def table(rows: list[list[Any]]) -> str:
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
        for tag, cells in zip(["th"] + ["td"] * len(rows), rows)
    ]
    return "<table>" + "".join(lines) + "</table>"


def report(folder: Path) -> str:
    """The page of a run folder or a record folder. Raises ValueError when it is neither."""
    curves = read_curves(folder)
    name = html.escape(folder.resolve().name)
    body = [f"<h1>{name}</h1>", facts(curves)]
    if not all(c.log.finished for c in curves):
        body.append(
            '<p class="note">Not finished: dashed lines go on as the second half of the run did.</p>'
        )
    for title in PICTURES:
        if drawn := picture(title, curves):
            body.append(f"<h2>{title}</h2>{drawn}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body>" + "\n".join(body) + "</body></html>\n"
    )

"""One page about a run or a record: a single HTML file with its pictures inside, no script and
nothing to load.

Folders of other scripts are drawn as far as their logs go; what they do not say has no picture.
"""

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
from facts.files import number, parse_json, read_bounded
from facts.folder import read_folder
from facts.limits import ARTIFACT_BYTES
from facts.logs import Log, is_step, read_ends, read_log
from facts.statistics import read_documents

MAX_ANALYSIS = 1 << 24  # bytes of analysis.json
MOST_NAMED = 8  # runs that a legend names
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}
h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto}
.note{color:#666}"""
TRAIN_LINE = re.compile(
    r"^(?:step:)?[ \t]{0,40}(\d{1,12})/(\d{1,12})[ \t]{1,40}"
    r"(?:train_)?loss:[ \t]{0,9}(\d[\d.]{0,20})"
    r"(?:[^\n]{0,200}?train_time:[ \t]{0,9}(\d{1,12}(?:\.\d{1,9})?)(ms|s|m)?\b)?([^\n]{0,200})$",
    re.MULTILINE,
)
MILLISECONDS = {"ms": 1.0, "s": 1e3, "m": 6e4, "": 1.0}


@dataclass
class Curve:
    """What one run said while it ran."""

    name: str
    log: Log
    train: list[tuple[int, float]] = field(default_factory=list)  # step, nats
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, bits per byte
    ramps: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    last_step: int = 0  # at which the run ends or would end
    documents: np.ndarray | None = None
    artifact: Path | None = None
    analysis: dict[str, Any] = field(default_factory=dict)  # what `analyze` left

    @property
    def model_bytes(self) -> float:
        """Bytes of the model: as logged, else what the total leaves beside the code."""
        if self.log.model_bytes:
            return float(self.log.model_bytes)
        return float(max(self.log.total_bytes, default=0) - self.code_bytes)

    @property
    def code_bytes(self) -> float:
        return float(max(self.log.code_bytes, default=0))


@dataclass
class Beside:
    """Files that a run may have left beside its log."""

    metrics: Path
    documents: Path
    artifact: Path
    analysis: Path


def read_curve(log_path: Path, beside: Beside | None) -> Curve:
    """A run's log, and what lies beside it: metrics, doc_loss, artifact."""
    name = log_path.stem if log_path.name != "log.txt" else log_path.parent.name
    curve = Curve(name, read_log(log_path))
    read_training(curve, read_ends(log_path)[0])
    if beside is None:
        return curve
    if beside.metrics.is_file():
        lines = [parsed_line(line) for line in read_ends(beside.metrics)[0].splitlines()]
        curve.ramps = [line for line in lines if line.get("event") == "train"]
    if beside.documents.is_file():
        curve.documents = read_documents(beside.documents)
    if beside.analysis.is_file():
        curve.analysis = json.loads(read_bounded(beside.analysis, MAX_ANALYSIS))
    curve.artifact = beside.artifact if beside.artifact.is_file() else None
    return curve


def read_training(curve: Curve, text: str):
    """Losses by step, and where the run ends: for a run under way, where its pace leads to."""
    for step, limit, loss, spent, unit, rest in TRAIN_LINE.findall(text):
        if number(loss) is None:
            continue
        curve.train.append((int(step), float(loss)))
        left = re.search(r"\bleft:(\d{1,9})s", rest)
        if left and spent and not curve.log.finished:
            pace = int(step) / max(float(spent) * MILLISECONDS[unit], 1.0)
            curve.last_step = min(int(limit), int(step) + round(1e3 * int(left[1]) * pace))
    for claim in curve.log.claims:
        if is_step(claim):
            step = int(re.search(r"(\d{1,12})/", claim.label)[1])
            curve.validation.append((step, claim.bpb))
    if not curve.last_step:
        seen = [step for step, _ in curve.train + curve.validation] + [curve.log.steps or 0]
        curve.last_step = max(seen)


def parsed_line(line: str) -> dict[str, Any]:
    """An object of a metrics file; empty for a line that was cut."""
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_curves(folder: Path) -> list[Curve]:
    """The run of a run folder or every seed of a record, anybody's. Raises ValueError when there is
    none."""
    if (folder / "log.txt").is_file():
        names = ("metrics.jsonl", "doc_loss.npy", "model.golf", "analysis.json")
        return [read_curve(folder / "log.txt", Beside(*(folder / name for name in names)))]
    seeds = {p: p.stem.removeprefix("train_seed") for p in sorted(folder.glob("train_seed*.log"))}
    names = (
        "metrics_seed{}.jsonl",
        "doc_loss_seed{}.npy",
        "model_seed{}.golf",
        "analysis_seed{}.json",
    )
    if seeds:
        return [
            read_curve(path, Beside(*(folder / name.format(seed) for name in names)))
            for path, seed in seeds.items()
        ]
    logs = [folder / g.name for g in read_folder(folder).seed_logs]
    if not logs:
        raise ValueError(f"{folder}: neither log.txt nor any log of a seed")
    return [read_curve(path, None) for path in logs]


def projection(curve: Curve) -> tuple[np.ndarray, np.ndarray] | None:
    """Training loss to the end of the run: a straight line in log(step) through the second half of
    what there is."""
    points = np.array(
        [(step, loss) for step, loss in curve.train if step > 0 and 2 * step >= curve.train[-1][0]]
    )
    if curve.log.finished or len(points) < 3 or curve.last_step <= points[-1, 0]:
        return None
    slope, start = np.polyfit(np.log(points[:, 0]), points[:, 1], 1)
    steps = np.geomspace(points[-1, 0], curve.last_step, 50)
    return steps, start + slope * np.log(steps)


# ---- Pictures: each draws on axes of a figure, or returns False when there is nothing to draw
def legend_below(axes, columns: int = 4):
    """A legend under the drawing, for which the figure makes room; nothing is covered or cut."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            loc="outside lower center", ncols=columns, fontsize="small", frameon=False
        )


def draw_loss(axes, curves: list[Curve]) -> bool:
    """Training losses on the left scale, validation and official scores on the right one."""
    if not any(c.train or c.validation for c in curves):
        return False
    scores = axes.twinx()
    for i, c in enumerate(curves):
        color, label = f"C{i % 10}", c.name if i < MOST_NAMED else None
        points = [(step, loss) for step, loss in c.train if step > 0]
        if points:
            axes.plot(*zip(*points), color=color, lw=1, label=label)
        if (line := projection(c)) is not None:
            axes.plot(*line, "--", color=color, lw=1, label=label and f"{label}, projected")
        points = [(step, bpb) for step, bpb in c.validation if step > 0]
        if points:
            scores.plot(*zip(*points), "o", color=color, ms=4, label=None if c.train else label)
        if c.log.official and c.last_step:
            scores.plot([c.last_step], [c.log.official.bpb], "*", color=color, ms=10, zorder=5)
    if any(c.last_step for c in curves):
        axes.set_xscale("log")
    axes.set(xlabel="step", ylabel="training loss, nats (lines)")
    scores.set(ylabel="bits per byte (dots; star: official)")
    legend_below(axes)
    return True


def draw_ramps(axes, curves: list[Curve]) -> bool:
    """Rates of the first run, from its metrics."""
    for name in ("lr", "momentum", "wd"):
        points = [(r.get("step"), r.get(name)) for r in curves[0].ramps]
        points = [p for p in points if number(p[0]) is not None and number(p[1]) is not None]
        if points:
            axes.plot(*zip(*points), label=name)
    axes.set(xlabel="step", ylabel="multiplier or value")
    legend_below(axes)
    return bool(axes.lines)


def draw_phases(axes, curves: list[Curve]) -> bool:
    """Seconds of each run by phase, side by side."""
    names = list(dict.fromkeys(name for c in curves for name in c.log.phases))
    left = np.zeros(len(curves))
    for i, name in enumerate(names):
        width = np.array([c.log.phases.get(name, 0.0) for c in curves])
        label = f"{name} {width.max():.1f} s"
        axes.barh([c.name for c in curves], width, left=left, color=f"C{i % 10}", label=label)
        left += width
    axes.set(xlabel="seconds")
    legend_below(axes)
    return bool(names)


def stored_bytes(path: Path) -> dict[str, float]:
    """Bytes of an artifact by role of its tensors: each stream is shared out by numbers of
    entries."""
    import train_gpt

    header, _ = train_gpt.unpack_artifact(path.read_bytes())
    counts: dict[str, dict[str, int]] = {}  # entries by stream and role
    for line in header["tensors"]:
        entry = train_gpt.Entry(*line)
        words = [word for word in entry.name.split(".") if not word.isdigit() and word != "weight"]
        for key, shape in entry.parts():
            role = "row scales" if key == "scale" else words[-1]
            roles = counts.setdefault(key, {})
            roles[role] = roles.get(role, 0) + math.prod(shape)
    found: dict[str, float] = {}
    for key, _, _, size, _ in header["streams"]:
        whole = max(1, sum(counts[key].values()))
        for role, entries in counts[key].items():
            found[role] = found.get(role, 0.0) + size * entries / whole
    return found | {"header": path.stat().st_size - sum(found.values())}


def parts_of(curve: Curve) -> dict[str, float]:
    """Bytes of code and of each part of the model; of the model as a whole when it cannot be
    opened."""
    whole = {"model": curve.model_bytes}
    try:
        model = stored_bytes(curve.artifact) if curve.artifact else whole
    except ValueError:  # an artifact of another format
        model = whole
    return {name: size for name, size in ({"code": curve.code_bytes} | model).items() if size > 0}


def draw_bytes(axes, curves: list[Curve]) -> bool:
    """What the first run's submission is made of, against the limit."""
    left = 0.0
    for i, (name, size) in enumerate(
        sorted(parts_of(curves[0]).items(), key=lambda item: -item[1])
    ):
        label = f"{name} {size:,.0f}"
        axes.barh([curves[0].name], [size], left=left, color=f"C{i % 10}", label=label)
        left += size
    axes.axvline(ARTIFACT_BYTES, color="red", lw=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=f"bytes: {left:,.0f} of {ARTIFACT_BYTES:,} (red)")
    legend_below(axes)
    return left > 0


def draw_documents(axes, curves: list[Curve]) -> bool:
    """Score of each document by its size."""
    for i, c in enumerate(curves):
        if c.documents is None:
            continue
        size = c.documents[:, 1]
        kept = size > 0
        scores = c.documents[kept, 0] / math.log(2) / size[kept]
        axes.scatter(size[kept], scores, s=4, color=f"C{i % 10}", alpha=0.5, label=c.name)
    drawn = bool(axes.collections)
    axes.set(xlabel="bytes of the document", ylabel="bits per byte")
    if drawn:
        axes.set_xscale("log")
    legend_below(axes)
    return drawn


def rounding_noise(path: Path) -> dict[str, float]:
    """Of each quantised matrix: deviation of rounding to its levels, relative to its weights;
    clipping not counted."""
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


def bars_by_matrix(axes, names: list[str]):
    """Names of matrices along the axis, upright, and small when there are many."""
    size = max(3, min(8, 300 / max(1, len(names))))
    labels = [name.removesuffix(".weight") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)


def draw_rounding(axes, curves: list[Curve]) -> bool:
    """Rounding noise of each matrix of the first run."""
    try:
        noise = rounding_noise(curves[0].artifact) if curves[0].artifact else {}
    except ValueError:  # an artifact of another format
        noise = {}
    axes.bar(range(len(noise)), list(noise.values()))
    bars_by_matrix(axes, list(noise))
    axes.set(ylabel="rounding noise / weights")
    return bool(noise)


def draw_positions(axes, curves: list[Curve]) -> bool:
    """Loss by position in the document, where `analyze` left it."""
    for c in curves:
        rows = c.analysis.get("tokens", {}).get("position")
        if rows:
            axes.plot([r["name"] for r in rows], [r["nats"] for r in rows], "o-", label=c.name)
    axes.set(xlabel="position in the document, tokens", ylabel="nats per token")
    legend_below(axes)
    return bool(axes.lines)


def draw_entropy(axes, curves: list[Curve]) -> bool:
    """Bits that each weight takes against the entropy of its levels, where `analyze` left them."""
    rows = curves[0].analysis.get("weights", {}).get("matrices", [])
    axes.bar(range(len(rows)), [8 * r["bytes"] / r["weights"] for r in rows], label="paid")
    axes.plot(range(len(rows)), [r["bits"] for r in rows], "k_", ms=8, label="entropy")
    bars_by_matrix(axes, [r["name"] for r in rows])
    axes.set(ylabel="bits per weight")
    legend_below(axes)
    return bool(rows)


def draw_seeds(axes, curves: list[Curve]) -> bool:
    """Official scores of the seeds, their mean and its interval."""
    from scipy import stats

    scores = [c.log.official.bpb for c in curves if c.log.official]
    if len(scores) < 2:
        return False
    mean = statistics.mean(scores)
    half = stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
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
    """One drawing as inline SVG; empty when there is nothing to draw. The same data give the same
    text."""
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


def summary(curves: list[Curve]) -> str:
    """A table of what matters, one line per run; columns of which no run says anything are left
    out."""
    columns: dict[str, Callable[[Log], str]] = {
        "bits per byte": lambda g: f"{g.official.bpb:.4f}" if g.official else "",
        "nats per token": lambda g: f"{g.official.loss:.4f}" if g.official else "",
        "before quantisation": lambda g: (
            f"{g.before_quantisation.bpb:.4f}" if g.before_quantisation else ""
        ),
        "steps": lambda g: f"{g.steps:,}" if g.steps else "",
        "training s": lambda g: f"{g.train_seconds:,.1f}" if g.train_seconds else "",
        "bytes": lambda g: f"{max(g.total_bytes):,}" if g.total_bytes else "",
    }
    cells = {name: [cell(c.log) for c in curves] for name, cell in columns.items()}
    kept = [name for name in cells if any(cells[name])]
    rows = [[c.name, *(cells[name][i] or "unknown" for name in kept)] for i, c in enumerate(curves)]
    return table([["run", *kept], *rows])


def table(rows: list[list[Any]]) -> str:
    """An HTML table whose first row is its head."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
        for tag, cells in zip(["th"] + ["td"] * len(rows), rows)
    ]
    return "<table>" + "".join(lines) + "</table>"


def report(folder: Path) -> str:
    """The page of a run folder or a record folder. Raises ValueError when it is neither."""
    curves = read_curves(folder)
    name = html.escape(folder.resolve().name)
    body = [f"<h1>{name}</h1>", summary(curves)]
    if not all(c.log.finished for c in curves):
        body.append(
            '<p class="note">Not finished: '
            "dashed lines go on as the second half of the run did.</p>"
        )
    for title in PICTURES:
        if drawn := picture(title, curves):
            body.append(f"<h2>{title}</h2>{drawn}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body>" + "\n".join(body) + "</body></html>\n"
    )

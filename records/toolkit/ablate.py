"""Compare techniques on equal tokens: every variant, seed and text as a run of its own, then a
table and a plot.

    python records/tools.py ablate run SPEC.json         finish what is missing in the folder of
    SPEC.json python records/tools.py ablate report SPEC.json      write table.md and plot.svg from
    results.jsonl

SPEC.json: {"base": {knob: value}, "texts": {name: {knob: value}}, "seeds": [..], "variants": {name:
{knob: value}}}. A variant is the base with some knobs changed; knobs of a text may use {NAME} for
an environment variable. Every variant is compared with the base of the same text and seed, so that
what a seed changes for both cancels out. A run that fails is recorded with its reason, and tried
again the next time.
"""

import json
import math
import re
import statistics
import time
from pathlib import Path

from . import sweep

BASE = "base"
SPEC = ("base", "texts", "seeds", "variants")


def wanted(spec: dict) -> list[dict]:
    """Every run of a specification, seed by seed, the base first: an early stop leaves comparable
    pairs."""
    variants = {BASE: {}} | spec["variants"]
    return [
        dict(
            text=text,
            seed=seed,
            variant=variant,
            knobs=spec["base"] | sweep.filled(spec["texts"][text]) | variants[variant],
        )
        for seed in spec["seeds"]
        for text in spec["texts"]
        for variant in variants
    ]


def identity(run: dict) -> tuple:
    return run["text"], run["seed"], run["variant"]


def known(path: Path) -> dict[tuple, dict]:
    """Finished runs by identity; the last word on each counts."""
    return {identity(r): r for r in sweep.read(path) if "bpb" in r}


def measure(run: dict, scratch: Path) -> dict:
    """Train and score one variant in a process of its own; returns what is worth keeping."""
    folder = scratch / "-".join(map(str, (*identity(run), time.time_ns())))
    knobs = run["knobs"] | dict(
        SEED=run["seed"], RUNS_DIR=folder.parent, RUN_ID=folder.name, STRICT_ENV=1
    )
    begin = time.monotonic()
    done = sweep.launch(knobs)
    kept = dict(text=run["text"], seed=run["seed"], variant=run["variant"])
    score = sweep.official(done.stdout)
    if done.returncode or not score:
        return kept | dict(error=(done.stderr.strip().splitlines() or ["no score"])[-1][:300])
    events = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    seconds = [e["seconds"] for e in events if e["event"] == "train"]
    steps = [b - a for a, b in zip(seconds[3:], seconds[4:])]
    scored, loss, bpb = score
    return kept | dict(
        bpb=bpb,
        loss=loss,
        scored=scored,
        steps=len(seconds),
        step_ms=round(statistics.median(steps) * 1e3, 1),
        parameters=int(re.search(r"^model_params:(\d+)", done.stdout, re.MULTILINE)[1]),
        artifact_bytes=int(
            re.search(r"^Total submission size: (\d+)", done.stdout, re.MULTILINE)[1]
        ),
        wall=round(time.monotonic() - begin, 1),
    )


def run(spec: dict, results: Path, scratch: Path, share: tuple[int, int]):
    """Append each missing result to results.jsonl as soon as it is known; share (i, n) is the i-th
    of n equal parts."""
    finished, (part, parts) = known(results), share
    todo = [each for each in wanted(spec)[part - 1 :: parts] if identity(each) not in finished]
    for i, each in enumerate(todo):
        begin = time.monotonic()
        found = measure(each, scratch)
        sweep.append(results, found)
        left = (time.monotonic() - begin) * (len(todo) - i - 1) / 60
        print(
            f"{i + 1}/{len(todo)} {each['text']} seed {each['seed']} {each['variant']}: "
            f"{found.get('bpb', found.get('error'))}   about {left:.0f} min left",
            flush=True,
        )


def paired(results: dict[tuple, dict], text: str, variant: str) -> dict:
    """Difference of a variant to its base over the seeds that both have: mean and s.d. of bits per
    byte, time ratio."""
    pairs = [
        (results[text, seed, BASE], r)
        for (t, seed, v), r in results.items()
        if (t, v) == (text, variant) and (text, seed, BASE) in results
    ]
    gaps = [r["bpb"] - b["bpb"] for b, r in pairs]
    return dict(
        seeds=len(gaps),
        mean=statistics.mean(gaps) if gaps else math.nan,
        sd=statistics.stdev(gaps) if len(gaps) > 1 else math.nan,
        ratio=statistics.median(r["step_ms"] / b["step_ms"] for b, r in pairs)
        if pairs
        else math.nan,
        parameters=pairs[0][1]["parameters"] if pairs else 0,
    )


def table(spec: dict, results: dict[tuple, dict]) -> str:
    """The comparison as Markdown, best on the first text first."""
    texts = list(spec["texts"])
    lines = [
        "| variant | knobs | "
        + " | ".join(f"{t}: bpb minus base | time" for t in texts)
        + " | parameters |",
        "|---|---|" + "---|---|" * len(texts) + "---|",
    ]
    base = {
        t: [r["bpb"] for (text, _, v), r in results.items() if (text, v) == (t, BASE)]
        for t in texts
    }
    shown = " | ".join(
        f"{statistics.mean(b):.4f} ± {statistics.stdev(b):.4f} (n={len(b)}) | 1.00"
        if len(b) > 1
        else "| "
        for b in base.values()
    )
    lines.append(f"| *base* |  | {shown} |  |")
    for variant in sorted(spec["variants"], key=lambda v: paired(results, texts[0], v)["mean"]):
        rows = [paired(results, text, variant) for text in texts]
        cells = " | ".join(
            f"{r['mean']:+.4f} ± {r['sd']:.4f} (n={r['seeds']}) | {r['ratio']:.2f}" for r in rows
        )
        knobs = " ".join(f"{k}={v}" for k, v in spec["variants"][variant].items())
        lines.append(f"| {variant} | `{knobs}` | {cells} | {rows[0]['parameters']:,} |")
    return "\n".join(lines) + "\n"


def plot(spec: dict, results: dict[tuple, dict]):
    """Difference to the base with its standard deviation, one panel per text."""
    texts = list(spec["texts"])
    order = sorted(spec["variants"], key=lambda v: -paired(results, texts[0], v)["mean"])
    figure, axes = sweep.subplots(
        1, len(texts), figsize=(5 * len(texts), 1 + 0.35 * len(order)), sharey=True, squeeze=False
    )
    for axis, text in zip(axes[0], texts):
        rows = [paired(results, text, variant) for variant in order]
        axis.barh(
            order,
            [r["mean"] for r in rows],
            xerr=[0 if math.isnan(r["sd"]) else r["sd"] for r in rows],
            color=["tab:green" if r["mean"] < 0 else "tab:red" for r in rows],
            ecolor="0.3",
            capsize=2,
        )
        axis.axvline(0, color="0.2", linewidth=0.8)
        axis.set(title=text, xlabel="bits per byte minus base (left is better)")
    return figure

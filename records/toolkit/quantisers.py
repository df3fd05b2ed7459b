"""Compare quantisers on the same trained models: bytes against loss, several step sizes each, then
a table and a plot.

    python records/tools.py quantisers run SWEEP.json       train each seed once and finish what is
    missing python records/tools.py quantisers report SWEEP.json    write table.md and plot.svg from
    results.jsonl

SWEEP.json: {"base": {knob: value}, "seeds": [..], "reference": name, "variants": {name: {knob:
value}}, "factors": [..], "bits": [..]}. Every variant quantises, packs and scores the weights that
a run of the base ended with; one whose clip is a multiple of sigma at all factors of its steps, any
other at all numbers of bits. Knobs of the base may use {NAME} for an environment variable. The gap
is what bits per byte rise above those of the trained weights.
"""

import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import train_gpt as tg

from . import sweep

known = sweep.read
SPEC = ("base", "seeds", "reference", "variants", "factors", "bits")


def points(spec: dict) -> list[tuple[str, float]]:
    """(variant, factor or bits) of everything that is measured on one model."""
    by_sigma = {
        name: knobs.get("CLIP", spec["base"].get("CLIP", "")) == "sigma"
        for name, knobs in spec["variants"].items()
    }
    return [
        (name, x)
        for name in spec["variants"]
        for x in (spec["factors"] if by_sigma[name] else spec["bits"])
    ]


def artifact(trainer: tg.Trainer, env: dict[str, str], variant: str, spec: dict, x: float) -> bytes:
    """The trained weights as one point of a variant stores them."""
    knobs = {k: str(v) for k, v in spec["variants"][variant].items()}
    quant = tg.load(env | knobs).quant
    if quant.clip != "sigma":
        quant = tg.load(env | knobs | dict(MATRIX_BITS=str(int(x)))).quant
    harms = trainer.harms if quant.allocation == "loss" else {}
    p = tg.Packer(trainer.model, quant, trainer.hessians, harms, dict(spec=variant))
    rules = p.rules()
    if quant.clip == "sigma":
        rules = {name: tg.rescaled(rule, x) for name, rule in rules.items()}
    return p.blob(p.tensors(rules))


def measure_all(trainer: tg.Trainer, env: dict[str, str], spec: dict, seed: int, results: Path):
    """Measure every missing point on one trained model, appending each to results.jsonl as soon as
    it is known."""
    known = {(r["seed"], r["variant"], r["x"]) for r in sweep.read(results)}
    trained = {name: p.detach().clone() for name, p in trainer.model.exported().items()}

    def bpb() -> float:
        return tg.score_model(trainer.subject(), trainer.data).bpb

    def put(weights):
        with tg.torch.no_grad():
            for name, p in trainer.model.exported().items():
                p.copy_(weights[name])

    whole = bpb()
    for variant, x in points(spec):
        if (seed, variant, x) in known:
            continue
        begin = time.monotonic()
        blob = artifact(trainer, env, variant, spec, x)
        seconds = time.monotonic() - begin
        put({name: t.dequant() for name, t in tg.unpack_artifact(blob)[1].items()})
        found = dict(
            seed=seed,
            variant=variant,
            x=x,
            bytes=len(blob),
            gap=bpb() - whole,
            trained=whole,
            seconds=round(seconds, 1),
        )
        put(trained)
        sweep.append(results, found)
        print(f"seed {seed} {variant} {x}: {len(blob)} bytes, gap {found['gap']:.5f}", flush=True)


def measured_export(
    export: Callable, env: dict, spec: dict, seed: int, results: Path, trainer: tg.Trainer
) -> Path:
    """Sweep where the script would export, then export."""
    measure_all(trainer, env, spec, seed, results)
    return export(trainer)


def run(spec: dict, results: Path, scratch: Path, share: tuple[int, int]):
    """Train one model per seed through the script's own entry point, and sweep where it would
    export."""
    for seed in spec["seeds"][share[0] - 1 :: share[1]]:
        done = {(r["variant"], r["x"]) for r in sweep.read(results) if r["seed"] == seed}
        if set(points(spec)) <= done:
            continue
        env = (
            dict(os.environ)
            | sweep.filled(spec["base"])
            | dict(SEED=str(seed), RUNS_DIR=str(scratch), RUN_ID=f"sweep-{time.time_ns()}")
        )
        export = tg.export
        tg.export = functools.partial(measured_export, export, env, spec, seed, results)
        try:
            if code := tg.main([], env):
                sys.exit(code)
        finally:
            tg.export = export


def curve(rows: list[dict], seed: int, variant: str) -> list[tuple[float, float]]:
    """(log bytes, log gap) of one variant on one model, by size; points that lost nothing count as
    a gap of 1e-6."""
    return sorted(
        (math.log(r["bytes"]), math.log(max(r["gap"], 1e-6)))
        for r in rows
        if (r["seed"], r["variant"]) == (seed, variant)
    )


def table(spec: dict, rows: list[dict]) -> str:
    """Gap at the reference's bytes and bytes at its gap, for each of its points inside the other's
    range."""
    reference, seeds = spec["reference"], spec["seeds"]
    columns = sorted({r["x"] for r in rows if r["variant"] == reference})
    lines = [
        "| variant | knobs | "
        + " | ".join(f"gap at the bytes of {reference} {x:g} | bytes at its gap" for x in columns)
        + " |",
        "|---|---|" + "---|---|" * len(columns),
    ]
    for variant, knobs in spec["variants"].items():
        cells = []
        for x in columns:
            gaps, ratios = [], []
            for seed in seeds:
                at = next(
                    (r for r in rows if (r["seed"], r["variant"], r["x"]) == (seed, reference, x)),
                    None,
                )
                line = np.array(curve(rows, seed, variant))
                if at is None or len(line) < 2:
                    continue
                size, gap = math.log(at["bytes"]), math.log(max(at["gap"], 1e-6))
                if line[0, 0] <= size <= line[-1, 0]:
                    gaps.append(math.exp(np.interp(size, line[:, 0], line[:, 1])))
                falling = line[np.argsort(line[:, 1])]
                if falling[0, 1] <= gap <= falling[-1, 1]:
                    ratios.append(math.exp(np.interp(gap, falling[:, 1], falling[:, 0]) - size))
            cells.append(shown(gaps, 5) + " | " + shown(ratios, 3))
        text = " ".join(f"{k}={v}" for k, v in knobs.items())
        lines.append(f"| {variant} | `{text}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(values: list[float], digits: int) -> str:
    """Mean and standard deviation; a dash when nothing was in range."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} (n={len(values)})"


def plot(spec: dict, rows: list[dict]):
    """Gap against bytes, every variant a line per seed."""
    figure, axis = sweep.subplots(figsize=(8, 5.5))
    for i, variant in enumerate(spec["variants"]):
        for j, seed in enumerate(spec["seeds"]):
            if line := curve(rows, seed, variant):
                axis.plot(
                    *np.exp(np.array(line)).T,
                    marker="o",
                    color=f"C{i % 10}",
                    markersize=3,
                    linewidth=1,
                    linestyle="-" if i < 10 else "--",
                    label=variant if not j else None,
                )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="bytes of the model",
        ylabel="bits per byte above the trained weights",
    )
    axis.legend(fontsize="small")
    return figure

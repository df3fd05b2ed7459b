"""What a way of scoring gains on the same trained models, document by document: then a table and a
plot.

    python records/tools.py gains run SPEC.json       train each seed once and score what is missing
    python records/tools.py gains report SPEC.json    write table.md and plot.svg from results.jsonl

SPEC.json: {"base": {knob: value}, "seeds": [..], "variants": {name: {"against": name, "knobs":
{knob: value}}}}. A run of the base leaves one artifact per seed; every variant scores that very
file in a process of its own. Gains are taken per document; the interval resamples documents after
their losses were averaged over the seeds. Knobs of the base may use {NAME} for an environment
variable.
"""

import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from facts.statistics import document_bootstrap

from . import sweep

SPEC = ("base", "seeds", "variants")


def launch(knobs: dict[str, Any]) -> str:
    """Run the script to its end; returns what it printed. Exits with its message when it failed."""
    done = sweep.launch(knobs)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{sweep.SCRIPT.name} ended with code {done.returncode}")
    return done.stdout


def trained(spec: dict, seed: int, scratch: Path) -> Path:
    """The artifact of a seed; trains it unless an earlier call left one."""
    folder = scratch / f"gains-seed{seed}"
    if not (folder / "model.golf").exists():
        launch(
            sweep.filled(spec["base"])
            | dict(SEED=seed, RUNS_DIR=scratch, RUN_ID=folder.name, RESUME="auto", STRICT_ENV=1)
        )
    return folder / "model.golf"


def measure(spec: dict, seed: int, name: str, artifact: Path) -> dict[str, Any]:
    """Score one artifact in one way: bits per byte, seconds, inputs read and nats of each
    document."""
    data = {
        k: v for k, v in sweep.filled(spec["base"]).items() if k in ("DATA_PATH", "TOKENIZER_PATH")
    }
    text = launch(data | dict(RUN_MODE="eval", ARTIFACT=artifact) | spec["variants"][name]["knobs"])
    scored, _, bpb = sweep.official(text)
    cost = re.search(r"^score:\S+ .*forward_tokens:(\d+)", text, re.MULTILINE)
    seconds = re.search(r"^phase:eval start_ms:(\d+) end_ms:(\d+)", text, re.MULTILINE)
    documents = np.load(artifact.with_suffix(f".{scored}.doc_loss.npy"))
    return dict(
        seed=seed,
        variant=name,
        scored=scored,
        bpb=bpb,
        forward_tokens=int(cost[1]),
        seconds=(int(seconds[2]) - int(seconds[1])) / 1e3,
        nats=documents[:, 0].round(4).tolist(),
        bytes=documents[:, 1].astype(int).tolist(),
    )


def known(path: Path) -> dict[tuple[int, str], dict]:
    """Results by seed and variant."""
    return {(r["seed"], r["variant"]): r for r in sweep.read(path)}


def run(spec: dict, results: Path, scratch: Path, share: tuple[int, int]):
    """Append each missing result to results.jsonl as soon as it is known."""
    finished = known(results)
    for seed in spec["seeds"][share[0] - 1 :: share[1]]:
        for name in spec["variants"]:
            if (seed, name) not in finished:
                found = measure(spec, seed, name, trained(spec, seed, scratch))
                sweep.append(results, found)
                print(
                    f"seed {seed} {name}: {found['bpb']:.5f} bpb, {found['seconds']:.0f} s",
                    flush=True,
                )


def documents(results: dict[tuple[int, str], dict], seeds: list[int], name: str) -> np.ndarray:
    """(documents, 2): nats, averaged over the seeds, and bytes."""
    rows = [results[seed, name] for seed in seeds]
    return np.stack([np.mean([r["nats"] for r in rows], 0), np.array(rows[0]["bytes"], float)], 1)


def gain(spec: dict, results: dict[tuple[int, str], dict], name: str) -> dict[str, Any] | None:
    """Gain of a variant over the one it stands against: interval over documents, and that of each
    seed."""
    against = spec["variants"][name].get("against")
    seeds = [s for s in spec["seeds"] if (s, name) in results and (s, against) in results]
    if not seeds:
        return None
    found = document_bootstrap(documents(results, seeds, against), documents(results, seeds, name))
    return found | dict(seeds=[results[s, against]["bpb"] - results[s, name]["bpb"] for s in seeds])


def table(spec: dict, results: dict[tuple[int, str], dict]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| scored by | knobs | bpb | against | gain in bpb, 95 % over documents "
        "| gain of each seed | inputs read | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, variant in spec["variants"].items():
        rows = [r for (_, v), r in results.items() if v == name]
        knobs, found = (
            " ".join(f"{k}={v}" for k, v in variant["knobs"].items()),
            gain(spec, results, name),
        )
        gained = (
            "– | –"
            if found is None
            else (
                f"{found['gain']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}) | "
                + " ".join(f"{g:+.4f}" for g in found["seeds"])
            )
        )
        lines.append(
            f"| {name} | `{knobs}` | {statistics.mean(r['bpb'] for r in rows):.4f} | "
            f"{variant.get('against', '')} | {gained} | {rows[0]['forward_tokens']:,} | "
            f"{statistics.median(r['seconds'] for r in rows):.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(spec: dict, results: dict[tuple[int, str], dict]):
    """Gains with their intervals; a dot per seed."""
    found = {name: g for name in reversed(spec["variants"]) if (g := gain(spec, results, name))}
    figure, axis = sweep.subplots(figsize=(8, 1 + 0.4 * len(found)))
    for i, g in enumerate(found.values()):
        axis.barh(
            i,
            g["gain"],
            xerr=[[g["gain"] - g["low"]], [g["high"] - g["gain"]]],
            ecolor="0.3",
            capsize=3,
            color="tab:green" if g["gain"] > 0 else "tab:red",
        )
        axis.plot(g["seeds"], [i] * len(g["seeds"]), "k.", markersize=4)
    axis.axvline(0, color="0.2", linewidth=0.8)
    axis.set(
        yticks=range(len(found)),
        yticklabels=[f"{n}, against {spec['variants'][n]['against']}" for n in found],
        xlabel="gain in bits per byte (right is better)",
    )
    return figure

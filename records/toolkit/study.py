"""What the studies of this folder have in common: a specification, results that outlive an interruption, a table and a
plot beside it, and the command line. Used by ablate.py, quantisers.py and gains.py."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt.py"


def filled(knobs: dict[str, Any]) -> dict[str, str]:
    """Knobs of a specification as text; {NAME} stands for an environment variable."""
    return {k: str(v).format(**os.environ) for k, v in knobs.items()}


def launch(knobs: dict[str, Any]) -> subprocess.CompletedProcess:
    """Run the script to its end with these knobs beside the environment's."""
    return subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {k: str(v) for k, v in knobs.items()},
        capture_output=True,
        text=True,
    )


def official(text: str) -> tuple[str, float, float] | None:
    """(how it was scored, nats per token, bits per byte) of a run's official line; None when there is none."""
    found = re.search(
        r"^final:official variant:(\S+) val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE
    )
    return (found[1], float(found[2]), float(found[3])) if found else None


def append(path: Path, found: dict[str, Any]):
    """Keep one result as soon as it is known."""
    with open(path, "a") as file:
        file.write(json.dumps(found) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def subplots(*shape: int, **options):
    """matplotlib's subplots, drawn so that the same data give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, layout="constrained", **options)


def main(about: str, run: Callable, known: Callable, table: Callable, plot: Callable):
    """Command line of a study: run(spec, results.jsonl, scratch, (i, n)) adds what is missing of the i-th of n shares;
    known(results.jsonl) reads it; table(spec, known) and plot(spec, known) make text and figure."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("spec", type=Path)
    parser.add_argument(
        "--scratch", type=Path, default=SCRIPT.parent / "runs", help="where run folders go"
    )
    parser.add_argument(
        "--share",
        default="1/1",
        metavar="I/N",
        type=lambda s: tuple(map(int, s.split("/", 1))),
        help="only the I-th of N equal parts, so that N processes can share the work",
    )
    asked = parser.parse_args()
    spec, results = json.loads(asked.spec.read_text()), asked.spec.with_name("results.jsonl")
    if asked.what == "run":
        run(spec, results, asked.scratch, asked.share)
    found = known(results)
    text = table(spec, found)
    asked.spec.with_name("table.md").write_text(text)
    plot(spec, found).savefig(asked.spec.with_name("plot.svg"), metadata={"Date": None})
    print(text, end="")

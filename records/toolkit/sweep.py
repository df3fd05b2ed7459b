"""Many runs from one specification: results that outlive an interruption, then a table and a plot
beside them.

Used by ablate.py, quantisers.py and scoring_gains.py. Each of them has

    SPEC                                 the names that a specification must have
    run(spec, results, scratch, share)   append to results.jsonl what is missing of part I of N
    known(results)                       read it
    table(spec, found), plot(spec, found)
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from facts.files import read_json, write_atomic

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
        encoding="utf-8",
    )


def official(text: str) -> tuple[str, float, float] | None:
    """(how it was scored, nats per token, bits per byte) of a run's official line; None when there
    is none."""
    found = re.search(
        r"^final:official variant:(\S+) val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE
    )
    return (found[1], float(found[2]), float(found[3])) if found else None


def append(path: Path, found: dict[str, Any]):
    """Keep one result as soon as it is known."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def subplots(*shape: int, **options):
    """matplotlib's subplots, drawn so that the same data give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the figures that are kept were drawn with it
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, layout="constrained", **options)


def perform(kind: ModuleType, spec_file: Path, scratch: Path, share: tuple[int, int] | None) -> str:
    """Do what is missing of a share of the runs (None: nothing), then write table.md and plot.svg
    beside the specification. Returns the table."""
    try:
        spec = read_json(spec_file)
    except ValueError as error:
        raise ValueError(f"{spec_file}: {error}") from None
    if missing := [name for name in kind.SPEC if name not in spec]:
        raise ValueError(f"{spec_file}: no {', '.join(missing)}; --help says what belongs there")
    results = spec_file.with_name("results.jsonl")
    if share is not None:
        kind.run(spec, results, scratch, share)
    found = kind.known(results)
    text = kind.table(spec, found)
    write_atomic(spec_file.with_name("table.md"), text)
    kind.plot(spec, found).savefig(spec_file.with_name("plot.svg"), metadata={"Date": None})
    return text

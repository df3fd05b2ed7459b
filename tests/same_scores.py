#!/usr/bin/env python3
"""Compare two checkouts: does every preset still have as many parameters and the same score?

    python tests/same_scores.py OTHER_CHECKOUT [--presets NAME ...] [--steps N]

Each preset runs shrunk (+tiny) in both checkouts, on one thread in fp32, and its official line and
number of parameters are laid side by side; so are the parameters of the preset at full size, by
RUN_MODE=plan. Exit code 0: all equal; 1: something differs; 2: a mistake in the input. It takes
some seconds for each preset.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTED = (
    "import train_gpt as t; print(*[n for n in t.PRESETS if n not in vars(t).get('OVERLAYS', ())])"
)
OVERLAYS = ("cpu", "tiny", "champion")  # older scripts keep them among the presets
QUIET = dict(DEVICE="cpu", THREADS="1", NUMERICS="fp32", ATTENTION="sdpa", OMP_NUM_THREADS="1")


def run(checkout: Path, preset: str, folder: str, **knobs) -> str:
    """What the script of a checkout prints with a preset."""
    env = os.environ | QUIET | dict(PRESET=preset, RUNS_DIR=folder, RUN_ID=checkout.name) | knobs
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=checkout,
        env=env | dict(ALLOW_NONCOMPLIANT="1"),
        capture_output=True,
        encoding="utf-8",
    )
    return done.stdout + done.stderr


def seen(checkout: Path, preset: str, steps: int) -> dict[str, str]:
    """Facts of one preset in one checkout; what cannot be found says why."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = run(checkout, f"{preset}+tiny", folder, ITERATIONS=str(steps))
        plan = run(checkout, preset, folder, RUN_MODE="plan")
    official = re.findall(r"^final:official .*?(val_loss:\S+ val_bpb:\S+)", tiny, re.MULTILINE)
    found = dict(score=official[-1] if official else tiny.strip().splitlines()[-1][:80])
    for name, text in (("tiny parameters", tiny), ("parameters", plan)):
        counted = re.findall(r"^model_params:(\d+)", text, re.MULTILINE)
        found[name] = counted[-1] if counted else "unknown"
    return found


def presets(checkout: Path) -> list[str]:
    """Names of a checkout's presets, without overlays."""
    listed = subprocess.run(
        [sys.executable, "-c", LISTED], cwd=checkout, capture_output=True, encoding="utf-8"
    )
    return [name for name in listed.stdout.split() if name not in OVERLAYS]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--steps", type=int, default=4, help="of training (default 4)")
    asked = parser.parse_args()
    if not (asked.other / "train_gpt.py").is_file():
        parser.error(f"{asked.other}: no train_gpt.py")
    names, differ = asked.presets or presets(ROOT), 0
    known = presets(asked.other)
    print("| preset | what | here | there |\n|---|---|---|---|")
    for name in names:
        if name not in known:
            print(f"| {name} | only here | | |")
            continue
        here, there = seen(ROOT, name, asked.steps), seen(asked.other.resolve(), name, asked.steps)
        for what, value in here.items():
            same = value == there[what] and value != "unknown"
            differ += not same
            print(
                f"| {name} | {what} | {value} | {'the same' if same else there[what]} |", flush=True
            )
    print(f"{differ} differences in {len(names)} presets")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The first-card script runs to its end on the null GPU."""

import json
import subprocess
import sys
from pathlib import Path

import null_only  # noqa: F401
import pytest

HERE = Path(__file__).resolve().parent

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("form", ((), ("--short",)), ids=("long", "short"))
def test_every_stage_ends_well(form, tmp_path):
    command = [sys.executable, str(HERE.parent / "first_card.py"), *form, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "report.json").read_text())["stages"]
    ends = {stage["stage"]: (stage["ending"], stage["why"]) for stage in stages}
    assert set(ends.values()) == {("ok", "")}, ends
    assert len(stages) == (7 if form else 8)
    figures = {f["name"]: f["value"] for stage in stages for f in stage["figures"]}
    # NCCL asks the driver for more than the null GPU has; FA3 is a package of its own
    absent = {name for name, value in figures.items() if value is None}
    assert absent <= {"all-reduce of 64 MiB alone, ms", "a run under NCCL", "FA3 forward, ms"}
    assert done.stdout == (tmp_path / "report.txt").read_text()

"""A record folder of the champion, made by records/tools.py from the runs that confirmed it."""

import re
import subprocess
import sys
from pathlib import Path

from . import ForgeError, report

TOOLS = Path(__file__).resolve().parents[1] / "tools.py"
TRACKS = ("non_record_16mb", "10min_16mb")


def export(c, track: str, title: str, author: str, out: Path | None = None) -> str:
    """Write the folder and return what the tool said. Raises ForgeError when nothing is confirmed, a run's folder is
    gone, or the tool refuses."""
    confirmed = report.gain_of(c.state)
    if not confirmed:
        raise ForgeError(
            "nothing is confirmed yet: `export` writes the champion, and there is none"
        )
    if track not in TRACKS:
        raise ForgeError(f"--track {track}: want one of {', '.join(TRACKS)}")
    if not TOOLS.exists():
        raise ForgeError("records/tools.py is missing: it makes the folder")
    x = c.state.experiments[confirmed["exp"]]
    folders = []
    for seed in confirmed["seeds_used"]:
        run = c.state.run_of(x.change, x.rung, seed)
        folder = c.folder / "runs" / run.key / f"a{run.record['attempt']}"
        if not folder.is_dir():
            raise ForgeError(
                f"run {run.key}: its folder is gone; run the configuration again on seed {seed}"
            )
        folders.append(str(folder))
    low, high = confirmed["ci95"]
    blurb = (
        f"Found by the forge in campaign {c.folder.name}: {report.label(x.change)}. Against the configuration "
        f"that it was tested with, on fresh seeds: {confirmed['delta']:+.4f} [{low:+.4f}, {high:+.4f}] bits per "
        "byte."
    )
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", title or c.folder.name).strip("_")[
        :49
    ]  # as folders are named
    command = [
        sys.executable,
        str(TOOLS),
        "new",
        *folders,
        "--name",
        name,
        "--track",
        track,
        "--blurb",
        blurb,
        "--script",
        str(c.script(x.change)),
    ]
    command += ["--author", author] if author else []
    command += ["--records", str(out)] if out else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ForgeError(f"records/tools.py new: {(done.stderr or done.stdout).strip()[:1000]}")
    return done.stdout.strip()

"""A record folder of the champion, made by records/tools.py from the runs that confirmed it."""

import re
import subprocess
import sys
from pathlib import Path

from . import ForgeError
from .processes import located
from .standing import gain_of, label
from .view import View

TOOLS = Path(__file__).resolve().parents[1] / "tools.py"
TRACKS = ("non_record_16mb", "10min_16mb")
NAME_LENGTH = 49  # as folders of records are named


def run_folders(view: View, confirmed: dict) -> list[str]:
    """The folders of the champion's runs on fresh seeds. Raises ForgeError when one is gone."""
    x = view.state.experiments[confirmed["exp"]]
    found = []
    for seed in confirmed["seeds_used"]:
        run = view.state.run_of(x.change, x.rung, seed)
        folder = view.folder / "runs" / run.key / f"a{run.record['attempt']}"
        if not folder.is_dir():
            raise ForgeError(
                f"run {run.key}: its folder is gone; run the configuration again on seed {seed}"
            )
        found.append(str(folder))
    return found


def text_folder(view: View, change: dict) -> str:
    """The folder of the text that the runs were trained on; empty for the script's own choice."""
    env = located(view.config["base"], view.script(change))
    data = env.get("DATA_PATH", "auto")
    return "" if data == "auto" else data


def export(view: View, track: str, title: str, author: str, out: Path | None = None) -> str:
    """Write the folder and return what the tool said. Raises ForgeError when nothing is confirmed,
    a run's folder is gone, or the tool refuses."""
    confirmed = gain_of(view.state)
    if not confirmed:
        raise ForgeError(
            "nothing is confirmed yet: `export` writes the champion, and there is none"
        )
    if track not in TRACKS:
        raise ForgeError(f"--track {track}: want one of {', '.join(TRACKS)}")
    if not TOOLS.exists():
        raise ForgeError("records/tools.py is missing: it makes the folder")
    change = view.state.experiments[confirmed["exp"]].change
    low, high = confirmed["ci95"]
    blurb = (
        f"Found by the forge in campaign {view.name}: {label(change)}. Against the configuration "
        f"that it was tested with, on fresh seeds: {confirmed['delta']:+.4f} [{low:+.4f}, "
        f"{high:+.4f}] bits per byte."
    )
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", title or view.name).strip("_")[:NAME_LENGTH]
    command = [sys.executable, str(TOOLS), "new", *run_folders(view, confirmed)]
    command += ["--name", name, "--track", track, "--blurb", blurb]
    command += ["--script", str(view.script(change))]
    command += ["--author", author] if author else []
    if text := text_folder(view, change):
        command += ["--data", text]
    command += ["--records", str(out)] if out else []
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise ForgeError(f"records/tools.py new: {(done.stderr or done.stdout).strip()[:1000]}")
    return done.stdout.strip()

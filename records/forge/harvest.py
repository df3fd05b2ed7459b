"""What others measured: any records tree sorted into High, Medium and Low, with a reason for every
folder.

High: at least two seeds, within the budget, and better than the best earlier record of its track by
two of its own standard deviations. Medium: better, but on one seed, or the first of its track. Low:
over the budget, or no better. Nothing is executed, files are read with bounds, and a folder that
cannot be read is listed with the reason.

A record speaks for the knobs that it sets differently from the record that it was compared with,
and so for the skills that own them: `prior` turns that into counts for and against each skill,
which a campaign's search begins with.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from facts.files import number, read_bounded, read_json
from facts.limits import ARTIFACT_BYTES
from facts.logs import is_result, read_log

from .processes import clean_environment

COUNTS = dict(High=(3, 1), Medium=(1, 1), Low=(1, 3))  # for and against a skill, from one record
# The counts of a skill are scaled down to this sum, so that a campaign's own tries outweigh them.
MOST = 4
TEXT_BYTES = 1 << 23  # of a script or README that are read
PLAUSIBLE = (0.1, 20.0)  # bits per byte that a language model can have
READ_KNOB = re.compile(
    r"""environ\.get\(\s{0,20}["']([A-Z][A-Z0-9_]{1,60})["'],\s{0,20}["']?([^"'()\s,]{1,200})"""
)
SET_KNOB = re.compile(r"""(?<![\w$])([A-Z][A-Z0-9_]{1,60})=["']?([^\s"'`\\;,|)]{1,200})""")
SCORES = ("val_bpb", "ttt_bpb", "bpb", "final_bpb", "sliding_bpb", "val_bpb_exact")
MEANS = ("val_bpb", "mean_val_bpb", "mean_bpb")
SIZES = ("bytes_total", "artifact_bytes", "total_bytes", "bytes")

# Executed in a process of its own: the script is imported, never run.
TRANSLATE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
script = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
print(json.dumps([script.translate(env)[0] for env in json.load(sys.stdin)]))
"""


def score_of(entry: Any) -> float | None:
    """The bits per byte of one seed's entry: a number, or a table that holds one."""
    if isinstance(entry, dict):
        return next((s for k in SCORES if (s := number(entry.get(k))) is not None), None)
    found = number(entry)
    return found if found is not None and 0.2 < found < 5 else None


def entries_of(key: str, value: Any, seeds: list[str]) -> list[tuple[str, Any]]:
    """(seed, entry) pairs in one field of a submission.json; `seeds` are those listed beside it."""
    if isinstance(value, dict):
        named = ((re.fullmatch(r"(?:seed[_ ]?)?(\d{1,6})", str(k)), v) for k, v in value.items())
        return [(m[1], v) for m, v in named if m]
    if not isinstance(value, list):
        return []
    tables = [(str(v["seed"]), v) for v in value if isinstance(v, dict) and "seed" in v]
    if tables or key == "seeds" or len(seeds) != len(value):
        return tables
    return list(zip(seeds, value))


def seeds_of(table: dict) -> dict[str, float]:
    """Per-seed scores wherever a submission.json keeps them: {"1337": ...}, [{"seed": 1337, ...}],
    or one list of seeds beside one of scores, at any depth."""
    found: dict[str, float] = {}
    listed = table.get("seeds")
    seeds = [str(s) for s in listed] if isinstance(listed, list) else []
    for key, value in table.items():
        entries = entries_of(key, value, seeds)
        if not entries and isinstance(value, dict) and not found:
            found = seeds_of(value)
        scores = {k: s for k, v in entries if (s := score_of(v)) is not None}
        found = scores if len(scores) > len(found) else found
    return found


def text_of(path: Path) -> str:
    """A stranger's text; empty when it is missing, too long or no regular file."""
    try:
        return read_bounded(path, TEXT_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def settings_of(folder: Path) -> dict[str, str]:
    """{knob: value} that a record ran with: its config.json where records/tools.py wrote one, else
    the defaults that its train_gpt.py reads from the environment, changed by the command in its
    README. Empty if nothing can be read."""
    try:
        knobs = read_json(folder / "config.json")["knobs"]
        found = {name.upper(): entry["value"] for name, entry in knobs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = dict(READ_KNOB.findall(text_of(folder / "train_gpt.py")))
        said = dict(SET_KNOB.findall(text_of(folder / "README.md")))
        found |= {n: v for n, v in said.items() if n in found or not found}
    return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> str:
    """One text for one value: 1, 1.0, True and "1" are the same, and so are 524_288 and 524288."""
    text = dict(true="1", false="0").get(str(value).lower(), str(value))
    found = number(text)
    return text if found is None else f"{found:.6g}"


def read_folder(folder: Path) -> dict[str, Any]:
    """One record folder. Raises ValueError or OSError with the reason when it cannot be read or
    holds no score."""
    path = next(iter(sorted(folder.glob("submission*.json"))), None)  # some carry a suffix
    if path is None:
        raise ValueError("no submission.json")
    try:
        table = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    seeds = seeds_of(table)
    logs = {}
    for log in sorted(folder.glob("*.log")) + sorted(folder.glob("*.txt")):
        m = re.search(r"seed[_-]?(\d{1,6})", log.name)
        if m and log.is_file():  # no pipe, no device
            results = [c for c in read_log(log).claims if is_result(c)]
            if results:
                logs[m[1]] = results[-1].bpb
    seeds = seeds if len(seeds) >= len(logs) else logs
    stated = [s for k in MEANS if (s := number(table.get(k))) is not None]
    if not stated and not seeds:
        raise ValueError("no score in submission.json or logs")
    bpb = stated[0] if stated else statistics.mean(seeds.values())
    low, high = PLAUSIBLE
    if not all(low < s < high for s in (bpb, *seeds.values())):
        raise ValueError(f"{bpb:g} bits per byte is no score")
    sizes = [s for k in SIZES if (s := number(table.get(k))) is not None]
    if sizes and not 0 <= sizes[0] < 1e15:
        raise ValueError(f"{sizes[0]:g} bytes is no size")
    return dict(
        folder=folder.name,
        track=folder.parent.name,
        name=str(table.get("name", folder.name))[:200],
        bpb=bpb,
        date=str(table.get("date", folder.name))[:10],
        seeds=seeds,
        bytes=int(sizes[0]) if sizes else None,
        settings=settings_of(folder),
    )


def bucket(record: dict, earlier: list[dict]) -> tuple[str, str]:
    """(High, Medium or Low, why) of a record, given those of its track that came before."""
    if record["bytes"] and record["bytes"] > ARTIFACT_BYTES:
        return "Low", f"{record['bytes']:,} bytes are over the budget"
    if not earlier:
        return "Medium", "the first of its track: nothing to compare with"
    best = min(earlier, key=lambda r: r["bpb"])
    delta = record["bpb"] - best["bpb"]
    text = f"{delta:+.4f} against {best['folder']}"
    seeds = record["seeds"]
    if delta >= 0:
        return "Low", text
    if len(seeds) < 2:
        return "Medium", text + (", on one seed" if seeds else ", without scores per seed")
    spread = statistics.stdev(seeds.values())
    if -delta > 2 * spread:
        return "High", f"{text}, {len(seeds)} seeds of sd {spread:.4f}"
    return "Medium", f"{text} is within two sd of {spread:.4f}"


def places(root: Path) -> tuple[list[Path], list[dict]]:
    """(folders below `root` that look like records, those that cannot be opened); a record's own
    folders are part of it, links are not followed."""
    found = set()
    closed = []

    def unread(error: OSError):
        name = Path(error.filename or ".").name
        closed.append(dict(folder=name, reason=error.strerror or "cannot be opened"))

    for top, folders, names in os.walk(root, onerror=unread):
        folders[:] = sorted(f for f in folders if f != ".git")
        if any(fnmatch(n, "submission*.json") or fnmatch(n, "train*") for n in names):
            found.add(Path(top))
    found.discard(Path(root))
    return sorted(f for f in found if not found & set(f.parents)), closed


def harvest(root: Path, script: Path | None = None) -> dict[str, Any]:
    """Every folder below `root` that looks like a record, in order of date: parsed, or listed with
    the reason. `script`, our own, knows what the variables of published scripts are called here."""
    folders, unparsed = places(Path(root))
    records = []
    for folder in folders:
        try:
            records.append(read_folder(folder))
        except (ValueError, OSError, RecursionError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            unparsed.append(dict(folder=folder.name, reason=(reason or "unreadable")[:200]))
    if script:
        ours = translated(script, [r["settings"] for r in records])
        for record, names in zip(records, ours):
            record["settings"] |= {name: plain(value) for name, value in names.items()}
    records.sort(key=lambda r: (r["track"], r["date"], r["folder"]))
    for i, record in enumerate(records):
        earlier = [
            r
            for r in records[:i]
            if r["track"] == record["track"]
            and r["date"] < record["date"]
            and (r["bytes"] or 0) <= ARTIFACT_BYTES
        ]
        record["bucket"], record["reason"] = bucket(record, earlier)
        other = min(earlier, key=lambda r: r["bpb"])["settings"] if earlier else {}
        mine = record["settings"].items()
        record["changed"] = sorted(n for n, v in mine if other and other.get(n, v) != v)
    for record in records:
        del record["settings"]
    several = sum(len(r["seeds"]) > 1 for r in records)
    return dict(records=records, unparsed=unparsed, with_seeds=several)


def translated(script: Path, settings: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same settings in the words of our own script, as far as it knows theirs; nothing where it
    cannot be asked."""
    done = subprocess.run(
        [sys.executable, "-c", TRANSLATE, str(script)],
        input=json.dumps(settings),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=clean_environment(dict(PYTHONIOENCODING="utf-8")),
        timeout=300,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return [{} for _ in settings]


def prior(found: dict, owners: dict[str, str]) -> dict[str, list[float]]:
    """{skill: [for, against]} from a harvest, given {knob: its skill}. A skill of whose knobs no
    record changed one is left out."""
    counts: dict[str, list[float]] = {}
    for record in found["records"]:
        for skill in sorted({owners[n] for n in record["changed"] if n in owners}):
            mine = counts.setdefault(skill, [0.0, 0.0])
            mine[:] = [a + b for a, b in zip(mine, COUNTS[record["bucket"]])]
    scaled = {}
    for skill, mine in counts.items():
        factor = min(1.0, MOST / sum(mine))
        scaled[skill] = [round(n * factor, 3) for n in mine]
    return scaled


def text(found: dict) -> str:
    """The harvest as a table."""
    lines = []
    for r in found["records"]:
        seeds = f"{len(r['seeds'])} seeds"
        lines.append(f"{r['bucket']:<7} {r['bpb']:.4f} {seeds}  {r['folder']}: {r['reason']}")
    lines += [f"unread  {u['folder']}: {u['reason']}" for u in found["unparsed"]]
    records = len(found["records"])
    unread = len(found["unparsed"])
    lines.append(f"{records} records, {found['with_seeds']} with several seeds, {unread} unread")
    return "\n".join(lines)

"""What others measured: any records tree sorted into High, Medium and Low, with a reason for every folder.

High: at least two seeds, within the budget, and better than the best earlier record of its track by two of its own
standard deviations. Medium: better, but on one seed, or the first of its track. Low: over the budget, or no better.
Nothing is executed.

A record speaks for the knobs that it sets differently from the record that it was compared with, and so for the skills
that own them: `prior` turns that into counts for and against each skill, which a campaign's search begins with.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from . import runner

BUDGET = 16_000_000
COUNTS = dict(High=(3, 1), Medium=(1, 1), Low=(1, 3))  # for and against a skill, from one record
MOST = 4  # the counts of a skill are scaled down to this sum, so that a campaign's own tries outweigh them
READ_KNOB = re.compile(r"""environ\.get\(\s*["']([A-Z][A-Z0-9_]+)["'],\s*["']?([^"'()\s,]+)""")
SET_KNOB = re.compile(r"""(?<![\w$])([A-Z][A-Z0-9_]+)=["']?([^\s"'`\\;,|)]+)""")


def score_of(entry: Any) -> float | None:
    """The bits per byte of one seed's entry: a number, or a table that holds one."""
    if isinstance(entry, dict):
        for key in ("val_bpb", "ttt_bpb", "bpb", "final_bpb", "sliding_bpb", "val_bpb_exact"):
            if isinstance(entry.get(key), (int, float)):
                return float(entry[key])
        return None
    return float(entry) if isinstance(entry, (int, float)) and 0.2 < entry < 5 else None


def seeds_of(table: dict) -> dict[str, float]:
    """Per-seed scores wherever a submission.json keeps them: {"1337": ...}, [{"seed": 1337, ...}], or one list of seeds
    beside one of scores, at any depth."""
    found: dict[str, float] = {}
    names = [str(s) for s in table["seeds"]] if isinstance(table.get("seeds"), list) else []
    for key, value in table.items():
        entries = []
        if isinstance(value, dict):
            entries = [
                (m[1], v)
                for k, v in value.items()
                if (m := re.fullmatch(r"(?:seed[_ ]?)?(\d{1,6})", str(k)))
            ]
            if not entries:
                found = found or seeds_of(value)
        elif isinstance(value, list):
            entries = [(str(v["seed"]), v) for v in value if isinstance(v, dict) and "seed" in v]
            if not entries and key != "seeds" and len(names) == len(value):
                entries = list(zip(names, value))
        scores = {k: s for k, v in entries if (s := score_of(v)) is not None}
        found = scores if len(scores) > len(found) else found
    return found


def settings_of(folder: Path) -> dict[str, str]:
    """{knob: value} that a record ran with: its config.json where records/tools.py wrote one, else the defaults that
    its train_gpt.py reads from the environment, changed by the command in its README. Empty if nothing can be read."""
    text = lambda name: (
        (folder / name).read_text("utf-8", "replace") if (folder / name).exists() else ""
    )  # noqa: E731
    try:
        knobs = json.loads(text("config.json"))["knobs"]
        found = {name.upper(): entry["value"] for name, entry in knobs.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        found = dict(READ_KNOB.findall(text("train_gpt.py")))
        found |= {n: v for n, v in SET_KNOB.findall(text("README.md")) if n in found or not found}
    return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> str:
    """One text for one value: 1, 1.0, True and "1" are the same, and so are 524_288 and 524288."""
    try:
        return f"{float(dict(true='1', false='0').get(str(value).lower(), value)):.6g}"
    except ValueError:
        return str(value)


def read_folder(folder: Path) -> dict[str, Any]:
    """One record folder. Raises ValueError with the reason when it holds no score."""
    path = next(iter(sorted(folder.glob("submission*.json"))), None)  # some carry a suffix
    if path is None:
        raise ValueError("no submission.json")
    try:
        table = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} holds no table")
    seeds, logs = seeds_of(table), {}
    for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.txt")):
        finals = runner.parse_log(path.read_text("utf-8", "replace"))["finals"]
        if finals and (m := re.search(r"seed[_-]?(\d+)", path.name)):
            logs[m[1]] = finals[-1][1]
    seeds = seeds if len(seeds) >= len(logs) else logs
    bpb = next(
        (
            float(table[k])
            for k in ("val_bpb", "mean_val_bpb", "mean_bpb")
            if isinstance(table.get(k), (int, float))
        ),
        statistics.mean(seeds.values()) if seeds else None,
    )
    if bpb is None or not math.isfinite(bpb):
        raise ValueError("no score in submission.json or logs")
    size = next(
        (
            int(table[k])
            for k in ("bytes_total", "artifact_bytes", "total_bytes", "bytes")
            if isinstance(table.get(k), (int, float))
        ),
        None,
    )
    return dict(
        folder=folder.name,
        track=folder.parent.name,
        name=str(table.get("name", folder.name)),
        bpb=bpb,
        date=str(table.get("date", folder.name))[:10],
        seeds=seeds,
        bytes=size,
        settings=settings_of(folder),
    )


def bucket(record: dict, earlier: list[dict]) -> tuple[str, str]:
    """(High, Medium or Low, why) of a record, given those of its track that came before."""
    if record["bytes"] and record["bytes"] > BUDGET:
        return "Low", f"{record['bytes']:,} bytes are over the budget"
    if not earlier:
        return "Medium", "the first of its track: nothing to compare with"
    best = min(earlier, key=lambda r: r["bpb"])
    delta = record["bpb"] - best["bpb"]
    if delta >= 0:
        return "Low", f"{delta:+.4f} against {best['folder']}"
    if len(record["seeds"]) < 2:
        return "Medium", f"{delta:+.4f} against {best['folder']}, " + (
            "on one seed" if record["seeds"] else "without scores per seed"
        )
    spread = statistics.stdev(record["seeds"].values())
    if -delta > 2 * spread:
        return (
            "High",
            f"{delta:+.4f} against {best['folder']}, {len(record['seeds'])} seeds of sd {spread:.4f}",
        )
    return "Medium", f"{delta:+.4f} against {best['folder']} is within two sd of {spread:.4f}"


def harvest(root: Path) -> dict[str, Any]:
    """Every folder below `root` that looks like a record, in order of date: parsed, or listed with the reason."""
    places = {
        p.parent
        for name in ("submission*.json", "train*")
        for p in root.rglob(name)
        if p.is_file() and p.parent != root and ".git" not in p.parts
    }
    folders = sorted(
        f for f in places if not places & set(f.parents)
    )  # a record's own folders are part of it
    records, unparsed = [], []
    for folder in folders:
        try:
            records.append(read_folder(folder))
        except (ValueError, OSError) as error:
            unparsed.append(dict(folder=folder.name, reason=str(error)))
    records.sort(key=lambda r: (r["track"], r["date"], r["folder"]))
    for i, record in enumerate(records):
        earlier = [
            r
            for r in records[:i]
            if r["track"] == record["track"]
            and r["date"] < record["date"]
            and (r["bytes"] or 0) <= BUDGET
        ]
        record["bucket"], record["reason"] = bucket(record, earlier)
        other = min(earlier, key=lambda r: r["bpb"])["settings"] if earlier else {}
        record["changed"] = sorted(
            n for n, v in record["settings"].items() if other and other.get(n, v) != v
        )
    for record in records:
        del record["settings"]
    return dict(
        records=records, unparsed=unparsed, with_seeds=sum(len(r["seeds"]) > 1 for r in records)
    )


def prior(found: dict, owners: dict[str, str]) -> dict[str, list[float]]:
    """{skill: [for, against]} from a harvest, given {knob: its skill}. A skill of whose knobs no record changed one is
    left out."""
    counts: dict[str, list[float]] = {}
    for record in found["records"]:
        for skill in sorted({owners[n] for n in record["changed"] if n in owners}):
            mine = counts.setdefault(skill, [0.0, 0.0])
            mine[:] = [a + b for a, b in zip(mine, COUNTS[record["bucket"]])]
    return {
        skill: [round(n * min(1.0, MOST / sum(mine)), 3) for n in mine]
        for skill, mine in counts.items()
    }


def text(found: dict) -> str:
    """The harvest as a table."""
    lines = [
        f"{r['bucket']:<7} {r['bpb']:.4f} {len(r['seeds'])} seeds  {r['folder']}: {r['reason']}"
        for r in found["records"]
    ]
    lines += [f"unread  {u['folder']}: {u['reason']}" for u in found["unparsed"]]
    return "\n".join(
        [
            *lines,
            f"{len(found['records'])} records, {found['with_seeds']} with several seeds, "
            f"{len(found['unparsed'])} unread",
        ]
    )

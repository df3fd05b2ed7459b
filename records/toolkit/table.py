"""The leaderboard in records/README.md, from every submission.json below records/."""

import json
from pathlib import Path
from typing import Any

from .readme import between_markers, row

EMPTY = "No record folders yet: `python records/tools.py new` makes one from finished runs."


def submissions(records: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, submission) of every record that `new` made, best first within a track and a
    text."""
    found = [
        (p.parent, json.loads(p.read_text(encoding="utf-8")))
        for p in records.glob("track_*/*/submission.json")
    ]
    found = [(folder, s) for folder, s in found if isinstance(s, dict) and "evidence" in s]
    return sorted(
        found,
        key=lambda item: (item[1]["track"], item[1]["evidence"]["val_bytes"], item[1]["val_bpb"]),
    )


def leaderboard(records: Path) -> str:
    """One table per track and text: scores on different texts do not stand in one table."""
    parts: dict[tuple, list[str]] = {}
    for folder, s in submissions(records):
        e = s["evidence"]
        spread = f" ± {s['val_bpb_std']:.4f}" if s["val_bpb_std"] is not None else ""
        audits = [a["status"] for a in e["audits"]]
        lines = parts.setdefault((s["track"], e["val_bytes"]), [])
        lines.append(
            row(
                len(lines) + 1,
                f"**{s['val_bpb']:.4f}**{spread}",
                len(s["seeds"]),
                f"[{s['name']}]({folder.relative_to(records)})",
                s["date"],
                f"{s['bytes_total']:,}",
                s["hardware"],
                f"{audits.count('pass')} of {len(audits)}",
            )
        )
    head = [
        row(
            "rank", "bits per byte", "seeds", "record", "date", "bytes", "hardware", "audits passed"
        ),
        "|---" * 8 + "|",
    ]
    return (
        "\n\n".join(
            "\n".join([f"Track `{track}`, text of {size:,} bytes", "", *head, *lines])
            for (track, size), lines in parts.items()
        )
        or EMPTY
    )


def refreshed(records: Path) -> str:
    """records/README.md with the leaderboard as the folders say now."""
    return between_markers(
        (records / "README.md").read_text(encoding="utf-8"), dict(leaderboard=leaderboard(records))
    )

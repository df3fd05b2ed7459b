"""A record folder as facts: its files, submission.json, script and logs, read with bounds and never executed.

A folder may come from anybody. Links are noted and not followed, only regular files are opened, sizes are bounded, and
scripts are parsed as text.
"""

import ast
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import read_json
from .logs import Log, read_log
from .wrappers import MAX_SOURCE_BYTES, parsed, unwrapped

MAX_FILES, MAX_DEPTH, MAX_LOGS = 2000, 4, 40
NOT_LOGS = re.compile(
    r"requirements.*\.txt|.*readme.*|license.*|vocab.*\.txt|.*\.model\.txt", re.IGNORECASE
)


@dataclass
class Folder:
    """What is in a folder. `problems` are findings of reading itself: (rule, file, evidence)."""

    path: Path
    files: dict[str, int] = field(default_factory=dict)  # regular files: size in bytes
    links: list[str] = field(default_factory=list)
    submission: dict[str, Any] = field(default_factory=dict)
    script: bytes = b""  # as shipped
    inner: bytes = b""  # without wrapping
    tree: ast.Module | None = None  # of the inner script
    nodes: list[ast.AST] = field(default_factory=list)  # all of the tree
    logs: list[Log] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def track(self) -> str:
        """ "record", "non-record", or "" when the folder does not say."""
        text = f"{self.path.resolve().parent.name} {self.submission.get('track')}".lower()
        if re.search(r"non.?record|unlimited|notable", text):
            return "non-record"
        return "record" if "10min" in text.replace("_", "").replace("-", "") else ""

    @property
    def date(self) -> str:
        """YYYY-MM-DD of the folder's name or of its submission.json; empty when neither says."""
        for text in (self.path.resolve().name, str(self.submission.get("date"))):
            if found := re.match(r"20\d\d-\d\d-\d\d", text):
                return found[0]
        return ""

    @property
    def named_logs(self) -> list[Log]:
        """Logs that surely stand for a seed of the record: listed in submission.json or called train_seed<N>.log."""
        results = self.submission.get("seed_results")
        listed = (
            {str(r.get("log")) for r in results.values() if isinstance(r, dict)}
            if isinstance(results, dict)
            else set()
        )
        return [
            g
            for g in self.logs
            if g.name in listed
            or re.fullmatch(r"train_seed_?\d+\.(log|txt)", g.name)
            or len(self.logs) == 1
        ]

    @property
    def seed_logs(self) -> list[Log]:
        """Logs that stand for the record, each content once; where names do not tell, they may be ablations too."""
        chosen = (
            self.named_logs
            or [g for g in self.logs if re.search(r"seed[_-]?\d+", g.name)]
            or self.logs
        )
        return list({g.sha256 or g.name: g for g in chosen}.values())


def entries(top: Path, depth: int = 0) -> Iterator[tuple[str, os.DirEntry]]:
    """(relative name, entry) of everything below a folder that is no link, and of the links themselves."""
    with os.scandir(top) as found:
        for entry in sorted(found, key=lambda e: e.name):
            yield entry.name, entry
            if (
                entry.is_dir(follow_symlinks=False)
                and depth < MAX_DEPTH
                and entry.name not in (".git", "__pycache__")
            ):
                yield from (
                    (f"{entry.name}/{name}", e) for name, e in entries(Path(entry.path), depth + 1)
                )


def read_scripts(folder: Folder):
    """Fill script, inner and tree from train_gpt.py, or from the only Python file."""
    names = [n for n in folder.files if n.endswith(".py") and "/" not in n]
    name = "train_gpt.py" if "train_gpt.py" in names else names[0] if len(names) == 1 else ""
    if not name:
        return
    if folder.files[name] > MAX_SOURCE_BYTES:
        folder.problems.append(("W8", name, f"{folder.files[name]:,} bytes are no script"))
        return
    folder.script = (folder.path / name).read_bytes()
    folder.inner = unwrapped(folder.script)
    folder.tree = parsed(folder.inner)
    folder.nodes = list(ast.walk(folder.tree)) if folder.tree else []


def read_folder(path: Path) -> Folder:
    """Read a record folder. Raises ValueError when it is none."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    folder = Folder(path)
    for name, entry in entries(path):
        if entry.is_symlink():
            folder.links.append(name)
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            folder.files[name] = entry.stat(follow_symlinks=False).st_size
        if len(folder.files) > MAX_FILES:
            folder.problems.append(
                ("W8", name, f"more than {MAX_FILES} files; the rest is not read")
            )
            break
    if "submission.json" in folder.files:
        try:
            folder.submission = read_json(path / "submission.json")
        except (ValueError, OSError) as error:
            folder.problems.append(
                ("W8", "submission.json", f"not readable as JSON ({str(error)[:80]})")
            )
    read_scripts(folder)
    logs = [
        n
        for n in folder.files
        if re.search(r"\.(log|txt)$", n) and not NOT_LOGS.fullmatch(Path(n).name)
    ]
    for name in logs[:MAX_LOGS]:
        log = read_log(path / name)
        log.name = name
        if name.endswith(".log") or log.official:
            folder.logs.append(log)
    return folder

"""A record folder as facts: its files, submission.json, code and logs, read with bounds.

A folder may come from anybody. Links are noted and not followed, only regular files are opened,
sizes are bounded, and code is read as data and never executed.
"""

import ast
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_bounded, read_json
from .logs import Log, read_log
from .wrappers import MAX_SOURCE_BYTES, layers, parsed

MAX_FILES, MAX_DEPTH, MAX_LOGS, MAX_MODULES = 2000, 4, 40, 40
NOT_LOGS = re.compile(
    r"requirements.*\.txt|.*readme.*|license.*|vocab.*\.txt|.*\.model\.txt", re.IGNORECASE
)
COMPILED = re.compile(r"\.(cu|cuh|cpp|cc|cxx|c|h|hpp|rs|zig|ptx|cubin|so|pyd|dll|pyc|o|a|wasm)$")


class Source(NamedTuple):
    """Code of a record that runs, as the text that does the work."""

    name: str  # of the file that it came from
    text: bytes
    tree: ast.Module | None
    nodes: list[ast.AST]  # all of the tree


@dataclass
class Folder:
    """What is in a folder. `problems` are findings of reading itself: (rule, file, evidence)."""

    path: Path
    files: dict[str, int] = field(default_factory=dict)  # regular files: size in bytes
    links: list[str] = field(default_factory=list)
    submission: dict[str, Any] = field(default_factory=dict)
    script: bytes = b""  # as shipped
    script_name: str = ""
    inner: bytes = b""  # without wrapping
    sources: list[Source] = field(default_factory=list)  # the script's, then its helper modules
    code: dict[str, int] = field(default_factory=dict)  # bytes of every file whose code runs
    logs: list[Log] = field(default_factory=list)
    unread_logs: list[str] = field(default_factory=list)  # called logs, but without any line of one
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def tree(self) -> ast.Module | None:
        """The script's syntax tree, wrapping taken off; None without a script that parses."""
        return self.sources[0].tree if self.sources else None

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
        """Logs that surely stand for a seed of the record: listed in submission.json or called
        train_seed<N>.log."""
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
        """Logs that stand for the record, each content once; where names do not tell, they may be
        ablations too."""
        chosen = (
            self.named_logs
            or [g for g in self.logs if re.search(r"seed[_-]?\d+", g.name)]
            or self.logs
        )
        return list({g.sha256 or g.name: g for g in chosen}.values())


def entries(top: Path, depth: int = 0) -> Iterator[tuple[str, os.DirEntry]]:
    """(relative name, entry) of everything below a folder that is no link, and of the links
    themselves."""
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


def content(folder: Folder, name: str) -> bytes | None:
    """A regular file of the folder by its path, or by its name alone where only one has it."""
    same = [n for n in folder.files if n == name] or [
        n for n in folder.files if n.rsplit("/", 1)[-1] == name
    ]
    if len(same) != 1 or folder.files[same[0]] > MAX_SOURCE_BYTES:
        return None
    try:
        return read_bounded(folder.path / same[0], MAX_SOURCE_BYTES)
    except (OSError, ValueError):
        return None


def main_script(folder: Folder) -> str:
    """Name of the script: train_gpt.py, else the only one called train_gpt*, else the only one."""
    names = [n for n in folder.files if n.endswith(".py") and "/" not in n]
    for chosen in (
        [n for n in names if n == "train_gpt.py"],
        [n for n in names if n.startswith("train_gpt")],
        names,
    ):
        if len(chosen) == 1:
            return chosen[0]
    return ""


def read_scripts(folder: Folder):
    """Open the script, whatever it is wrapped in, and all of the folder's code that it runs."""
    name = main_script(folder)
    if not name:
        return
    script = content(folder, name)
    if script is None:
        folder.problems.append(("W8", name, f"{folder.files[name]:,} bytes are no script"))
        return
    folder.script, folder.script_name = script, name
    opened = layers(script, name, lambda file: content(folder, file))
    folder.inner = opened[-1].source
    add_source(folder, name, folder.inner)
    for file in [name, *(f for layer in opened for f in layer.files)]:
        count_code(folder, file)
    read_modules(folder)
    count_compiled(folder)


def add_source(folder: Folder, name: str, text: bytes):
    """Keep a text of code with its tree."""
    tree = parsed(text)
    folder.sources.append(Source(name, text, tree, list(ast.walk(tree)) if tree else []))


def count_code(folder: Folder, file: str):
    """Note the bytes of a file whose code runs."""
    for name, size in folder.files.items():
        if name == file or name.endswith("/" + file):
            folder.code[name] = size


def read_modules(folder: Folder):
    """Add the modules of the folder that its code imports, and those that they import."""
    waiting = list(folder.sources)
    while waiting and len(folder.sources) < MAX_MODULES:
        for name in sorted(imported(waiting.pop(0))):
            files = [f for f in folder.files if f == f"{name}.py" or f.startswith(f"{name}/")]
            for file in files:
                if not file.endswith(".py") or file in folder.code:
                    continue
                text = content(folder, file)
                if text is not None:
                    inside = layers(text, file, lambda f: content(folder, f))[-1].source
                    add_source(folder, file, inside)
                    waiting.append(folder.sources[-1])
                count_code(folder, file)


def imported(source: Source) -> set[str]:
    """First parts of the names of modules that a text imports, or loads by a name written out."""
    names = set()
    for node in source.nodes:
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or a.name).split(".")[0] for a in node.names}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200
        ):
            if node.value.endswith(".py"):
                names.add(node.value.rsplit("/", 1)[-1].removesuffix(".py"))
    return names


def count_compiled(folder: Folder):
    """Note sources and libraries of other languages whose names stand in the code."""
    texts = b"\n".join(source.text for source in folder.sources)
    for name in folder.files:
        base = name.rsplit("/", 1)[-1]
        if COMPILED.search(base) and (
            base.encode() in texts or base.split(".")[0].encode() in texts
        ):
            folder.code[name] = folder.files[name]


def read_folder(path: Path) -> Folder:
    """Read a record folder. Raises ValueError when it is none."""
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
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
        try:
            log = read_log(path / name)
        except OSError as error:
            folder.problems.append(("W8", name, f"cannot be read: {error.strerror}"))
            continue
        log.name = name
        if name.endswith(".log") or log.official:
            folder.logs.append(log)
        if name.endswith(".log") and not log.readable:
            folder.unread_logs.append(name)
    return folder

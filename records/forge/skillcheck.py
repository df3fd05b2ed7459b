"""Checks of skill folders: the Agent Skills format (agentskills.io/specification) and this forge's own files."""
import json
import re
from pathlib import Path

from . import ForgeError, space

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KEYS = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}


def frontmatter(text: str) -> tuple[dict, str]:
    """The block-style YAML head of a SKILL.md as {key: text or {key: text}}, and the body. Raises ValueError."""
    parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S)
    if not parts:
        raise ValueError("no frontmatter between --- lines")
    found: dict = {}
    key = ""
    for line in parts[1].splitlines():
        if m := re.fullmatch(r"([a-z-]+):\s*(.*)", line):
            key = m[1]
            found[key] = m[2].strip("\"'") if m[2] else {}
        elif (m := re.fullmatch(r"  ([\w-]+):\s*(.+)", line)) and isinstance(found.get(key), dict):
            found[key][m[1]] = m[2].strip("\"'")
        else:
            raise ValueError(f"line {line!r}: want `key: value`, or two spaces and `key: value` below metadata")
    return found, parts[2]


def check(folder: Path) -> list[str]:
    """What is wrong with one skill folder, by rule; empty when it is valid."""
    path = folder / "SKILL.md"
    try:
        head, body = frontmatter(path.read_text())
    except (OSError, ValueError) as error:
        return [f"{folder.name}/SKILL.md: {error}"]
    name, description = head.get("name", ""), head.get("description", "")
    rules = [
        (name == folder.name, f"name {name!r} is not the folder's"),
        (NAME.fullmatch(name) and len(name) <= 64, f"name {name!r}: want lowercase letters, digits, single hyphens"),
        (isinstance(description, str) and 1 <= len(description) <= 1024, "description: want 1 to 1024 characters"),
        (set(head) <= KEYS, f"unknown keys {', '.join(sorted(set(head) - KEYS))}"),
        (isinstance(head.get("metadata", {}), dict), "metadata: want a table of texts in block style"),
        (len(str(head.get("compatibility", ""))) <= 500, "compatibility: want at most 500 characters"),
        (len(body.splitlines()) < 500, "the body has 500 lines or more"),
        (len(body) / 4 < 5000, "the body has about 5,000 tokens or more")]
    return [f"{folder.name}/SKILL.md: {text}" for holds, text in rules if not holds]


def check_all(skills: Path, script: Path, env: dict | None = None) -> list[str]:
    """Every problem of a folder of skills, their knobs held against the script's own."""
    problems = [p for folder in sorted(skills.iterdir()) if folder.is_dir() for p in check(folder)]
    tables = {}
    for path in sorted(skills.glob("*/assets/knobs.json")):
        try:
            tables[path.parts[-3]] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            problems.append(f"{path.parts[-3]}/assets/knobs.json: {error}")
    try:
        space.Space.build(space.describe(script, env or {}), tables, env or {})
    except ForgeError as error:
        problems += str(error).splitlines()
    return problems

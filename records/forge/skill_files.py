"""Skill folders: checks against the Agent Skills format (agentskills.io/specification) and this
forge's own files, and new ones that pass them.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

from . import ForgeError, space

TEMPLATE = """---
name: {name}
description: {about}
metadata:
  forge-version: "1"
  forge-status: heuristic
  forge-knobs: assets/knobs.json
---

# {name}

{text}

Knobs and ranges are in `assets/knobs.json`. `assets/evidence.json` and `references/playbook.md` of
a campaign's copy are written by the forge: numbers there were measured, the text above was not.
"""

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KEYS = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}


def frontmatter(text: str) -> tuple[dict, str]:
    """The YAML head of a SKILL.md and the body. Raises ValueError."""
    import yaml

    parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S)
    if not parts:
        raise ValueError("no frontmatter between --- lines")
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(head, dict):
        raise ValueError("the frontmatter is no table")
    return head, parts[2]


def check(folder: Path) -> list[str]:
    """What is wrong with one skill folder, by rule; empty when it is valid."""
    path = folder / "SKILL.md"
    try:
        head, body = frontmatter(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder.name}/SKILL.md: {error}"]
    name = head.get("name", "")
    description = head.get("description", "")
    rules = [
        (name == folder.name, f"name {name!r} is not the folder's"),
        (
            NAME.fullmatch(str(name)) and len(name) <= 64,
            f"name {name!r}: want a-z, 0-9 and single hyphens",
        ),
        (
            isinstance(description, str) and 1 <= len(description) <= 1024,
            "description: want 1 to 1024 characters",
        ),
        (set(head) <= KEYS, f"unknown keys {', '.join(sorted(set(head) - KEYS))}"),
        (
            isinstance(head.get("metadata", {}), dict)
            and all(isinstance(v, str) for v in head.get("metadata", {}).values()),
            "metadata: want a table of texts",
        ),
        (
            len(str(head.get("compatibility", ""))) <= 500,
            "compatibility: want at most 500 characters",
        ),
        (len(body.splitlines()) < 500, "the body has 500 lines or more"),
        (len(body) / 4 < 5000, "the body has about 5,000 tokens or more"),
    ]
    return [f"{folder.name}/SKILL.md: {text}" for holds, text in rules if not holds]


def check_all(skills: Path, script: Path, env: dict | None = None) -> list[str]:
    """Every problem of a folder of skills, their knobs held against the script's own."""
    problems = [p for folder in sorted(skills.iterdir()) if folder.is_dir() for p in check(folder)]
    tables = {}
    for path in sorted(skills.glob("*/assets/knobs.json")):
        try:
            tables[path.parts[-3]] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            problems.append(f"{path.parts[-3]}/assets/knobs.json: {error}")
    try:
        space.Space.build(space.describe(script, env or {}), tables, env or {})
    except ForgeError as error:
        problems += str(error).splitlines()
    return problems


def knob_of(item: str) -> tuple[str, dict]:
    """NAME=LOW:HIGH[:log][:steps] or NAME=CHOICE,CHOICE as an entry of knobs.json. Raises
    ForgeError."""
    name, _, rest = item.partition("=")
    low, *more = rest.split(":")
    try:
        if not more:
            if "," not in rest:
                raise ValueError
            return name, dict(choices=rest.split(","))
        if set(more[1:]) - {"log", "steps"}:
            raise ValueError
        found = dict(low=float(low), high=float(more[0]))
        if "log" in more:
            found["log"] = True
        if "steps" in more:
            found["as"] = "fraction_of_steps"
        return name, found
    except ValueError:
        raise ForgeError(
            f"--knob {item}: want NAME=LOW:HIGH, with :log or :steps (a part of all steps) behind "
            "it, or NAME=CHOICE,CHOICE"
        ) from None


def create(
    skills: Path,
    name: str,
    about: str,
    knobs: dict[str, dict],
    script: Path,
    env: dict | None = None,
):
    """A new skill folder with its SKILL.md and knobs.json. Raises ForgeError, leaving nothing
    behind, when the name is taken, the format is broken, or a knob does not fit the script or
    belongs to another skill."""
    if not NAME.fullmatch(name):
        raise ForgeError(f"name {name!r}: want a-z, 0-9 and single hyphens")
    if (skills / name).exists():
        raise ForgeError(f"skill {name}: there is one already")
    with tempfile.TemporaryDirectory() as folder:
        drafts = Path(folder) / "skills"
        shutil.copytree(skills, drafts)
        (drafts / name / "assets").mkdir(parents=True)
        (drafts / name / "SKILL.md").write_text(
            TEMPLATE.format(name=name, about=json.dumps(about), text=about), "utf-8"
        )
        (drafts / name / "assets" / "knobs.json").write_text(
            json.dumps(knobs, indent=2) + "\n", "utf-8"
        )
        if problems := check(drafts / name) or check_all(drafts, script, env):
            raise ForgeError("\n".join(problems))
        shutil.copytree(drafts / name, skills / name)

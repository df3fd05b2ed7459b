"""What the verbs share: the campaign of a name, who decides for it, and how answers are printed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from . import ForgeError
from .campaign import Campaign
from .ledger import locked

CAMPAIGNS = Path(__file__).resolve().parents[1] / "campaigns"


def place(name: str) -> Path:
    """The folder that a campaign's name or path means."""
    return Path(name) if os.sep in name or Path(name).is_dir() else CAMPAIGNS / name


def campaign(name: str) -> Campaign:
    """The campaign of a name. Raises ForgeError when there is none."""
    folder = place(name)
    if not (folder / "events.jsonl").exists():
        raise ForgeError(f"{name}: no campaign there; begin one with `start {name} --preset ...`")
    return Campaign(folder)


@contextlib.contextmanager
def deciding(name: str) -> Iterator[Campaign]:
    """The campaign, while no other process decides for it."""
    lock = campaign(name).folder / "tick.lock"
    with locked(lock, busy=f"{name}: another decider is at work"):
        yield campaign(name)


def say(asked, data: dict, text: str):
    """Print JSON or words."""
    print(json.dumps(data, indent=1) if asked.json else text)


def pairs(items: list[str]) -> dict[str, str]:
    """NAME=VALUE arguments. Raises ForgeError."""
    for item in items:
        if "=" not in item:
            raise ForgeError(f"{item}: want NAME=VALUE")
    return dict(item.split("=", 1) for item in items)


def searched_skill(c: Campaign, name: str) -> str:
    """The name of a skill that takes part in the search. Raises ForgeError."""
    active = [s for s in c.space.skills if s not in c.state.retired]
    if name not in active:
        raise ForgeError(f"skill {name}: want one of {', '.join(active)}")
    return name

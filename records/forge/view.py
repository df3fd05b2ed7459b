"""What judges, reporters and agents may know of a campaign: a read-only view of plain values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .space import CODE, Space
from .state import Run, State


@dataclass(frozen=True)
class View:
    """A campaign at one moment. `state` is the replay of its ledger; nobody but the campaign
    appends to that."""

    name: str
    folder: Path
    config: dict[str, Any]
    state: State
    space: Space

    @property
    def rung(self) -> str:
        """The rung of the search."""
        return self.config["search"]["rung"]

    def script(self, change: dict | None = None) -> Path:
        """The code that a change runs on, by content."""
        code = (change or {}).get(CODE) or self.config["code"]
        return self.folder / "code" / code / "train_gpt.py"

    def running(self) -> list[Run]:
        """Runs under way."""
        return [r for r in self.state.runs.values() if r.started and not r.finished]

    def spent(self) -> dict[str, float]:
        """What was used so far."""
        state = self.state
        return dict(
            minutes=state.minutes(),
            runs=sum(r.started for r in state.runs.values()),
            running=len(self.running()),
            experiments=len(state.searches()),
            agent_calls=len(state.agent_calls),
            agent_dollars=sum(c.get("dollars", 0.0) for c in state.agent_calls),
        )

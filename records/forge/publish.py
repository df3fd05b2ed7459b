"""Files that a campaign writes for people and agents: the report, a table of runs, a heartbeat, and
the skills' evidence and playbooks. All of it is rendered from the state and can be thrown away.
"""

import json
import time

from . import report
from .ledger import now, write_atomic
from .standing import everything, label
from .view import View

HEAD = ("key", "exp", "rung", "seed", "status", "val_bpb", "seconds", "change")
YOUNG = 60.0  # seconds; a younger report is left as it is while the loop runs


def publish(view: View, quick: bool = False):
    """Write heartbeat, results.tsv, skills and report; `quick` leaves a young report as it is."""
    state = view.state
    running = [dict(key=r.key, rung=r.rung, slots=r.slots) for r in view.running()]
    beat = dict(time=now(), events=state.events, running=running, stopped=state.stopped)
    write_atomic(view.folder / "heartbeat.json", json.dumps(view.spent() | beat))
    lines = ["\t".join(HEAD)]
    for r in state.runs.values():
        if r.finished:
            row = (r.key, r.exp, r.rung, r.seed, r.record["status"], r.score)
            row += (r.record["wall_s"], label(r.change))
            lines.append("\t".join(map(str, row)))
    write_atomic(view.folder / "results.tsv", "\n".join(lines) + "\n")
    write_skills(view)
    target = view.folder / "report.html"
    young = target.exists() and time.time() - target.stat().st_mtime < YOUNG
    if state.reference and not (quick and young):
        write_atomic(target, report.page(everything(view)))


def write_skills(view: View):
    """Evidence and playbook of every skill that has some, from the state alone; meta/<index>.json
    for each pass of the review."""
    state = view.state
    by_skill: dict[str, list] = {}
    for evidence in state.evidence.values():
        for e in evidence:
            by_skill.setdefault(e["skill"], []).append(e)
    for skill, evidence in by_skill.items():
        folder = view.folder / "skills" / skill
        if folder.is_dir():
            write_atomic(folder / "assets" / "evidence.json", json.dumps(evidence, indent=1))
    for skill, versions in state.playbooks.items():
        write_playbook(view, skill, versions)
    folder = view.folder / "meta"
    for m in state.metas:
        path = folder / f"{m['index']:04d}.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(m, indent=1))


def write_playbook(view: View, skill: str, versions: list[dict]):
    """The version in force, and the older ones beside it."""
    folder = view.folder / "skills" / skill / "references"
    folder.mkdir(parents=True, exist_ok=True)
    v = versions[-1]
    ranges = "\n".join(f"- search {n} in {a} to {b}" for n, (a, b) in v["ranges"].items())
    title = f"# Playbook of {skill}, version {v['version']} ({v['reason']})"
    write_atomic(folder / "playbook.md", f"{title}\n\n{v['text']}\n\n{ranges}\n")
    history = view.folder / "skills_history"
    for old in versions[:-1]:
        history.mkdir(exist_ok=True)
        path = history / f"{skill}-{old['version']}.json"
        if not path.exists():
            write_atomic(path, json.dumps(old, indent=1))

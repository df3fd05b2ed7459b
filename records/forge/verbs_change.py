"""Verbs that steer a campaign: ask, test, repeat, and change what it may try."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import ForgeError, agent, runner, skill_files
from . import export as record_folder
from . import harvest as records
from .campaign_folder import load_skills
from .ledger import digest, file_digest, write_atomic
from .publish import publish
from .verbs import campaign, deciding, pairs, say, searched_skill

ROOT = Path(__file__).resolve().parents[2]


def submit(asked):
    """Hand in a hypothesis of a person or an agent: it is the next experiment."""
    c = campaign(asked.name)
    try:
        text = sys.stdin.read() if asked.file == "-" else Path(asked.file).read_text("utf-8")
    except OSError as error:
        raise ForgeError(f"{asked.file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ForgeError(f"{asked.file}: not UTF-8") from None
    hypothesis = agent.read_hypothesis(text)
    agent.check(hypothesis, c.view)
    box = c.folder / "inbox"
    box.mkdir(exist_ok=True)
    write_atomic(box / f"{digest(text, 12)}.json", json.dumps(hypothesis, indent=1))
    print(f"accepted; it will be tried next ({len(list(box.glob('*.json')))} waiting)")


def compose(asked):
    """Which of several changes help together? Twelve runs on fresh seeds, by Plackett-Burman."""
    with deciding(asked.name) as c:
        print(c.compose([pairs(text.split(",")) for text in asked.changes]) + " is the next to run")


def confirm(asked):
    """Put the anchor to the test on paired and then on fresh seeds, whatever the search thinks of
    it."""
    with deciding(asked.name) as c:
        if not c.open_confirm(asked_for=True):
            raise ForgeError(
                "nothing to confirm: the anchor is the champion, or no budget is left for six runs"
            )
        print(f"{list(c.state.experiments)[-1]} is the next to run")


def sentinel(asked):
    """Measure the base configuration and its noise on a rung."""
    with deciding(asked.name) as c:
        print(c.open_sentinel(asked.rung) + " is the next to run")


def promote(asked):
    """Run an experiment's configuration on another rung as well."""
    with deciding(asked.name) as c:
        print(c.promote(asked.id, asked.to) + " is the next to run")


def retry(asked):
    """Forget a failed run, so that it is run again: for failures of the machine, not of the
    configuration."""
    with deciding(asked.name) as c:
        run = c.state.runs.get(asked.id)
        if run is None or not run.finished or run.score is not None:
            raise ForgeError(f"{asked.id}: want the key of a finished run that has no score")
        place = c.folder / "runs" / run.key
        if place.exists():
            place.rename(place.with_name(f"{run.key}.forgotten-{c.state.events}"))
        c.record("forgotten", key=run.key)
    print(f"{asked.id} will be run again by `run {asked.name}`")


def replay(asked):
    """Run a record once more, same environment, code and seed, in a folder of its own and on the
    first devices that are free."""
    c = campaign(asked.name)
    if asked.id not in c.state.runs:
        raise ForgeError(f"{asked.id}: no such run; keys are listed in results.tsv")
    run = c.state.runs[asked.id]
    order = c.order(asked.id) | dict(devices=None)
    if not file_digest(Path(order["script"])).startswith(order["code"]):
        raise ForgeError(
            f"code {order['code']} was changed since; a replay would be another experiment"
        )
    folder = c.folder / "scratch" / f"replay-{asked.id}-{digest(os.urandom(8).hex(), 6)}"
    folder.mkdir(parents=True)
    write_atomic(folder / "run.json", json.dumps(order))
    record = runner.supervise(folder)
    now, then = record["metrics"].get("val_bpb"), run.record and run.record["bpb"]
    data = dict(then=then, now=now, status=record["status"], equal=now == then)
    say(asked, data, f"then {then}, now {now} ({record['status']})")


def rebuild(asked):
    """Write everything but the events anew from the events: report, table, playbooks, evidence,
    meta files."""
    patterns = ("meta/*.json", "skills/*/references/playbook.md", "skills/*/assets/evidence.json")
    patterns += ("skills_history/*.json", "report.html", "results.tsv", "study.journal")
    with deciding(asked.name) as c:
        for path in [p for pattern in patterns for p in c.folder.glob(pattern)]:
            path.unlink(missing_ok=True)
        shutil.rmtree(c.folder / "scratch", ignore_errors=True)
        publish(c.view)
        print(f"{c.state.events} events rendered; state {c.state.digest()}")


def skills(asked):
    """List, check, add, retire and restore skills: those that ship or, with --of, those of a
    campaign."""
    if asked.action in ("retire", "restore"):
        change_skill(asked)
        return
    c = campaign(asked.of) if asked.of else None
    folder = c.folder / "skills" if c else Path(asked.skills)
    script = c.script() if c else Path(asked.script)
    base = c.config["base"] if c else {}
    if asked.action == "new":
        new_skill(asked, folder, script, base)
    if problems := skill_files.check_all(folder, script, base):
        raise ForgeError("\n".join(problems))
    table = {name: sorted(knobs) for name, knobs in load_skills(folder).items()}
    retired = sorted(c.state.retired) if c else []
    prior = c.state.prior if c else {}
    lines = []
    for name, knobs in table.items():
        line = f"{name:<22} {', '.join(knobs) or 'notes only'}"
        line += " (retired)" if name in retired else ""
        line += "  harvest {:g}:{:g}".format(*prior[name]) if name in prior else ""
        lines.append(line)
    shown = [] if asked.action == "validate" else lines
    text = "\n".join([*shown, f"{len(table)} skills are valid"])
    say(asked, dict(skills=table, retired=retired, prior=prior), text)


def new_skill(asked, folder: Path, script: Path, base: dict):
    """Add a skill, while nobody decides for the campaign that it is for."""
    knobs = dict(map(skill_files.knob_of, asked.knob))
    if not (asked.skill and asked.about):
        raise ForgeError('skills new: want a name and --about "what it does and when to use it"')
    with deciding(asked.of) if asked.of else contextlib.nullcontext() as held:
        skill_files.create(folder, asked.skill, asked.about, knobs, script, base)
        if held:
            held.record("skill", action="new", skill=asked.skill, knobs=knobs)


def change_skill(asked):
    """Take a skill out of a campaign's search, or back into it; what its knobs gained so far
    stays."""
    if not asked.of:
        text = "want --of CAMPAIGN; a new campaign leaves a skill out by --without"
        raise ForgeError(f"skills {asked.action}: {text}")
    with deciding(asked.of) as c:
        retire = asked.action == "retire"
        if retire:
            searched_skill(c, asked.skill)
            if len(c.state.retired) + 1 == len(c.space.skills):
                raise ForgeError(f"skill {asked.skill} is the last one of the search")
        elif asked.skill not in c.state.retired:
            names = ", ".join(sorted(c.state.retired)) or "there is none"
            raise ForgeError(f"skill {asked.skill}: want one of the retired: {names}")
        c.record("skill", action=asked.action, skill=asked.skill)
        print(f"{asked.skill} is {'out of' if retire else 'back in'} the search")


def harvest(asked):
    """Read a records tree into High, Medium and Low; --into a campaign, whose search then begins
    with what they say."""
    if not Path(asked.folder).is_dir():
        raise ForgeError(f"{asked.folder}: no such folder")
    found = records.harvest(Path(asked.folder), ROOT / "train_gpt.py")
    text = records.text(found)
    if asked.into:
        with deciding(asked.into) as c:
            owners = {n: k.skill for n, k in c.space.knobs.items()}
            prior = found["prior"] = records.prior(found, owners)
            if not prior:
                nothing = f"no record there changed a knob of {asked.into}'s skills"
                raise ForgeError(f"{asked.folder}: {nothing}")
            folder = Path(asked.folder).name
            count = len(found["records"])
            c.record("harvested", folder=folder, records=count, prior=prior)
        for skill, (good, bad) in sorted(prior.items()):
            text += f"\n{skill}: {good:g} for, {bad:g} against"
    say(asked, found, text)


def export(asked):
    """A submission folder of the champion."""
    out = Path(asked.out) if asked.out else None
    view = campaign(asked.name).view
    print(record_folder.export(view, asked.track, asked.title, asked.author, out))


def bench(asked):
    """The acceptance tests of the forge."""
    tests = sorted(map(str, (ROOT / "tests").glob("test_forge*.py")))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT)
    raise SystemExit(done.returncode)

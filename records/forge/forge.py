#!/usr/bin/env python3
"""The Forge: proposes, runs, judges and learns, unattended, with error rates.

    python records/forge/forge.py start NAME --preset baseline+cpu --experiments 40    one command for a whole campaign
    python records/forge/forge.py status NAME                                          where it stands
    python records/forge/forge.py --help                                               every verb

A campaign is a folder under records/campaigns/ (or a path). Stop it at any time and any way; `run NAME` goes on.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # so that `forge` is this package and not this file
from forge import ForgeError  # noqa: E402
from forge.ledger import file_digest, write_atomic  # noqa: E402

ROOT = HERE.parents[1]
# What a rung is called with, per device; times are limits, not wishes. Compiling takes longer than a short run on a
# CPU, chunks are the cheapest score, and a line per step is what forecasts read.
SHORT = dict(COMPILE="off", EVAL="chunked", TRAIN_LOG_EVERY="1")
LADDERS = {
    "cpu": {
        "smoke": dict(kill_s=180.0, env=SHORT | dict(ITERATIONS="20", MAX_WALLCLOCK_SECONDS="0")),
        "screen": dict(kill_s=600.0, env=SHORT | dict(MAX_WALLCLOCK_SECONDS="30")),
        "local": dict(kill_s=1200.0, env=SHORT | dict(MAX_WALLCLOCK_SECONDS="120")),
    },
    "cuda": {
        "smoke": dict(kill_s=600.0, env=dict(ITERATIONS="20", MAX_WALLCLOCK_SECONDS="0")),
        "screen": dict(kill_s=900.0, env=dict(MAX_WALLCLOCK_SECONDS="60")),
        "local": dict(kill_s=1800.0, env=dict(MAX_WALLCLOCK_SECONDS="300")),
        "target": dict(
            kill_s=2400.0, env=dict(MAX_WALLCLOCK_SECONDS="600"), nproc=8, prior_sigma=0.0007
        ),
    },
}


def place(name: str) -> Path:
    """The folder that a campaign's name or path means."""
    return Path(name) if os.sep in name or Path(name).is_dir() else HERE.parent / "campaigns" / name


def campaign(name: str):
    """The campaign of a name."""
    from forge.campaign import Campaign

    folder = place(name)
    if not (folder / "events.jsonl").exists():
        raise ForgeError(f"{name}: no campaign there; begin one with `start {name} --preset ...`")
    return Campaign(folder)


def say(asked, data: dict, text: str):
    """Print JSON or words."""
    print(json.dumps(data, indent=1) if asked.json else text)


# ---- Beginning and running -------------------------------------------------------------------------------------------
def pairs(items: list[str]) -> dict[str, str]:
    """NAME=VALUE arguments."""
    for item in items:
        if "=" not in item:
            raise ForgeError(f"{item}: want NAME=VALUE")
    return dict(item.split("=", 1) for item in items)


def value_of(text: str) -> Any:
    """A number, truth value or list where the text is one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def init(asked):
    """Create a campaign."""
    from forge import campaign as c

    device = (
        "cuda"
        if "cpu" not in asked.preset.split("+") and "tiny" not in asked.preset.split("+")
        else "cpu"
    )
    base = dict(PRESET=asked.preset, CHECKPOINT_EVERY="0", STRICT_ENV="0") | pairs(asked.knob)
    rungs = {name: dict(rung) for name, rung in LADDERS[device].items()}
    for name, rung in rungs.items():
        if name != "target" and asked.gpus_per_run > 1:
            rung["nproc"] = asked.gpus_per_run
    for item, value in pairs(asked.rung).items():  # screen.ITERATIONS=200, screen.kill_s=60
        name, _, key = item.partition(".")
        if name not in rungs or not key:
            raise ForgeError(
                f"--rung {item}: want RUNG.NAME=VALUE with a rung of {', '.join(rungs)}"
            )
        if key.isupper():
            rungs[name]["env"] = rungs[name]["env"] | {key: value}
        else:
            rungs[name][key] = value_of(value)
    config = dict(
        seed=asked.seed,
        base=base,
        rungs=rungs,
        search=dict(rung=asked.on, promote_to=asked.promote_to),
        loop=dict(workers=asked.workers),
        budget=dict(
            experiments=asked.experiments,
            minutes=asked.minutes,
            runs=asked.runs,
            deadline=asked.deadline,
        ),
        agent=dict(cmd=asked.agent),
    )
    for item, value in pairs(asked.set).items():  # loop.confirm=end, search.max_flops=1.1
        table, _, key = item.partition(".")
        if table not in c.DEFAULTS or not key:
            raise ForgeError(
                f"--set {item}: want TABLE.KEY=VALUE with a table of {', '.join(c.DEFAULTS)}"
            )
        config.setdefault(table, {})[key] = value_of(value)
    folder = place(asked.name)
    c.create(folder, Path(asked.script), Path(asked.skills), config, asked.without)
    print(
        f"campaign {folder.name} begun; limits and rungs are in campaign.toml, which you may edit at any time"
    )


def publish(c):
    """Write what people read: report, table, heartbeat, skills."""
    from forge import report

    report.publish(c)


def run(asked):
    """Ticks until the campaign's budgets are used."""
    c = campaign(asked.name)
    if c.state.stopped and (reason := c.state.stopped):
        c.record("resumed", after=reason)
    told = c.state.events

    def progress():
        nonlocal told
        from forge import report

        report.publish(c, quick=True)
        for line in report.news(c, told):
            print(line, flush=True)
        told = c.state.events

    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        c.loop(asked.hours * 3600, progress)
    except KeyboardInterrupt:
        c.runs.stop([r.key for r in c.running()])
        print(
            f"interrupted; go on with: python records/forge/forge.py run {asked.name}",
            file=sys.stderr,
        )
        raise
    finally:
        publish(c)
    print(f"stopped: {c.state.stopped or 'time is over'}   report: {c.folder.name}/report.html")


def start(asked):
    """Create a campaign unless it exists, and run it."""
    if not (place(asked.name) / "events.jsonl").exists():
        init(asked)
    else:
        print(
            f"campaign {asked.name} exists and goes on; what is given here is not read, see its campaign.toml"
        )
    run(asked)


def tick(asked):
    """One idempotent step, for cron."""
    c = campaign(asked.name)
    c.patient = True  # nobody would be there to hear a later answer
    moved = c.tick()
    publish(c)
    say(
        asked,
        dict(moved=moved, stopped=c.state.stopped),
        f"{'moved' if moved else 'waiting'}"
        + (f"; stopped: {c.state.stopped}" if c.state.stopped else ""),
    )


def supervise(asked):
    """Internal: bring one run folder to its end."""
    from forge import runner

    try:
        runner.supervise(Path(asked.folder))
    except runner.Stopped:
        print("stopped", file=sys.stderr)


# ---- Looking ---------------------------------------------------------------------------------------------------------
def status(asked):
    """Where a campaign stands."""
    from forge import report

    c = campaign(asked.name)
    data = report.summary(c)
    say(asked, data, report.summary_text(data))


def show(asked):
    """One experiment or run in full."""
    c = campaign(asked.name)
    if asked.id in c.state.experiments:
        x = c.state.experiments[asked.id]
        runs = [
            dict(key=r.key, rung=r.rung, seed=r.seed, record=r.record)
            for r in c.state.runs.values()
            if r.exp == x.id
        ]
        print(json.dumps(dict(vars(x), runs=runs), indent=1))
    elif asked.id in c.state.runs:
        path = c.folder / "runs" / asked.id / "metrics.json"
        print(
            path.read_text()
            if path.exists()
            else json.dumps(vars(c.state.runs[asked.id]), indent=1)
        )
    else:
        raise ForgeError(
            f"{asked.id}: neither an experiment (e000001) nor the key of a run of {asked.name}"
        )


def diff(asked):
    """Knobs in which two experiments, or anchor, champion and base, differ."""
    c = campaign(asked.name)
    named = dict(base={}, anchor=c.state.anchor, champion=c.state.champion) | {
        x.id: x.change for x in c.state.experiments.values()
    }
    for name in (asked.a, asked.b):
        if name not in named:
            raise ForgeError(
                f"{name}: want base, anchor, champion or an experiment such as e000004"
            )
    a, b = (c.space.values(named[n]) for n in (asked.a, asked.b))
    found = {n: [a[n], b[n]] for n in a if a[n] != b[n]}
    say(
        asked,
        found,
        "\n".join(f"{n}: {x} -> {y}" for n, (x, y) in found.items()) or "no difference",
    )


def knobs(asked):
    """The search space: knob, range, class, skill; and which knobs of the script no skill owns."""
    from forge import space
    from forge.campaign import load_skills

    described = space.describe(Path(asked.script), dict(PRESET=asked.preset))
    s = space.Space.build(described, load_skills(Path(asked.skills)), dict(PRESET=asked.preset))
    unowned = sorted(set(described["knobs"]) - set(s.knobs))
    data = dict(knobs={n: vars(k) for n, k in s.knobs.items()}, unowned=unowned)
    lines = [
        f"{k.skill:<14} {n:<28} {k.klass:<12} "
        + (
            ", ".join(k.choices)
            if k.kind == "choice"
            else f"{k.low:g} to {k.high:g}" + " (part of all steps)" * k.of_steps + " log" * k.log
        )
        + f"   base {k.base}"
        for n, k in sorted(s.knobs.items(), key=lambda i: (i[1].skill, i[0]))
    ]
    say(
        asked,
        data,
        "\n".join([*lines, "", f"{len(unowned)} knobs that no skill owns: " + ", ".join(unowned)]),
    )


def searched_skill(c, name: str) -> str:
    """The name of a skill that takes part in the search. Raises ForgeError."""
    active = [s for s in c.space.skills if s not in c.state.retired]
    if name not in active:
        raise ForgeError(f"skill {name}: want one of {', '.join(active)}")
    return name


def ask_agent(asked):
    """The agent's next proposal through all gates; its calls count."""
    from forge import agent
    from forge import sampler as p

    with deciding(asked.name) as c:
        c.sync_config()
        if not c.config["agent"]["cmd"]:
            raise ForgeError(
                f"{asked.name}: no agent; name a command in campaign.toml, [agent] cmd"
            )
        if not agent.affordable(c):
            raise ForgeError(
                "the budget for the agent is used: [budget] agent_calls and agent_dollars"
            )
        before, rng = (
            len(c.state.agent_calls),
            p.generator(c.state, "agent", len(c.state.agent_calls)),
        )
        skill = (
            searched_skill(c, asked.skill)
            if asked.skill
            else p.choose_skill(c.state, c.space.skills, rng)
        )
        found, calls = agent.consult(c, skill), c.state.agent_calls[before:]
        made = (
            [
                found
                | dict(
                    env=c.space.resolve(found["change"], c.rung(c.config["search"]["rung"])),
                    refused=c.refusal(found["change"]),
                )
            ]
            if found
            else []
        )
        lines = [
            f"answer {call['attempt']} was refused: {call['reason']}"
            for call in calls
            if not call["ok"]
        ]
        lines += [
            f"{f['skill']}: {f['change']}  {f['text']}"
            + f"\nrefused: {f['refused']}" * bool(f["refused"])
            for f in made
        ]
        lines += [f"{len(calls)} calls, {c.spent()['agent_calls']} in all"]
        say(asked, dict(proposals=made, calls=calls), "\n".join(lines))


def propose(asked):
    """Show proposals without running them. One of the agent costs what a call costs, and may follow an open breaker."""
    from forge import sampler as p

    if asked.agent:
        return ask_agent(asked)
    c, found = campaign(asked.name), []
    if asked.skill:
        searched_skill(c, asked.skill)
    for i in range(asked.n):
        made = p.propose(c.state, c.space, asked.skill)
        if made is None:
            break
        env = c.space.resolve(made[1], c.rung(c.config["search"]["rung"]))
        found.append(dict(skill=made[0], change=made[1], env=env))
        c.state.refused.append(
            dict(change=made[1], at=-1, oversize=False)
        )  # in memory only: the next draw differs
    say(asked, dict(proposals=found), "\n".join(f"{f['skill']}: {f['change']}" for f in found))


def submit(asked):
    """Hand in a hypothesis of a person or an agent: it is the next experiment."""
    from forge import agent

    c = campaign(asked.name)
    try:
        text = sys.stdin.read() if asked.file == "-" else Path(asked.file).read_text()
    except OSError as error:
        raise ForgeError(f"{asked.file}: {error.strerror}") from None
    hypothesis = agent.read_hypothesis(text)
    agent.check(hypothesis, c)
    box = c.folder / "inbox"
    box.mkdir(exist_ok=True)
    write_atomic(box / f"{file_digest_of(text)}.json", json.dumps(hypothesis, indent=1))
    print(f"accepted; it will be tried next ({len(list(box.glob('*.json')))} waiting)")


def file_digest_of(text: str) -> str:
    """A short name for a text."""
    from forge.ledger import digest

    return digest(text, 12)


def inbox(asked):
    """Hypotheses that were handed in and wait for their turn, and those that were set aside."""
    box = campaign(asked.name).folder / "inbox"
    found = {
        kind: [
            json.loads(p.read_text()) | dict(file=p.name) for p in sorted((box / at).glob("*.json"))
        ]
        for kind, at in (("waiting", "."), ("taken", "done"))
    }
    say(
        asked,
        found,
        "\n".join(
            f"{kind:<8} {h['file']}  {json.dumps(h.get('env', {}))}  {h.get('hypothesis', '')[:80]}"
            for kind, rows in found.items()
            for h in rows
        )
        or "empty",
    )


@contextlib.contextmanager
def deciding(name: str):
    """The campaign, while no other process decides for it."""
    from forge.ledger import locked

    with locked(campaign(name).folder / "tick.lock", busy=f"{name}: another decider is at work"):
        yield campaign(name)


def compose(asked):
    """Which of several changes help together? Twelve runs on fresh seeds, by Plackett-Burman."""
    with deciding(asked.name) as c:
        print(c.compose([pairs(text.split(",")) for text in asked.changes]) + " is the next to run")


def confirm(asked):
    """Put the anchor to the test on paired and then on fresh seeds, whatever the search thinks of it."""
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


def project(asked):
    """Forecast of a run's learning curve."""
    from forge import forecasts

    c = campaign(asked.name)
    path = c.folder / "runs" / asked.id / "metrics.json"
    if not path.exists():
        raise ForgeError(f"{asked.id}: no finished run of that key")
    curve = json.loads(path.read_text())["curve"]
    try:
        data = forecasts.project(curve, asked.tokens or 2 * curve[-1][0])
    except (ValueError, IndexError) as error:
        raise ForgeError(f"{asked.id}: {error}") from None
    say(
        asked,
        data,
        "\n".join(
            f"at {t:.4g} tokens: {m:.4f} [{a:.4f}, {b:.4f}] (90 %)"
            for t, a, m, b in zip(data["tokens"], data["low"], data["middle"], data["high"])
        ),
    )


def transfer(asked):
    """Whether the order of configurations holds from rung to rung, per knob class."""
    from forge import forecasts

    c = campaign(asked.name)
    rows = forecasts.report(c.state, c.space)
    text = [
        f"{r['lower']} -> {r['upper']}  {r['klass']:<12} n={r['n']:<3} {r['word']:<18} "
        + (
            f"tau {r['tau']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            if "tau" in r
            else f"(prior: {r['prior']})"
        )
        for r in rows
    ]
    say(asked, dict(rows=rows), "\n".join(text) or "no configuration has run on two rungs yet")


def rebuild(asked):
    """Write everything but the events anew from the events: report, table, playbooks, evidence, meta files."""
    import shutil

    with deciding(asked.name) as c:
        for path in [
            *c.folder.glob("meta/*.json"),
            *c.folder.glob("skills/*/references/playbook.md"),
            *c.folder.glob("skills/*/assets/evidence.json"),
            *c.folder.glob("skills_history/*.json"),
            c.folder / "report.html",
            c.folder / "results.tsv",
            c.folder / "study.journal",
        ]:
            path.unlink(missing_ok=True)
        shutil.rmtree(c.folder / "scratch", ignore_errors=True)
        publish(c)
        print(f"{c.state.events} events rendered; state {c.state.digest()}")


def verify(asked):
    """Check every event, hash and run folder."""
    c, wrong = campaign(asked.name), []
    for run in c.state.runs.values():
        folder = c.folder / "runs" / run.key
        if run.finished and (folder / "metrics.json").exists():
            record = json.loads((folder / "metrics.json").read_text())
            out = folder / f"a{record['attempt']}.out"
            if out.exists() and file_digest(out) != record["log_sha256"]:
                wrong.append(f"run {run.key}: its log was changed after the run")
            bpb = record["metrics"].get("val_bpb")
            if run.score is not None and bpb != run.record["bpb"]:
                wrong.append(
                    f"run {run.key}: the ledger says {run.record['bpb']}, the folder {bpb}"
                )
    for script in (c.folder / "code").glob("*/train_gpt.py"):
        if not file_digest(script).startswith(script.parent.name):
            wrong.append(f"code {script.parent.name}: was changed")
    if wrong:
        raise ForgeError("\n".join(wrong))
    print(
        f"{c.state.events} events, {len(c.state.runs)} runs: every checksum holds; state {c.state.digest()}"
    )


def replay(asked):
    """Run a record once more, same environment, code and seed, in a folder of its own."""
    from forge import runner
    from forge.ledger import digest

    c = campaign(asked.name)
    if asked.id not in c.state.runs:
        raise ForgeError(f"{asked.id}: no such run; keys are listed in results.tsv")
    run, order = c.state.runs[asked.id], c.order(asked.id)
    if not file_digest(Path(order["script"])).startswith(order["code"]):
        raise ForgeError(
            f"code {order['code']} was changed since; a replay would be another experiment"
        )
    folder = c.folder / "scratch" / f"replay-{asked.id}-{digest(os.urandom(8).hex(), 6)}"
    folder.mkdir(parents=True)
    write_atomic(folder / "run.json", json.dumps(order))
    record = runner.supervise(folder)
    now, then = record["metrics"].get("val_bpb"), run.record and run.record["bpb"]
    say(
        asked,
        dict(then=then, now=now, status=record["status"], equal=now == then),
        f"then {then}, now {now} ({record['status']})",
    )


def retry(asked):
    """Forget a failed run, so that it is run again: for failures of the machine, not of the configuration."""
    with deciding(asked.name) as c:
        run = c.state.runs.get(asked.id)
        if run is None or not run.finished or run.score is not None:
            raise ForgeError(f"{asked.id}: want the key of a finished run that has no score")
        place = c.folder / "runs" / run.key
        if place.exists():
            place.rename(place.with_name(f"{run.key}.forgotten-{c.state.events}"))
        c.record("forgotten", key=run.key)
    print(f"{asked.id} will be run again by `run {asked.name}`")


def meta(asked):
    """The meta-layer's findings as of now, without recording them."""
    from forge import skill_review as m
    from forge import report

    c = campaign(asked.name)
    data = m.summarise(c.state, c.space, len(c.state.metas) + 1)
    say(asked, data, report.skill_text(data["skills"], report.marks(c.state)))


def playbook(asked):
    """Claims and what became of them."""
    from forge import skill_review as m

    c = campaign(asked.name)
    standing = m.claims(c.state)
    say(
        asked,
        dict(claims=standing),
        "\n".join(map(m.line_of, standing)) or "no claims yet: a confirmed change makes one",
    )


def skills(asked):
    """List, check, add, retire and restore skills: those that ship or, with --of, those of a campaign."""
    from forge import skill_files
    from forge.campaign import load_skills

    if asked.action in ("retire", "restore"):
        return change_skill(asked)
    c = campaign(asked.of) if asked.of else None
    folder, script = (
        (c.folder / "skills", c.script()) if c else (Path(asked.skills), Path(asked.script))
    )
    base = c.config["base"] if c else {}
    if asked.action == "new":
        knobs = dict(map(skill_files.knob_of, asked.knob))
        if not (asked.skill and asked.about):
            raise ForgeError(
                'skills new: want a name and --about "what it does and when to use it"'
            )
        with deciding(asked.of) if c else contextlib.nullcontext() as held:
            skill_files.create(folder, asked.skill, asked.about, knobs, script, base)
            if held:
                held.record("skill", action="new", skill=asked.skill, knobs=knobs)
    if problems := skill_files.check_all(folder, script, base):
        raise ForgeError("\n".join(problems))
    table = {name: sorted(knobs) for name, knobs in load_skills(folder).items()}
    retired, prior = (sorted(c.state.retired), c.state.prior) if c else ([], {})
    lines = [
        f"{name:<22} {', '.join(knobs) or 'notes only'}"
        + " (retired)" * (name in retired)
        + ("  harvest {:g}:{:g}".format(*prior[name]) if name in prior else "")
        for name, knobs in table.items()
    ]
    say(
        asked,
        dict(skills=table, retired=retired, prior=prior),
        "\n".join([*lines * (asked.action != "validate"), f"{len(table)} skills are valid"]),
    )


def change_skill(asked):
    """Take a skill out of a campaign's search, or back into it; what its knobs gained so far stays."""
    if not asked.of:
        raise ForgeError(
            f"skills {asked.action}: want --of CAMPAIGN; a new campaign leaves a skill out by --without"
        )
    with deciding(asked.of) as c:
        if asked.action == "retire":
            searched_skill(c, asked.skill)
            if len(c.state.retired) + 1 == len(c.space.skills):
                raise ForgeError(f"skill {asked.skill} is the last one of the search")
        elif asked.skill not in c.state.retired:
            raise ForgeError(
                f"skill {asked.skill}: want one of the retired: "
                + (", ".join(sorted(c.state.retired)) or "there is none")
            )
        c.record("skill", action=asked.action, skill=asked.skill)
        print(f"{asked.skill} is {'out of' if asked.action == 'retire' else 'back in'} the search")


def harvest(asked):
    """Read a records tree into High, Medium and Low; --into a campaign, whose search then begins with what they say."""
    from forge import harvest as h

    if not Path(asked.folder).is_dir():
        raise ForgeError(f"{asked.folder}: no such folder")
    found = h.harvest(Path(asked.folder))
    text = h.text(found)
    if asked.into:
        with deciding(asked.into) as c:
            found["prior"] = h.prior(found, {n: k.skill for n, k in c.space.knobs.items()})
            if not found["prior"]:
                raise ForgeError(
                    f"{asked.folder}: no record there changed a knob of {asked.into}'s skills"
                )
            c.record(
                "harvested",
                folder=Path(asked.folder).name,
                records=len(found["records"]),
                prior=found["prior"],
            )
        text += "".join(
            f"\n{s}: {a:g} for, {b:g} against" for s, (a, b) in sorted(found["prior"].items())
        )
    say(asked, found, text)


def export(asked):
    """A submission folder of the champion."""
    from forge import export as e

    out = Path(asked.out) if asked.out else None
    print(e.export(campaign(asked.name), asked.track, asked.title, asked.author, out))


def report_(asked):
    """Write report.html now."""
    c = campaign(asked.name)
    publish(c)
    print(f"{c.folder.name}/report.html")


def doctor(asked):
    """What this machine offers, and whether the script speaks the forge's language."""
    from forge import patches

    data = patches.doctor(Path(asked.script))
    say(asked, data, "\n".join(f"{k:<12} {v}" for k, v in data.items()))


def serve(asked):
    """Open the queue for workers of other machines, and run the campaign on them."""
    from forge import remote

    remote.serve(campaign(asked.name), asked.port, asked.hours, publish)


def worker(asked):
    """Pull runs from a head's queue until it is empty or closed."""
    from forge import remote

    if asked.slurm:
        return remote.start_on_slurm(asked.connect, asked.slurm, asked.count)
    remote.work(asked.connect, Path(asked.scratch), asked.idle)


def bench(asked):
    """The acceptance tests of the forge."""
    import subprocess

    raise SystemExit(
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                *sorted(map(str, (ROOT / "tests").glob("test_forge*.py"))),
            ],
            cwd=ROOT,
        ).returncode
    )


def describe_campaign(made: argparse.ArgumentParser):
    """The arguments that a new campaign takes."""
    made.add_argument(
        "--preset",
        default="baseline+cpu",
        help="where the search begins, as PRESET of train_gpt.py",
    )
    made.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE", help="fixed for every run"
    )
    made.add_argument(
        "--rung",
        action="append",
        default=[],
        metavar="RUNG.NAME=VALUE",
        help="of a rung: a knob in capitals, or tokens, kill_s, stall_s, sentinel_runs, nproc",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="anything else of campaign.toml, such as loop.confirm=end or search.max_flops=1.1",
    )
    made.add_argument(
        "--without", action="append", default=[], metavar="SKILL", help="leave a skill out"
    )
    made.add_argument("--on", default="screen", help="rung of the search")
    made.add_argument(
        "--promote-to", default="", help="rung that the best third is measured on as well"
    )
    made.add_argument("--experiments", type=int, default=40)
    made.add_argument("--minutes", type=float, default=0.0, help="device minutes, 0 = no limit")
    made.add_argument("--runs", type=int, default=0, help="processes, 0 = no limit")
    made.add_argument("--deadline", default="", help="UTC time such as 2026-12-01T08:00:00Z")
    made.add_argument("--workers", type=int, default=1, help="runs at the same time")
    made.add_argument("--gpus-per-run", type=int, default=1)
    made.add_argument("--seed", type=int, default=1, help="of the proposals")
    made.add_argument(
        "--agent", default="", help="command that reads a prompt and answers with JSON"
    )


def parser() -> argparse.ArgumentParser:
    """Every verb and its arguments."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function, name="", of_campaign=True, hidden=False):
        made = verbs.add_parser(
            name or function.__name__,
            description=function.__doc__,
            **{} if hidden else dict(help=function.__doc__),
        )
        made.set_defaults(call=function)
        made.add_argument("--json", action="store_true", help="answer with JSON")
        if of_campaign:
            made.add_argument("name", help="campaign: a name under records/campaigns/, or a folder")
        return made

    def scripted(made):
        made.add_argument("--script", default=str(ROOT / "train_gpt.py"))
        made.add_argument("--skills", default=str(HERE / "skills"))

    for function in (init, start):
        made = verb(function)
        scripted(made)
        describe_campaign(made)
    for made in (verb(run), verbs.choices["start"]):
        made.add_argument(
            "--hours",
            type=float,
            default=0.0,
            help="stop after this long, 0 = when the budget is used",
        )
    for function in (tick, status, transfer, verify, meta, playbook, inbox, confirm, rebuild):
        verb(function)
    verb(sentinel).add_argument("--rung", default="screen")
    verb(report_, "report")
    for function in (show, project, replay, retry, promote):
        verb(function).add_argument("id")
    verbs.choices["promote"].add_argument("--to", required=True, metavar="RUNG")
    verbs.choices["project"].add_argument("--tokens", type=float, nargs="*", default=[])
    verb(compose).add_argument("changes", nargs="+", metavar="KNOB=VALUE[,KNOB=VALUE]")
    for side in ("a", "b"):
        (verbs.choices.get("diff") or verb(diff)).add_argument(side)
    made = verb(propose)
    made.add_argument("--n", type=int, default=3)
    made.add_argument("--skill", default="")
    made.add_argument("--agent", action="store_true", help="one proposal of the campaign's agent")
    verb(submit).add_argument("file", help="JSON of forge.hypothesis/1, or - for standard input")
    made = verb(export)
    made.add_argument("--track", default="non_record_16mb", help="non_record_16mb or 10min_16mb")
    made.add_argument("--title", default="")
    made.add_argument("--author", default="")
    made.add_argument("--out", default="")
    for function in (knobs, doctor, skills):
        made = verb(function, of_campaign=False)
        scripted(made)
    verbs.choices["knobs"].add_argument("--preset", default="baseline+cpu")
    made = verbs.choices["skills"]
    made.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=["list", "validate", "new", "retire", "restore"],
    )
    made.add_argument("skill", nargs="?", default="")
    made.add_argument(
        "--of", default="", metavar="CAMPAIGN", help="of a campaign, not those that ship"
    )
    made.add_argument("--about", default="", help="of a new one: what it does and when to use it")
    made.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME=RANGE",
        help="of a new one: NAME=LOW:HIGH[:log][:steps] or NAME=CHOICE,CHOICE",
    )
    made = verb(harvest, of_campaign=False)
    made.add_argument("folder")
    made.add_argument(
        "--into",
        default="",
        metavar="CAMPAIGN",
        help="seed the choice of skills with what was read",
    )
    made = verb(serve)
    made.add_argument("--port", type=int, default=13000)
    made.add_argument("--hours", type=float, default=0.0)
    made = verb(worker, of_campaign=False)
    made.add_argument("--connect", required=True, metavar="HOST:PORT|JOURNAL")
    made.add_argument("--scratch", default="runs/forge-worker")
    made.add_argument(
        "--idle", type=float, default=60.0, help="leave after this many seconds without work"
    )
    made.add_argument(
        "--slurm", default="", metavar="PARTITION", help="start workers through Slurm instead"
    )
    made.add_argument("--count", type=int, default=1)
    verb(bench, of_campaign=False)
    verb(supervise, of_campaign=False, hidden=True).add_argument("folder")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user, 130 interrupted."""
    try:
        asked = parser().parse_args(arguments)
        asked.call(asked)
        return 0
    except ForgeError as error:
        for line in re.split(r"\n", str(error)):
            print("error: " + line, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed: pip install -r requirements.txt",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        return 0
    except OSError as error:  # disk full, folder read-only: the machine's fault, not a bug
        print(f"error: {Path(error.filename or '.').name}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

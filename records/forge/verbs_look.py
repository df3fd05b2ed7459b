"""Verbs that show a campaign and change nothing of it."""

import json
from pathlib import Path

from . import ForgeError, forecasts, sampler, skill_review
from . import doctor as machine
from . import report as rendered
from . import space as space_module
from .campaign_folder import load_skills
from .ledger import file_digest
from .publish import publish
from .standing import marks, standing
from .verbs import campaign, deciding, say, searched_skill


def status(asked):
    """Where a campaign stands."""
    data = standing(campaign(asked.name).view)
    say(asked, data, rendered.standing_text(data))


def show(asked):
    """One experiment or run in full."""
    c = campaign(asked.name)
    if asked.id in c.state.experiments:
        x = c.state.experiments[asked.id]
        runs = [
            dict(key=r.key, rung=r.rung, seed=r.seed, slots=r.slots, record=r.record)
            for r in c.state.runs.values()
            if r.exp == x.id
        ]
        print(json.dumps(dict(vars(x), runs=runs), indent=1))
    elif asked.id in c.state.runs:
        path = c.folder / "runs" / asked.id / "metrics.json"
        known = vars(c.state.runs[asked.id])
        print(path.read_text("utf-8") if path.exists() else json.dumps(known, indent=1))
    else:
        raise ForgeError(
            f"{asked.id}: neither an experiment (e000001) nor the key of a run of {asked.name}"
        )


def diff(asked):
    """Knobs in which two experiments, or anchor, champion and base, differ."""
    c = campaign(asked.name)
    named = dict(base={}, anchor=c.state.anchor, champion=c.state.champion)
    named |= {x.id: x.change for x in c.state.experiments.values()}
    for name in (asked.a, asked.b):
        if name not in named:
            raise ForgeError(f"{name}: want base, anchor, champion or an experiment (e000004)")
    a, b = (c.space.values(named[n]) for n in (asked.a, asked.b))
    found = {n: [a[n], b[n]] for n in a if a[n] != b[n]}
    text = "\n".join(f"{n}: {x} -> {y}" for n, (x, y) in found.items())
    say(asked, found, text or "no difference")


def knobs(asked):
    """The search space: knob, range, class, skill; and which knobs of the script no skill owns."""
    base = dict(PRESET=asked.preset)
    described = space_module.describe(Path(asked.script), base)
    space = space_module.Space.build(described, load_skills(Path(asked.skills)), base)
    free = []
    barred = {}
    for name in sorted(set(described["knobs"]) - set(space.knobs)):
        why = space_module.no_treatment(name, described["knobs"][name]["group"])
        if why:
            barred[name] = why
        else:
            free.append(name)
    lines = []
    for name, k in sorted(space.knobs.items(), key=lambda i: (i[1].skill, i[0])):
        span = ", ".join(k.choices) if k.kind == "choice" else f"{k.low:g} to {k.high:g}"
        span += " (part of all steps)" if k.of_steps else ""
        span += " log" if k.log else ""
        lines.append(f"{k.skill:<14} {name:<28} {k.klass:<12} {span}   base {k.base}")
    lines += ["", f"{len(free)} knobs that no skill owns: " + ", ".join(free)]
    lines.append(f"{len(barred)} knobs that are no treatment: " + ", ".join(barred))
    data = dict(knobs={n: vars(k) for n, k in space.knobs.items()}, unowned=free, barred=barred)
    say(asked, data, "\n".join(lines))


def ask_agent(asked):
    """The agent's next proposal through all gates; its calls count."""
    from . import agent

    with deciding(asked.name) as c:
        c.sync_config()
        if not c.config["agent"]["cmd"]:
            text = "no agent; name a command in campaign.toml, [agent] cmd"
            raise ForgeError(f"{asked.name}: {text}")
        if reason := agent.unaffordable(c.view):
            raise ForgeError(f"the budget for the agent is used: {reason}")
        state = c.state
        before = len(state.agent_calls)
        rng = sampler.generator(state, "agent", before)
        if asked.skill:
            skill = searched_skill(c, asked.skill)
        else:
            skill = sampler.choose_skill(state, c.space.skills, rng)
        found = c.agent.consult(c.view, c.record, skill)
        calls = state.agent_calls[before:]
        lines = []
        for call in calls:
            if not call["ok"]:
                lines.append(f"answer {call['attempt']} was refused: {call['reason']}")
            if call.get("stderr"):
                lines.append(f"its standard error ends: {call['stderr'][-500:]}")
        if found:
            env = c.space.resolve(found["change"], c.rung(c.config["search"]["rung"]))
            found |= dict(env=env, refused=c.refusal(found["change"]))
            lines.append(f"{found['skill']}: {found['change']}  {found['text']}")
            if found["refused"]:
                lines.append(f"refused: {found['refused']}")
        lines.append(f"{len(calls)} calls, {c.spent()['agent_calls']} in all")
        say(asked, dict(proposals=[found] if found else [], calls=calls), "\n".join(lines))


def propose(asked):
    """Show proposals without running them. One of the agent costs what a call costs, and may follow
    an open breaker."""
    if asked.agent:
        ask_agent(asked)
        return
    c = campaign(asked.name)
    if asked.skill:
        searched_skill(c, asked.skill)
    found = []
    for _ in range(asked.n):
        made = sampler.propose(c.state, c.space, asked.skill)
        if made is None:
            break
        env = c.space.resolve(made[1], c.rung(c.config["search"]["rung"]))
        found.append(dict(skill=made[0], change=made[1], env=env))
        # In memory only: the next draw differs.
        c.state.refused.append(dict(change=made[1], at=-1, oversize=False))
    text = "\n".join(f"{f['skill']}: {f['change']}" for f in found)
    say(asked, dict(proposals=found), text)


def inbox(asked):
    """Hypotheses that were handed in and wait for their turn, and those that were set aside."""
    box = campaign(asked.name).folder / "inbox"
    found: dict[str, list] = {}
    lines = []
    for kind, at in (("waiting", "."), ("taken", "done")):
        paths = sorted((box / at).glob("*.json"))
        found[kind] = [json.loads(p.read_text("utf-8")) | dict(file=p.name) for p in paths]
        for h in found[kind]:
            env = json.dumps(h.get("env", {}))
            lines.append(f"{kind:<8} {h['file']}  {env}  {h.get('hypothesis', '')[:80]}")
    say(asked, found, "\n".join(lines) or "empty")


def project(asked):
    """Forecast of a run's learning curve."""
    path = campaign(asked.name).folder / "runs" / asked.id / "metrics.json"
    if not path.exists():
        raise ForgeError(f"{asked.id}: no finished run of that key")
    curve = json.loads(path.read_text("utf-8"))["curve"]
    try:
        data = forecasts.project(curve, asked.tokens or 2 * curve[-1][0])
    except (ValueError, IndexError) as error:
        raise ForgeError(f"{asked.id}: {error}") from None
    rows = zip(data["tokens"], data["low"], data["middle"], data["high"])
    lines = [f"at {t:.4g} tokens: {m:.4f} [{a:.4f}, {b:.4f}] (90 %)" for t, a, m, b in rows]
    say(asked, data, "\n".join(lines))


def transfer(asked):
    """Whether the order of configurations holds from rung to rung, per knob class."""
    c = campaign(asked.name)
    rows = forecasts.report(c.state, c.space)
    lines = []
    for r in rows:
        text = f"{r['lower']} -> {r['upper']}  {r['klass']:<12} n={r['n']:<3} {r['word']:<18} "
        if "tau" in r:
            text += f"tau {r['tau']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        else:
            text += f"(prior: {r['prior']})"
        lines.append(text)
    nothing = "no configuration has run on two rungs yet"
    say(asked, dict(rows=rows), "\n".join(lines) or nothing)


def meta(asked):
    """The review's findings as of now, without recording them."""
    c = campaign(asked.name)
    data = skill_review.summarise(c.state, c.space, len(c.state.metas) + 1)
    say(asked, data, rendered.skill_text(data["skills"], marks(c.state)))


def playbook(asked):
    """Claims and what became of them."""
    found = skill_review.claims(campaign(asked.name).state)
    text = "\n".join(map(skill_review.line_of, found))
    say(asked, dict(claims=found), text or "no claims yet: a confirmed change makes one")


def verify(asked):
    """Check every event, hash and run folder."""
    c = campaign(asked.name)
    wrong = []
    for run in c.state.runs.values():
        folder = c.folder / "runs" / run.key
        if run.finished and (folder / "metrics.json").exists():
            record = json.loads((folder / "metrics.json").read_text("utf-8"))
            out = folder / f"a{record['attempt']}.out"
            if out.exists() and file_digest(out) != record["log_sha256"]:
                wrong.append(f"run {run.key}: its log was changed after the run")
            bpb = record["metrics"].get("val_bpb")
            if run.score is not None and bpb != run.record["bpb"]:
                text = f"the ledger says {run.record['bpb']}, the folder {bpb}"
                wrong.append(f"run {run.key}: {text}")
    for script in (c.folder / "code").glob("*/train_gpt.py"):
        if not file_digest(script).startswith(script.parent.name):
            wrong.append(f"code {script.parent.name}: was changed")
    if wrong:
        raise ForgeError("\n".join(wrong))
    counts = f"{c.state.events} events, {len(c.state.runs)} runs"
    print(f"{counts}: every checksum holds; state {c.state.digest()}")


def report(asked):
    """Write report.html now."""
    c = campaign(asked.name)
    publish(c.view)
    print(f"{c.folder.name}/report.html")


def doctor(asked):
    """What this machine offers, and whether the script speaks the forge's language."""
    data = machine.doctor(Path(asked.script))
    say(asked, data, "\n".join(f"{k:<12} {v}" for k, v in data.items()))

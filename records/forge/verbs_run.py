"""Verbs that begin and run campaigns."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from . import ForgeError, runner
from .space import not_to_be_set

# What a rung is called with, per device; times are limits, not wishes. Compiling takes longer than
# a short run on a CPU, chunks are the cheapest score, and a line per step is what forecasts read.
SHORT = dict(COMPILE="off", EVAL="chunked", TTT="none", TRAIN_LOG_EVERY="1")
# On one GPU a score of the whole validation text by sliding windows, or with learning on it, takes
# longer than the run: below the target rung the text is read once, in chunks. Compiling and scoring
# are silent, for minutes.
ONCE = dict(EVAL="chunked", TTT="none", TRAIN_LOG_EVERY="1")
# Three runs of the base leave the noise to three degrees of freedom: five halve the false claims of
# a fresh campaign, see the table in README.md.
BASE_RUNS = 5
LADDERS = {
    "cpu": {
        "smoke": dict(kill_s=180.0, env=SHORT | dict(ITERATIONS="20", MAX_WALLCLOCK_SECONDS="0")),
        "screen": dict(
            kill_s=600.0, sentinel_runs=BASE_RUNS, env=SHORT | dict(MAX_WALLCLOCK_SECONDS="30")
        ),
        "local": dict(
            kill_s=1200.0, sentinel_runs=BASE_RUNS, env=SHORT | dict(MAX_WALLCLOCK_SECONDS="120")
        ),
    },
    "cuda": {
        "smoke": dict(
            kill_s=900.0,
            stall_s=900,
            env=ONCE | dict(ITERATIONS="20", MAX_WALLCLOCK_SECONDS="0"),
        ),
        "screen": dict(
            kill_s=1200.0,
            stall_s=900,
            sentinel_runs=BASE_RUNS,
            env=ONCE | dict(MAX_WALLCLOCK_SECONDS="60"),
        ),
        "local": dict(
            kill_s=2400.0,
            stall_s=900,
            sentinel_runs=BASE_RUNS,
            env=ONCE | dict(MAX_WALLCLOCK_SECONDS="300"),
        ),
        "target": dict(
            kill_s=2700.0,
            stall_s=1500,
            env=dict(MAX_WALLCLOCK_SECONDS="600"),
            nproc=8,
            prior_sigma=0.0007,
        ),
    },
}


def value_of(text: str) -> Any:
    """A number, truth value or list where the text is one, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def ladder(asked) -> dict[str, dict]:
    """The rungs of a new campaign: those of its device, changed as asked."""
    from .verbs import pairs

    small = {"cpu", "tiny"} & set(asked.preset.split("+"))
    rungs = {name: dict(rung) for name, rung in LADDERS["cpu" if small else "cuda"].items()}
    for name, rung in rungs.items():
        if name != "target" and asked.gpus_per_run > 1:
            rung["nproc"] = asked.gpus_per_run
    for item, value in pairs(asked.rung).items():  # screen.ITERATIONS=200, screen.kill_s=60
        name, _, key = item.partition(".")
        if name not in rungs or not key:
            names = ", ".join(rungs)
            raise ForgeError(f"--rung {item}: want RUNG.NAME=VALUE with a rung of {names}")
        if key.isupper():
            rungs[name]["env"] = rungs[name]["env"] | {key: value}
        else:
            rungs[name][key] = value_of(value)
    return rungs


def init(asked):
    """Create a campaign."""
    from . import campaign, settings
    from .verbs import pairs, place

    knobs = pairs(asked.knob)
    if barred := not_to_be_set(knobs):
        raise ForgeError("\n".join(f"--knob {why}" for why in barred))
    limits = ("experiments", "minutes", "runs", "deadline")
    config = dict(
        seed=asked.seed,
        base=dict(PRESET=asked.preset, CHECKPOINT_EVERY="0", STRICT_ENV="0") | knobs,
        rungs=ladder(asked),
        search=dict(rung=asked.on, promote_to=asked.promote_to),
        loop=dict(workers=asked.workers),
        budget={name: getattr(asked, name) for name in limits},
        agent=dict(cmd=asked.agent),
    )
    for item, value in pairs(asked.set).items():  # loop.confirm=end, search.max_flops=1.1
        table, _, key = item.partition(".")
        if table not in settings.DEFAULTS or not key:
            names = ", ".join(settings.DEFAULTS)
            raise ForgeError(f"--set {item}: want TABLE.KEY=VALUE with a table of {names}")
        config.setdefault(table, {})[key] = value_of(value)
    folder = place(asked.name)
    campaign.create(folder, Path(asked.script), Path(asked.skills), config, asked.without)
    print(f"campaign {folder.name} begun; limits and rungs are in campaign.toml, to edit any time")


def run(asked):
    """Ticks until the campaign's budgets are used."""
    from .publish import publish
    from .report import news
    from .verbs import campaign

    c = campaign(asked.name)
    if c.state.stopped:
        c.record("resumed", after=c.state.stopped)
    told = c.state.events

    def progress():
        nonlocal told
        publish(c.view, quick=True)
        for line in news(c.ledger.read()[told:], c.view):
            print(line, flush=True)
        told = c.state.events

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        c.loop(asked.hours * 3600, progress)
    except KeyboardInterrupt:
        c.runs.stop([r.key for r in c.running()])
        hint = f"interrupted; go on with: python records/forge/forge.py run {asked.name}"
        print(hint, file=sys.stderr)
        raise
    finally:
        publish(c.view)
    print(f"stopped: {c.state.stopped or 'time is over'}   report: {c.folder.name}/report.html")


def start(asked):
    """Create a campaign unless it exists, and run it."""
    from .verbs import place

    if not (place(asked.name) / "events.jsonl").exists():
        init(asked)
    else:
        print(
            f"campaign {asked.name} exists and goes on; what is given here is not read, see its "
            "campaign.toml"
        )
    run(asked)


def tick(asked):
    """One idempotent step, for cron."""
    from .publish import publish
    from .verbs import campaign, say

    c = campaign(asked.name)
    c.agent.patient = True  # nobody would be there to hear a later answer
    moved = c.tick()
    publish(c.view)
    text = "moved" if moved else "waiting"
    text += f"; stopped: {c.state.stopped}" if c.state.stopped else ""
    say(asked, dict(moved=moved, stopped=c.state.stopped), text)


def serve(asked):
    """Open the queue for workers of other machines, and run the campaign on them."""
    from . import remote
    from .publish import publish
    from .verbs import campaign

    remote.serve(campaign(asked.name), asked.port, asked.hours, lambda c: publish(c.view))


def worker(asked):
    """Pull runs from a head's queue until it is empty or closed."""
    from . import remote

    if asked.slurm:
        remote.start_on_slurm(asked.connect, asked.slurm, asked.count)
    else:
        remote.work(asked.connect, Path(asked.scratch), asked.idle)


def supervise(asked):
    """Internal: bring one run folder to its end."""
    try:
        runner.supervise(Path(asked.folder))
    except runner.Stopped:
        print("stopped", file=sys.stderr)

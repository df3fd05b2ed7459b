#!/usr/bin/env python3
"""The Forge: proposes, runs, judges and learns, unattended, with error rates.

    python records/forge/forge.py start NAME --preset baseline+cpu --experiments 40
    python records/forge/forge.py status NAME      where it stands
    python records/forge/forge.py --help           every verb

A campaign is a folder under records/campaigns/ (or a path). Stop it at any time and any way;
`run NAME` goes on.
"""

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # so that `forge` is this package and not this file
from forge import ForgeError  # noqa: E402

ROOT = HERE.parents[1]
# verb: (module, what it does). The function in the module has the verb's name; modules are loaded
# only when their verb is called, for they bring numpy, scipy and optuna.
VERBS = {
    "init": ("verbs_run", "Create a campaign."),
    "start": ("verbs_run", "Create a campaign unless it exists, and run it."),
    "run": ("verbs_run", "Run until the campaign's budgets are used."),
    "tick": ("verbs_run", "One idempotent step, for cron."),
    "serve": ("verbs_run", "Run a campaign on workers of other machines."),
    "worker": ("verbs_run", "Pull runs from a head's queue until it is empty or closed."),
    "supervise": ("verbs_run", ""),
    "status": ("verbs_look", "Where a campaign stands."),
    "show": ("verbs_look", "One experiment or run in full."),
    "diff": ("verbs_look", "Knobs in which two experiments, anchor, champion or base differ."),
    "knobs": ("verbs_look", "The search space, and which knobs of the script no skill owns."),
    "propose": (
        "verbs_look",
        "Show proposals without running them; one of the agent costs a call.",
    ),
    "inbox": ("verbs_look", "Hypotheses that were handed in: those that wait and those taken."),
    "project": ("verbs_look", "Forecast of a run's learning curve."),
    "transfer": ("verbs_look", "Whether the order of configurations holds from rung to rung."),
    "meta": ("verbs_look", "The review of skills and claims as of now, without recording it."),
    "playbook": ("verbs_look", "Claims and what became of them."),
    "verify": ("verbs_look", "Check every event, hash and run folder."),
    "report": ("verbs_look", "Write report.html now."),
    "doctor": ("verbs_look", "What this machine offers, and whether the script fits the forge."),
    "submit": ("verbs_change", "Hand in a hypothesis: it is the next experiment."),
    "compose": ("verbs_change", "Which of several changes help together? Twelve runs."),
    "confirm": ("verbs_change", "Test the anchor now, on paired and then on fresh seeds."),
    "sentinel": ("verbs_change", "Measure the base configuration and its noise on a rung."),
    "promote": ("verbs_change", "Run an experiment's configuration on another rung as well."),
    "retry": ("verbs_change", "Forget a run that the machine failed, so that it is run again."),
    "replay": ("verbs_change", "Run a record once more, in a folder of its own."),
    "rebuild": ("verbs_change", "Write everything but the events anew from the events."),
    "skills": ("verbs_change", "List, check, add, retire and restore skills."),
    "harvest": ("verbs_change", "Sort a tree of records; --into a campaign to begin with it."),
    "export": ("verbs_change", "A submission folder of the champion."),
    "bench": ("verbs_change", "The acceptance tests of the forge."),
}
WITHOUT_CAMPAIGN = ("knobs", "doctor", "skills", "harvest", "worker", "bench", "supervise")
SCRIPTED = ("init", "start", "knobs", "doctor", "skills")


def new_campaign(made: argparse.ArgumentParser):
    """The arguments that a new campaign takes."""
    add = made.add_argument
    add("--preset", default="baseline+cpu", help="where the search begins, as PRESET of the script")
    many = dict(action="append", default=[])
    add("--knob", metavar="NAME=VALUE", help="fixed for every run", **many)
    text = "of a rung: a knob in capitals, or tokens, kill_s, stall_s, sentinel_runs, nproc"
    add("--rung", metavar="RUNG.NAME=VALUE", help=text, **many)
    text = "anything else of campaign.toml, such as loop.confirm=end or search.max_flops=1.1"
    add("--set", metavar="TABLE.KEY=VALUE", help=text, **many)
    add("--without", metavar="SKILL", help="leave a skill out", **many)
    add("--on", default="screen", help="rung of the search")
    add("--promote-to", default="", help="rung that the best third is measured on as well")
    add("--experiments", type=int, default=40)
    add("--minutes", type=float, default=0.0, help="device minutes, 0 = no limit")
    add("--runs", type=int, default=0, help="processes, 0 = no limit")
    add("--deadline", default="", help="UTC time such as 2026-12-01T08:00:00Z")
    add("--workers", type=int, default=1, help="runs at the same time")
    add("--gpus-per-run", type=int, default=1, help="GPUs of a run below the target rung")
    add("--seed", type=int, default=1, help="of the proposals")
    add("--agent", default="", help="command that reads a prompt and answers with JSON")


def arguments_of(verb: str, add):
    """The arguments of one verb besides those that many share."""
    if verb in ("run", "start", "serve"):
        text = "stop after this long, 0 = when the budget is used"
        add("--hours", type=float, default=0.0, help=text)
    if verb in ("show", "project", "replay", "retry", "promote"):
        add("id")
    if verb == "promote":
        add("--to", required=True, metavar="RUNG")
    if verb == "sentinel":
        add("--rung", default="screen")
    if verb == "project":
        add("--tokens", type=float, nargs="*", default=[])
    if verb == "compose":
        add("changes", nargs="+", metavar="KNOB=VALUE[,KNOB=VALUE]")
    if verb == "diff":
        add("a")
        add("b")
    if verb == "propose":
        add("--n", type=int, default=3)
        add("--skill", default="")
        add("--agent", action="store_true", help="one proposal of the campaign's agent")
    if verb == "submit":
        add("file", help="JSON of forge.hypothesis/1, or - for standard input")
    if verb == "export":
        add("--track", default="non_record_16mb", help="non_record_16mb or 10min_16mb")
        for name in ("--title", "--author", "--out"):
            add(name, default="")
    if verb == "knobs":
        add("--preset", default="baseline+cpu")
    if verb == "skills":
        actions = ["list", "validate", "new", "retire", "restore"]
        add("action", nargs="?", default="list", choices=actions)
        add("skill", nargs="?", default="")
        text = "of a campaign, not those that ship"
        add("--of", default="", metavar="CAMPAIGN", help=text)
        add("--about", default="", help="of a new one: what it does and when to use it")
        text = "of a new one: NAME=LOW:HIGH[:log][:steps] or NAME=CHOICE,CHOICE"
        add("--knob", action="append", default=[], metavar="NAME=RANGE", help=text)
    if verb == "harvest":
        add("folder")
        text = "seed the choice of skills with what was read"
        add("--into", default="", metavar="CAMPAIGN", help=text)
    if verb == "serve":
        add("--port", type=int, default=13000)
    if verb == "worker":
        add("--connect", required=True, metavar="HOST:PORT|JOURNAL")
        add("--scratch", default="runs/forge-worker")
        text = "leave after this many seconds without work"
        add("--idle", type=float, default=60.0, help=text)
        text = "start workers through Slurm instead"
        add("--slurm", default="", metavar="PARTITION", help=text)
        add("--count", type=int, default=1)
    if verb == "supervise":
        add("folder")


def parser() -> argparse.ArgumentParser:
    """Every verb and its arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, text) in VERBS.items():
        shown = dict(help=text) if text else {}
        made = verbs.add_parser(verb, description=text, **shown)
        made.add_argument("--json", action="store_true", help="answer with JSON")
        if verb not in WITHOUT_CAMPAIGN:
            text = "campaign: a name under records/campaigns/, or a folder"
            made.add_argument("name", help=text)
        if verb in SCRIPTED:
            made.add_argument("--script", default=str(ROOT / "train_gpt.py"))
            made.add_argument("--skills", default=str(HERE / "skills"))
        if verb in ("init", "start"):
            new_campaign(made)
        arguments_of(verb, made.add_argument)
    return top


def complain(text: str) -> int:
    """Every line of a complaint on standard error; returns the exit code of a mistake."""
    for line in text.split("\n"):
        print("error: " + line, file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        asked = parser().parse_args(arguments)
        module = importlib.import_module("forge." + VERBS[asked.verb][0])
        getattr(module, asked.verb)(asked)
        return 0
    except ForgeError as error:
        return complain(str(error))
    except ModuleNotFoundError as error:
        return complain(f"{error.name} is not installed: pip install -r requirements.txt")
    except BrokenPipeError:
        return 0
    except OSError as error:  # disk full, folder read-only: the machine's fault, not a bug
        name = Path(str(error.filename or ".")).name
        return complain(f"{name}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

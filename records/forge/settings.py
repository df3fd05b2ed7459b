"""campaign.toml: every setting of a campaign, its default, and what is wrong with a file."""

import calendar
import json
import time
import tomllib
from pathlib import Path
from typing import Any

from facts.limits import ARTIFACT_BYTES

from . import ForgeError
from .comparison import LOOKS
from .ledger import now
from .space import not_to_be_set

DEFAULTS: dict[str, dict[str, Any]] = dict(
    search=dict(
        rung="screen",
        confirm_rung="",
        promote_to="",
        anchor="sigma",
        race_above=0.0025,
        max_flops=0.0,
    ),
    loop=dict(
        workers=1,
        meta_every=5,
        confirm="large",
        confirm_every=20,
        ablation=True,
        lease_s=300.0,
        forecasts=True,
    ),
    seeds=dict(search=list(range(1, 21)), judge=list(range(101, 106)), fresh_from=1001),
    budget=dict(
        experiments=40,
        minutes=0.0,
        runs=0,
        deadline="",
        disk_gib=1.0,
        artifact_bytes=ARTIFACT_BYTES,
        agent_calls=0,
        agent_dollars=0.0,
    ),
    agent=dict(cmd="", share=0.3, timeout_s=300.0, dollars_per_call=0.0, allow_unsandboxed=False),
)
CHOICES = dict(confirm=("large", "end"), anchor=("sigma", "greedy"))
AT_LEAST_ONE = ("workers", "meta_every", "confirm_every")


RUNG = ("kill_s", "tokens", "stall_s", "sentinel_runs", "prior_sigma", "nproc")  # and env
HEAD = """\
# A campaign's limits. Edit at any time, also while it runs; name, seed, code and base are fixed.
# 0 or "" is no limit.
# rungs: kill_s ends a run by force; env is added to every run; tokens, if given, makes runs equal
#   in tokens; nproc is the number of processes and GPUs of a run. A run on the rung "target" has
#   the machine for itself.
# search: rung of the search; confirm_rung "" is the same; anchor "sigma" or "greedy"; race_above is
#   a noise; max_flops refuses what needs more operations per token than this times the base's.
# loop: workers is the number of runs at the same time; confirm "large" tests a large gain at once,
#   "end" only when the budget is used; forecasts end hopeless runs of the search halfway.
# agent: dollars_per_call is what a call costs when the command does not say so in its answer.

"""


def table_errors(table: str, mine: dict) -> list[str]:
    """What is wrong with the values of one table."""
    defaults = DEFAULTS[table]
    errors = [
        f"unknown [{table}] {k}; known: {', '.join(defaults)}" for k in set(mine) - set(defaults)
    ]
    for k, v in mine.items():
        where = f"[{table}] {k} = {v!r}"
        kind = type(defaults.get(k, v))
        least = int(k in AT_LEAST_ONE)
        if not isinstance(v, (int, float) if kind in (int, float) else kind):
            errors.append(f"{where}: want a {kind.__name__}")
        elif isinstance(v, (int, float)) and not v >= least:
            errors.append(f"{where}: want {least} or more")
        elif v not in CHOICES.get(k, [v]):
            errors.append(f"{where}: want one of {', '.join(CHOICES[k])}")
    return errors


def rung_errors(name: str, rung: dict) -> list[str]:
    """What is wrong with one rung."""
    errors = []
    seconds = rung.get("kill_s")
    if not isinstance(seconds, (int, float)) or seconds <= 0:
        errors.append(f"[rungs.{name}] kill_s must be a number of seconds above 0")
    for k, v in rung.items():
        if k != "env" and (k not in RUNG or not isinstance(v, (int, float))):
            errors.append(f"[rungs.{name}] {k} = {v!r}: want a number named {', '.join(RUNG)}")
    errors += [f"[rungs.{name}] env: {e}" for e in not_to_be_set(rung.get("env", {}))]
    return errors


def seed_errors(seeds: dict) -> list[str]:
    """What is wrong with the three lists of seeds, which must never meet."""
    both = set(seeds["search"]) & set(seeds["judge"])
    errors = []
    if both or max(*seeds["search"], *seeds["judge"]) >= seeds["fresh_from"]:
        errors.append("search, judge and fresh seeds must not overlap")
    if len(seeds["judge"]) < max(LOOKS) or len(seeds["search"]) < 3:
        errors.append(f"want at least {max(LOOKS)} judge seeds and 3 search seeds")
    return errors


def read_config(path: Path) -> dict:
    """A campaign.toml with every default filled in. Raises ForgeError naming all that is wrong."""
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ForgeError(f"{path.name}: {error}") from None
    known = set(DEFAULTS) | {"name", "seed", "base", "rungs", "code", "data_print"}
    errors = [f"unknown table [{t}]" for t in set(found) - known]
    errors += [f"base: {e}" for e in not_to_be_set(found.get("base", {}))]
    config = dict(found)
    for table, defaults in DEFAULTS.items():
        mine = found.get(table, {})
        errors += table_errors(table, mine)
        config[table] = defaults | mine
    rungs = found.get("rungs", {})
    for key in ("rung", "confirm_rung", "promote_to"):
        name = config["search"][key]
        if name and name not in rungs:
            errors.append(f"rung {name!r} is not among [rungs.*]: {', '.join(rungs)}")
    for name, rung in rungs.items():
        errors += rung_errors(name, rung)
    deadline = config["budget"]["deadline"]
    try:
        seconds_of(deadline or now())
    except (ValueError, TypeError):
        errors.append(f"[budget] deadline {deadline!r}: want 2026-12-01T08:00:00Z")
    errors += seed_errors(config["seeds"])
    if errors:
        raise ForgeError("\n".join(f"{path.name}: {e}" for e in sorted(errors)))
    return config


def seconds_of(moment: str) -> float:
    """A UTC text such as 2026-12-01T08:00:00Z in seconds of time.time(). Raises ValueError."""
    return float(calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ")))


def to_toml(value: dict, prefix: str = "") -> str:
    """Nested tables of plain values as TOML."""
    lines = [f"[{prefix}]"] if prefix else []
    lines += [f"{k} = {json.dumps(v)}" for k, v in value.items() if not isinstance(v, dict)]
    tables = [
        to_toml(v, f"{prefix}.{k}" if prefix else k)
        for k, v in value.items()
        if isinstance(v, dict)
    ]
    return "\n".join(lines) + "\n\n" + "".join(tables)

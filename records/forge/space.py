"""The search space, straight from a script's own configuration, so that it never drifts from the
script.

A *change* is {knob: value} relative to the campaign's base environment, in search coordinates:
numbers and texts, and for knobs that count steps a part of the run (`as: fraction_of_steps`).
`resolve` turns a change into the environment of one rung. What a skill may touch is a range inside
what the script allows, in its assets/knobs.json.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ForgeError
from .ledger import digest
from .processes import clean_environment, located
from .run_record import number

CLASSES = ("shape", "optimizer", "schedule", "batch", "eval", "compression", "infra")
CODE = "@code"  # a change may carry the digest of patched code under this name
# Knobs that are no treatment: a better score by one of them says nothing about the model. Those of
# the first table are set by the forge itself for every run, those of the second by a campaign's
# base or rung, the same for all runs; no skill, proposal, agent or patch may search either.
OWN = dict(
    SEED="luck is no finding; seeds belong to the judge",
    RUN_MODE="the forge sets it for every run",
    RUN_ID="the forge sets it for every run",
    RUNS_DIR="the forge sets it for every run",
    ARTIFACT="the forge sets it for every run",
    RESUME="every run begins anew",
)
FIXED = dict(
    DATA_PATH="a path",
    TOKENIZER_PATH="a path",
    VOCAB_SIZE="it belongs to the data",
    CASEOPS="it belongs to the data",
    DEVICE="a choice of the machine",
    THREADS="a choice of the machine",
    MAX_WALLCLOCK_SECONDS="a budget of time",
    RESERVE_SECONDS="a budget of time",
    ITERATIONS="a budget of data",
    ARTIFACT_BUDGET_BYTES="a budget of size",
    TRAIN_LOG_EVERY="logging",
    VAL_LOSS_EVERY="logging",
    CHECKPOINT_EVERY="logging",
    STRICT_ENV="a check of names",
    ALLOW_NONCOMPLIANT="a rule of the competition",
)
FIXED_ENDINGS = dict(_PATH="a path", _DIR="a path", _SEED="luck is no finding")
FIXED_GROUPS = dict(run="it says how a run is kept, not what is trained")
# Executed in a process of its own: the script is imported, never run, and answers with its knobs as
# JSON.
PROBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
script = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
knobs = {}
for name, (group, f) in script.KNOBS.items():
    m = f.metadata
    knobs[name.upper()] = dict(group=group, type=type(f.default).__name__, lo=m["lo"], hi=m["hi"],
                               doc=m["doc"], choices=list(m["choices"]), needs=m["needs"])
try:
    values = {k.upper(): v for k, v in script.load(json.loads(sys.argv[2])).values().items()}
    print(json.dumps(dict(knobs=knobs, values=values)))
except script.UserError as error:
    print(json.dumps(dict(error=str(error))))
"""


@dataclass(frozen=True)
class Knob:
    """One searched environment variable. `low`, `high` and `base` are in search coordinates;
    `choices` are texts."""

    name: str
    skill: str
    klass: str
    kind: str  # float, int or choice
    base: Any
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()
    of_steps: bool = False
    needs: str = ""

    def clip(self, value: Any) -> Any:
        """The nearest value of the space, in its canonical form. Raises ForgeError for one that
        cannot be read."""
        if self.kind == "choice":
            text = text_of(value)
            if text not in self.choices:
                raise ForgeError(f"{self.name}={text}: want one of {', '.join(self.choices)}")
            return text
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ForgeError(f"{self.name}={value!r}: want a number")
        number = min(max(number, self.low), self.high)
        return int(round(number)) if self.kind == "int" else float(f"{number:.4g}")

    def check(self, value: Any) -> Any:
        """The canonical form of a value that lies in the space. Raises ForgeError naming what is
        allowed."""
        clipped = self.clip(value)
        if self.kind != "choice" and not math.isclose(
            float(value), clipped, rel_tol=1e-3, abs_tol=1e-9
        ):
            raise ForgeError(
                f"{self.name}={value}: want {self.low:g} to {self.high:g}"
                + (" (a part of all steps)" if self.of_steps else "")
            )
        return clipped


def no_treatment(name: str, group: str = "") -> str:
    """Why a knob must not be searched; empty for one that may. `group` is the script's own."""
    ending = next((why for end, why in FIXED_ENDINGS.items() if name.endswith(end)), "")
    why = OWN.get(name) or FIXED.get(name) or ending or FIXED_GROUPS.get(group, "")
    return f"{name} is no treatment ({why})" if why else ""


def not_to_be_set(names) -> list[str]:
    """Which of these knobs neither a campaign's base nor a rung may set, with the reason."""
    return [f"{name} cannot be set: {OWN[name]}" for name in names if name in OWN]


def class_of(group: str, name: str) -> str:
    """The knob class that decides how far a finding travels, unless a skill says otherwise."""
    timed = ("_FRAC", "_ITERS", "_STEPS", "_AT", "_EVERY", "_REFRESH")
    if group == "optim" and name.endswith(timed):
        return "schedule"
    if "BATCH" in name:
        return "batch"
    return dict(
        model="shape", optim="optimizer", quant="compression", eval="eval", data="batch"
    ).get(group, "infra")


def describe(script: Path, env: dict[str, str]) -> dict[str, Any]:
    """{"knobs": {NAME: {...}}, "values": {NAME: value}} of a script under an environment. The
    script is imported: never call this for patched code, whose knobs are those of its origin.
    Raises ForgeError with the script's own complaint."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(script), json.dumps(env)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=clean_environment(dict(PYTHONIOENCODING="utf-8")),
        timeout=300,
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ForgeError(f"{script.name}: cannot read its knobs ({reason[:300]})") from None
    if "error" in found:
        raise ForgeError(f"{script.name}: {found['error']}")
    return found


class Space:
    """All knobs that the skills of a campaign may change, and how a change becomes an
    environment."""

    def __init__(
        self, knobs: dict[str, Knob], base_env: dict[str, str], base_values: dict[str, Any]
    ):
        self.knobs = knobs
        self.base_env = base_env
        self.base_values = base_values
        self.skills = sorted({k.skill for k in knobs.values()})
        self.switches: set[str] = set()  # knobs that patches added: set by hypotheses, not searched

    @classmethod
    def build(cls, described: dict, skills: dict[str, dict], base_env: dict[str, str]) -> "Space":
        """From a script's description and {skill: contents of its knobs.json}. All mistakes are
        reported at once."""
        knobs = {}
        errors = []
        for skill, table in sorted(skills.items()):
            for name, want in table.items():
                try:
                    if name in knobs:
                        raise ForgeError(f"already belongs to skill {knobs[name].skill}")
                    knobs[name] = make_knob(name, skill, want, described)
                except (ForgeError, KeyError, TypeError, ValueError) as error:
                    errors.append(f"skill {skill}, knob {name}: {error}")
        if errors:
            raise ForgeError("\n".join(errors))
        return cls(knobs, base_env, described["values"])

    def values(self, change: dict[str, Any]) -> dict[str, Any]:
        """Every searched knob's value under a change."""
        return {name: change.get(name, knob.base) for name, knob in self.knobs.items()}

    def normal(self, change: dict[str, Any]) -> dict[str, Any]:
        """The change without values that equal the base or that the rest makes meaningless: one
        form for one configuration. Raises ForgeError for an unknown knob or a value outside the
        space."""
        patch = {
            n: str(v)
            for n, v in change.items()
            if n == CODE or CODE in change and n in self.switches
        }
        unknown = sorted(set(change) - set(self.knobs) - set(patch))
        if barred := [why for n in unknown if (why := no_treatment(n))]:
            raise ForgeError("; ".join(barred))
        if unknown:
            raise ForgeError(f"unknown knob {', '.join(unknown)}; see `knobs`")
        kept = patch | {n: self.knobs[n].check(v) for n, v in change.items() if n not in patch}
        for _ in range(3):  # a knob can need one that itself has no effect
            values = {n: str(v) for n, v in (self.base_values | kept).items()}
            kept = {
                n: v
                for n, v in sorted(kept.items())
                if n in patch or v != self.knobs[n].base and holds(self.knobs[n].needs, values)
            }
        return kept

    def resolve(self, change: dict[str, Any], rung: dict[str, Any]) -> dict[str, str]:
        """The knob environment of a change on a rung: base, then change, then the rung's own. On a
        rung that names `tokens`, runs end by tokens and never by the clock: a larger batch gets
        fewer steps. Counts of steps follow the expected steps."""
        env = dict(self.base_env)
        values = self.base_values | change
        steps = rung["steps"]
        fixed = {k: str(v) for k, v in rung.get("env", {}).items()}
        if rung.get("tokens"):
            steps = max(
                1,
                rung["tokens"]
                // int(fixed.get("TRAIN_BATCH_TOKENS", values["TRAIN_BATCH_TOKENS"])),
            )
            fixed |= dict(ITERATIONS=str(steps), MAX_WALLCLOCK_SECONDS="0")
        for name, value in change.items():
            if name != CODE:
                if name in self.knobs and self.knobs[name].of_steps:
                    value = max(1, round(value * steps)) if value else 0
                env[name] = str(value)
        return env | fixed

    def classes(self, change: dict[str, Any], other: dict[str, Any]) -> set[str]:
        """Classes of the knobs in which two changes differ."""
        return {
            self.knobs[n].klass
            for n in set(change) | set(other)
            if n in self.knobs
            and change.get(n, self.knobs[n].base) != other.get(n, self.knobs[n].base)
        }


def holds(needs: str, values: dict[str, str]) -> bool:
    """Whether a `needs` rule of the script is met: ways joined by " or ", each of conditions joined
    by " and "."""
    return not needs or any(
        all(is_met(condition, values) for condition in way.split(" and "))
        for way in needs.split(" or ")
    )


def is_met(condition: str, values: dict[str, str]) -> bool:
    """Whether "KNOB <op> <value or KNOB>" is true of these texts, as numbers if both are."""
    name, op, want = condition.split()
    have = str(values.get(name.upper(), ""))
    if want.isupper():
        want = str(values.get(want, want))
    if op == "in":
        return have in want.split(",")
    try:
        a, b = (float({"True": 1, "False": 0}.get(x, x)) for x in (have, want))
    except ValueError:
        return {"==": have == want, "!=": have != want}.get(op, False)
    return {"==": a == b, "!=": a != b, "<": a < b, ">": a > b}[op]


def text_of(value: Any) -> str:
    """A choice as the environment says it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def make_knob(name: str, skill: str, want: dict, described: dict) -> Knob:
    """One knob of a skill, checked against the script. Raises ForgeError."""
    known = described["knobs"].get(name)
    if known is None:
        raise ForgeError("the script has no such knob")
    if barred := no_treatment(name, known["group"]):
        raise ForgeError(barred)
    klass = want.get("class") or class_of(known["group"], name)
    if klass not in CLASSES:
        raise ForgeError(f"class {klass!r}: want one of {', '.join(CLASSES)}")
    common = dict(name=name, skill=skill, klass=klass, needs=known["needs"])
    value = described["values"][name]
    if known["type"] == "bool" or "choices" in want:
        base = text_of(value)
        choices = choices_of(want, known)
        return Knob(
            kind="choice", base=base, choices=tuple(dict.fromkeys([*choices, base])), **common
        )
    return numeric_knob(want, known, value, described["values"], common)


def choices_of(want: dict, known: dict) -> list[str]:
    """The choices that a skill names, all of them the script's. Raises ForgeError."""
    choices = [text_of(v) for v in want.get("choices", [False, True])]
    if known["type"] in ("bool", "str") or known["choices"]:
        allowed = {text_of(v) for v in known["choices"] or [False, True]}
        if wrong := sorted(set(choices) - allowed):
            raise ForgeError(f"choices {', '.join(wrong)} are not among the script's")
    return choices


def numeric_knob(want: dict, known: dict, value: Any, values: dict, common: dict) -> Knob:
    """A knob with a range, which is widened to hold the base. Raises ForgeError."""
    of_steps = want.get("as") == "fraction_of_steps"
    log = bool(want.get("log"))
    low, high = float(want["low"]), float(want["high"])
    if "at_most" in want:  # larger values all mean the same, as "top blocks" beyond NUM_LAYERS
        high = min(high, float(values[want["at_most"]]))
    least, most = (0, 1) if of_steps else (known["lo"], known["hi"])
    if not least <= low < high <= most:
        raise ForgeError(f"range {low:g} to {high:g}: want a range inside {least} to {most}")
    if log and low <= 0:
        raise ForgeError("a logarithmic range begins above 0")
    base = value
    if of_steps:
        base = float(f"{min(value / values.get('ITERATIONS', 1), 1.0):.4g}")
    if not log or base > 0:
        low, high = min(low, base), max(high, base)
    if not low <= base <= high:
        raise ForgeError(f"the base value {base:g} lies outside a logarithmic range")
    kind = "float" if of_steps or known["type"] == "float" else "int"
    return Knob(kind=kind, base=base, low=low, high=high, log=log, of_steps=of_steps, **common)


def plan(
    script: Path, env: dict[str, str], scratch: Path, cage: Sequence[str] = ()
) -> dict[str, Any]:
    """What the script's RUN_MODE=plan foretells: {"ok", "reason", "bytes", "params", "flops"}.
    `cage` is the command in front of patched code, with `scratch` as its writable folder."""
    env = located(env, script)
    env |= dict(RUN_MODE="plan", RUNS_DIR=str(scratch), PYTHONIOENCODING="utf-8")
    try:
        done = subprocess.run(
            [*cage, sys.executable, str(script)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=300,
            cwd=scratch,
            env=clean_environment(env),
        )
    except subprocess.TimeoutExpired:
        return dict(ok=False, reason="plan took more than 300 s")
    found = re.search(
        r"^predicted_bytes model:(\d{1,18}) code:\d+ total:(\d{1,18}) budget:(\d{1,18}) fits:(\d)",
        done.stdout,
        re.M,
    )
    if done.returncode or not found:
        reason = " ".join((done.stderr.strip() or "no prediction").split())
        return dict(ok=False, reason=reason[:300])
    model, total, budget = (int(found[i]) for i in (1, 2, 3))
    fits = found[4] == "1"
    params = re.search(r"^model_params:(\d{1,18})", done.stdout, re.M)
    flops = re.findall(r"^plan:\d+ flops_per_token:([\d.e+]{1,30})", done.stdout, re.M)
    return dict(
        ok=fits,
        bytes=total,
        model_bytes=model,
        params=int(params[1]) if params else 0,
        flops=max(filter(math.isfinite, map(number, flops)), default=0.0),
        reason="" if fits else f"predicted size is {total - budget:,} bytes over the budget",
    )


def config_id(change: dict[str, Any]) -> str:
    """Names a configuration: equal for equal changes."""
    return digest(change, 12)

"""Numeric proposals, no language model needed: Thompson sampling picks a skill, TPE samples the
knobs that it owns.

Every other knob stays at the anchor, so that the search explores a block around what works. Both
parts are pure functions of the ledger's state: nothing of a sampler is stored, and a proposal can
be repeated.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from .ledger import digest
from .space import Knob, Space, config_id
from .state import State

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Weight of a credit per later try of the same skill: what a skill had to give, it gave.
DISCOUNT = 0.6
# Of the posterior: below 1.5 an early winner starves the rest, above 2 the inert skill costs more.
SPREAD = 1.5
TRUST = 1.5  # spreads between a skill of which every record speaks well and one of average
SUBSET = 0.6  # chance of a further knob of the skill to move along
# Most knobs of one proposal: eight drawn at once from a tuned configuration are hardly ever better.
MOST = 4
FLOOR = 0.05  # smallest share of proposals of every skill
REDRAWS = 8


@dataclass(frozen=True)
class Arm:
    """A skill's record: discounted posterior of its mean credit in bits per byte, and what a try
    costs."""

    skill: str
    tries: int
    wins: int
    mean: float
    sd: float
    minutes: float
    inert: bool


def credits(state: State) -> list[tuple[str, float, float]]:
    """(skill, credit, minutes) of every finished search experiment: its gain beyond half a sigma if
    it moved the anchor, else nothing."""
    found = []
    for x in state.searches():
        moved = x.verdict["verdict"] == "tentative"
        credit = max(0.0, -x.verdict["delta"] - 0.5 * x.verdict["sigma"]) if moved else 0.0
        seconds = sum(
            r.record["wall_s"] for r in state.runs.values() if r.exp == x.id and r.finished
        )
        found.append((x.skill, credit, max(seconds, 1e-3) / 60))
    return found


def arms(state: State, skills: list[str]) -> list[Arm]:
    """Every skill's posterior: normal, discounted per own try, with one pseudo-trial at the mean of
    all. Counts from the records of others are older than every own try: they move the mean, less
    with each, and never narrow it."""
    history = credits(state)
    all_credits = [c for _, c, _ in history]
    average = float(np.mean(all_credits)) if history else 0.0
    spread = max(float(np.std(all_credits)), 1e-9) if len(history) > 2 else 1.0
    inert = set(state.metas[-1]["inert"]) if state.metas else set()
    found = []
    for skill in skills:
        values = np.array([h[1] for h in history if h[0] == skill])
        weights = DISCOUNT ** np.arange(len(values))[::-1]
        mass = 1.0 + weights.sum()
        good, bad = state.prior.get(skill, (0.0, 0.0))
        told = (good + bad) * DISCOUNT ** len(values)
        belief = average + TRUST * spread * (good - bad) / max(good + bad, 1e-9)
        minutes = [h[2] for h in history if h[0] == skill] or [h[2] for h in history] or [1.0]
        found.append(
            Arm(
                skill,
                len(values),
                int((values > 0).sum()),
                float((average + told * belief + (weights * values).sum()) / (mass + told)),
                SPREAD * spread / math.sqrt(mass),
                float(np.mean(minutes)),
                skill in inert,
            )
        )
    return found


def choose_skill(state: State, skills: list[str], rng: np.random.Generator) -> str:
    """Thompson: the best draw per minute. Every skill keeps FLOOR of all proposals; an inert one
    has no more, a retired one none."""
    skills = [s for s in skills if s not in state.retired]
    if rng.random() < FLOOR * len(skills):
        return skills[rng.integers(len(skills))]
    draws = {
        a.skill: rng.normal(a.mean, a.sd) / a.minutes for a in arms(state, skills) if not a.inert
    }
    return max(draws, key=draws.get) if draws else skills[rng.integers(len(skills))]


def distribution(knob: Knob, narrowed: tuple[float, float] | None = None):
    """The knob as Optuna sees it."""
    if knob.kind == "choice":
        return optuna.distributions.CategoricalDistribution(knob.choices)
    low, high = narrowed or (knob.low, knob.high)
    if knob.kind == "int":
        return optuna.distributions.IntDistribution(
            int(math.ceil(low)), int(math.floor(high)), log=knob.log
        )
    return optuna.distributions.FloatDistribution(low, high, log=knob.log)


def study_of(knobs: dict[str, Knob], state: State, sampler) -> optuna.Study:
    """These knobs of all configurations that the search has seen, failed ones as bad as the worst,
    running ones as they are."""
    study = optuna.create_study(sampler=sampler)
    table = {name: distribution(k) for name, k in knobs.items()}
    finite = [r.score for r in state.runs.values() if r.score is not None]
    worst = max(finite, default=10.0) + (np.std(finite) if finite else 0.0)
    seen = []
    for x in state.experiments.values():
        if x.kind in ("search", "sentinel"):
            scores = state.scores(x.change, x.rung)
            cut = [
                r.forecast["middle"] for r in state.runs.values() if r.exp == x.id and r.forecast
            ]
            seen.append(
                (x.change, scores or cut or worst)
            )  # a running one counts as bad: no two look there
    seen += [(p["change"], worst) for p in state.refused if p.get("infeasible")]
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={n: k.clip(change.get(n, k.base)) for n, k in knobs.items()},
                distributions=table,
                value=float(np.mean(value)),
            )
            for change, value in seen
        ]
    )
    return study


def sample(state: State, space: Space, skill: str, seed: int) -> dict[str, Any]:
    """A change of the anchor in some of the skill's knobs, by TPE over everything seen."""
    rng = np.random.default_rng(seed)
    names = [n for n, k in space.knobs.items() if k.skill == skill]
    chosen = rng.choice(
        len(names), 1 + rng.binomial(min(len(names), MOST) - 1, SUBSET), replace=False
    )
    mine = {n: space.knobs[n] for i, n in enumerate(names) if i in chosen}
    ranges = ranges_of(state, skill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(n_startup_trials=10, multivariate=True, seed=seed)
        trial = study_of(mine, state, sampler).ask(
            {n: distribution(k, ranges.get(n)) for n, k in mine.items()}
        )
    change = {n: mine[n].clip(trial.params[n]) for n in mine}
    return space.normal(state.anchor | change)


def ranges_of(state: State, skill: str) -> dict[str, tuple[float, float]]:
    """Narrowed ranges of the skill's playbook in force."""
    versions = state.playbooks.get(skill, [])
    return {n: tuple(r) for n, r in versions[-1]["ranges"].items()} if versions else {}


def generator(state: State, *more: Any) -> np.random.Generator:
    """Randomness that depends on the campaign's seed and on where it stands, never on the
    moment."""
    return np.random.default_rng(
        int(digest([state.config["seed"], len(state.experiments), len(state.refused), *more]), 16)
    )


def propose(state: State, space: Space, skill: str = "") -> tuple[str, dict] | None:
    """(skill, change) that was not tried before; None when a skill has nothing new after REDRAWS
    draws."""
    seen = {x.cid for x in state.experiments.values()} | {
        config_id(p["change"]) for p in state.refused
    }
    rng = generator(state)
    last = state.refused[-1] if state.refused else {}
    again = sum(p["at"] == len(state.experiments) for p in state.refused) % 4
    for attempt in range(REDRAWS):
        if (
            again and last["oversize"] and attempt < REDRAWS // 2
        ):  # all its smaller forms may have been tried
            chosen = last["skill"]
            change = shrunk(last["change"], space, rng, state.retired)
        else:
            chosen = skill or choose_skill(state, space.skills, rng)
            change = sample(state, space, chosen, int(rng.integers(2**31)))
        if config_id(change) not in seen:
            return chosen, change
    return None


def shrunk(change: dict, space: Space, rng: np.random.Generator, retired: set[str]) -> dict:
    """What was refused for its size, with one compression choice moved: a number by one step down,
    anything else drawn anew. A larger model often pays only together with fewer bits, neither move
    is worth anything alone, and the fewest bits given up cost least."""
    knobs = [
        k
        for k in space.knobs.values()
        if k.klass == "compression" and k.kind == "choice" and k.skill not in retired
    ]
    if knobs:
        knob = knobs[rng.integers(len(knobs))]
        choices = list(knob.choices)
        if all(c.replace(".", "", 1).isdigit() for c in choices):
            now = float(change.get(knob.name, knob.base))
            choices = sorted((c for c in choices if float(c) < now), key=float)[-1:] or choices
        change = change | {knob.name: choices[rng.integers(len(choices))]}
    return space.normal(change)

"""The meta-layer: every fifth experiment it weighs the skills, turns repeated evidence into
playbooks, and takes back edits that made a skill worse. It costs no device time, is a pure function
of the state, and runs once per index.
"""

import warnings
from typing import Any

import numpy as np
from scipy.special import betainc, fdtrc, stdtrit

from . import comparison, sampler
from .space import Space
from .state import State

MIN_COMPARISONS = 3
MIN_PARENTS = 2
MIN_SIGNS = 0.8
WORTH = 0.0003  # smallest mean gain of a proven claim on `target`, bits per byte
STALE_AFTER = 50  # experiments without new evidence
INERT_AFTER = 5  # tries, all alike, that make a skill inert
NARROW_AFTER = 20  # tries before ranges are narrowed
ROLLBACK_USES = 10
ROLLBACK_AT = 0.9


def claim_name(skill: str, knobs: dict[str, list], space: Space) -> str:
    """A change as a statement that later experiments can repeat: numbers by direction, choices by
    value."""
    parts = []
    for name, (old, new) in sorted(knobs.items()):
        choice = name in space.knobs and space.knobs[name].kind == "choice"
        parts.append(
            f"{name}={new}" if choice else f"{name} {'up' if float(new) > float(old) else 'down'}"
        )
    return f"{skill}: " + ", ".join(parts)


def crystallise(
    evidence: list[dict], sigma: float, now: int, target: bool = False
) -> dict[str, Any]:
    """What a claim's evidence on one rung amounts to. Each piece has delta, se, parent and at
    (experiment count).

    proven: at least 3 comparisons on 2 parents, a random-effects upper bound below zero, a mean
    gain worth having, and four of five signs negative. refuted: the lower bound excludes a gain of
    sigma. stale: nothing new for 50 experiments; `was` is what it had been. Else a heuristic.
    """
    deltas = np.array([e["delta"] for e in evidence])
    errors = np.array([e["se"] for e in evidence])
    k = len(deltas)
    mean = float(deltas.mean())
    within = float(np.sqrt((errors**2).mean()))
    spread = max(
        float(deltas.std(ddof=1)) if k > 1 else 0.0, within
    )  # between studies, never below the error within
    half = float(stdtrit(k - 1, 0.95) * spread / np.sqrt(k)) if k > 1 else float("inf")
    worth, mde = (WORTH, 0.0005) if target else (0.5 * sigma, sigma)
    parents = len({e["parent"] for e in evidence})
    status = "heuristic"
    if k >= MIN_COMPARISONS and mean - half > -mde:
        status = "refuted"
    elif (
        k >= MIN_COMPARISONS
        and parents >= MIN_PARENTS
        and mean + half < 0
        and mean < -worth
        and (deltas < 0).mean() >= MIN_SIGNS
    ):
        status = "proven"
    was = status
    if now - max(e["at"] for e in evidence) >= STALE_AFTER:
        status = "stale"
    return dict(
        status=status,
        was=was,
        k=k,
        parents=parents,
        mean=mean,
        low=mean - half if k > 1 else None,
        high=mean + half if k > 1 else None,
    )


def claims(state: State) -> list[dict]:
    """Every claim with its standing per rung. `proven` without a suffix needs the next rung up as
    well."""
    found = []
    now = len(state.searches())
    rungs = list(state.config["rungs"])
    for number, (claim, evidence) in enumerate(sorted(state.evidence.items()), 1):
        for rung in dict.fromkeys(e["rung"] for e in evidence):
            mine = [e for e in evidence if e["rung"] == rung]
            standing = crystallise(mine, state.noise(rung).sigma, now, rung == "target")
            above = [e for e in evidence if rungs.index(e["rung"]) > rungs.index(rung)]
            held = any(
                e["delta"] < 0 and e["se"] and comparison.stdtr(20, e["delta"] / e["se"]) < 0.1
                for e in above
            )
            label = standing["status"]
            label = f"proven@{rung}" if label == "proven" and not held else label
            found.append(
                standing
                | dict(
                    id=f"P-{number:03d}",
                    claim=claim,
                    skill=mine[0]["skill"],
                    rung=rung,
                    label=label,
                    knobs=mine[-1]["knobs"],
                    held_above=held,
                    experiments=[e["exp"] for e in mine],
                )
            )
    return found


def line_of(c: dict) -> str:
    """One claim as a line of a playbook."""
    moves = ", ".join(f"{n} {a} -> {b}" for n, (a, b) in sorted(c["knobs"].items()))
    interval = f" [{c['low']:+.4f}, {c['high']:+.4f}]" if c["low"] is not None else ""
    return (
        f"{c['id']} {c['label']} (k={c['k']}, parents {c['parents']}): {moves}, delta "
        f"{c['mean']:+.4f}{interval} "
        f"bits per byte on {c['rung']}; evidence {', '.join(c['experiments'])}"
    )


def survivors(state: State) -> dict[str, int]:
    """{skill: moves of its own that a confirmation or an ablation upheld}."""
    found: dict[str, int] = {}
    for x in state.experiments.values():
        v = x.verdict or {}
        if v.get("verdict") == "ablated":
            kept = [f["skill"] for f, e in zip(x.factors, v["effects"]) if e["keep"]]
        else:
            kept = (
                [f["skill"] for f in x.factors]
                if v.get("verdict") == "confirmed" and len(x.factors) == 1
                else []
            )
        for skill in kept:
            found[skill] = found.get(skill, 0) + 1
    return found


def skill_table(state: State, space: Space) -> list[dict]:
    """How every skill did: tries, moves, survivors, gain per try with 95 % interval, failures,
    minutes per 0.001."""
    upheld = survivors(state)
    rows = []
    for arm in sampler.arms(state, space.skills):
        mine = [x for x in state.searches() if x.skill == arm.skill]
        failed = sum(x.verdict["delta"] is None for x in mine)
        gain = sum(c for s, c, _ in sampler.credits(state) if s == arm.skill)
        minutes = arm.minutes * arm.tries
        rows.append(
            dict(
                skill=arm.skill,
                tries=arm.tries,
                moves=arm.wins,
                upheld=upheld.get(arm.skill, 0),
                failed=failed,
                mean=arm.mean,
                low=arm.mean - 1.96 * arm.sd,
                high=arm.mean + 1.96 * arm.sd,
                minutes=round(minutes, 3),
                minutes_per_milli=round(minutes / gain / 1e3, 4) if gain else None,
            )
        )
    return rows


def inert_skills(state: State, skills: list[str]) -> list[str]:
    """Skills that make no difference: the scores of their tries, as differences to the anchor of
    their moment, scatter no more than those of equal configurations (F test against the rung's
    noise, 20 %), and no move of theirs was confirmed on its own. Wins cannot tell: a change that
    does nothing wins single runs too, and interactions of others carry it through an ablation."""
    noise = state.noise(state.config["search"]["rung"])
    proven = {
        x.factors[0]["skill"]
        for x in state.experiments.values()
        if len(x.factors) == 1 and x.verdict and x.verdict["verdict"] == "confirmed"
    }
    found = []
    for skill in skills:
        d = [
            x.verdict["delta"]
            for x in state.searches()
            if x.skill == skill and x.verdict["delta"] is not None
        ]
        if (
            len(d) >= INERT_AFTER
            and skill not in proven
            and fdtrc(len(d) - 1, noise.df, np.var(d, ddof=1) / noise.sigma_d**2) > 0.2
        ):
            found.append(skill)
    return found


def importance(state: State, space: Space) -> dict[str, float]:
    """PED-ANOVA importance of every knob over the search so far; empty while there is too
    little."""
    import optuna

    if len(state.searches()) < NARROW_AFTER:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            study = sampler.study_of(space.knobs, state, optuna.samplers.RandomSampler(seed=0))
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except (ValueError, RuntimeError):
            return {}
    return {n: round(float(v), 4) for n, v in found.items()}


def narrowed(state: State, space: Space, skill: str) -> dict[str, list[float]]:
    """Ranges of a skill's numeric knobs: the middle 80 % of the best quarter of its tries, widened
    by a fifth."""
    tried = [
        (min(s), space.values(x.change))
        for x in state.searches()
        if x.skill == skill and (s := state.scores(x.change, x.rung))
    ]
    if len(tried) < NARROW_AFTER:
        return {}
    best = [values for _, values in sorted(tried, key=lambda t: t[0])[: max(4, len(tried) // 4)]]
    found = {}
    for name, k in space.knobs.items():
        if k.skill == skill and k.kind != "choice":
            x = np.array([float(v[name]) for v in best])
            x = np.log(np.maximum(x, k.low)) if k.log else x
            low, high = np.quantile(x, [0.1, 0.9])
            low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
            low, high = (np.exp(low), np.exp(high)) if k.log else (low, high)
            low, high = max(k.low, float(low)), min(k.high, float(high))
            if high - low > (1 if k.kind == "int" else 1e-6 * abs(high)):
                found[name] = [float(f"{low:.4g}"), float(f"{high:.4g}")]
    return found


def probability_worse(after: tuple[int, int], before: tuple[int, int]) -> float:
    """P(win rate after < win rate before) for (wins, tries) each, with flat priors."""
    grid = np.linspace(0, 1, 2001)
    (wa, na) = after
    (wb, nb) = before
    below = np.diff(betainc(1 + wb, 1 + nb - wb, grid))  # mass of "before" between grid points
    return float((below * betainc(1 + wa, 1 + na - wa, (grid[1:] + grid[:-1]) / 2)).sum())


def rolled_back(skill: str, versions: list[dict], mine: list, text: str) -> dict | None:
    """The version that takes a playbook's ranges back, when its skill wins less often since; None
    when there is no ground for that."""
    last = versions[-1] if versions else {}
    if not last.get("ranges") or last["reason"] == "rollback":
        return None
    won = [x.verdict["verdict"] == "tentative" for x in mine]
    after, before = won[last["at"] :], won[max(0, last["at"] - NARROW_AFTER) : last["at"]]
    worse = probability_worse((sum(after), len(after)), (sum(before), len(before)))
    if len(after) < ROLLBACK_USES or worse <= ROLLBACK_AT:
        return None
    return dict(
        skill=skill,
        version=len(versions) + 1,
        at=len(mine),
        text=text,
        ranges=versions[-2]["ranges"] if len(versions) > 1 else {},
        reason="rollback",
        note=f"{sum(after)} of {len(after)} tries won since version {len(versions)}, "
        f"{sum(before)} of {len(before)} before",
    )


def edits(state: State, space: Space, standing: list[dict]) -> list[dict]:
    """New versions of playbooks: roll-backs first, then new text or ranges. A skill gets a playbook
    with its first proven claim; ranges are narrowed once it was tried often, and not again after
    they had to be taken back."""
    found = []
    for skill in space.skills:
        versions = state.playbooks.get(skill, [])
        tried = [x for x in state.searches() if x.skill == skill]
        claims_of = [c for c in standing if c["skill"] == skill]
        settled = [c for c in claims_of if c["status"] in ("proven", "refuted")]
        text = "\n".join(map(line_of, settled))
        if edit := rolled_back(skill, versions, tried, text):
            found.append(edit)
            continue
        known = (versions[-1]["text"], versions[-1]["ranges"]) if versions else ("", {})
        ranges = known[1]
        proven = any(c["status"] == "proven" for c in claims_of)
        taken_back = any(v["reason"] == "rollback" for v in versions)
        if proven and not ranges and not taken_back:
            ranges = narrowed(state, space, skill)
        if (text, ranges) != known:
            version = dict(skill=skill, version=len(versions) + 1, at=len(tried))
            found.append(version | dict(text=text, ranges=ranges, reason="claims"))
    return found


def summarise(state: State, space: Space, index: int) -> dict[str, Any]:
    """Everything that one pass of the meta-layer finds."""
    table = skill_table(state, space)
    standing = claims(state)
    rungs = sorted({r.rung for r in state.runs.values() if r.score is not None})
    return dict(
        index=index,
        at=len(state.searches()),
        skills=table,
        claims=standing,
        inert=inert_skills(state, space.skills),
        edits=edits(state, space, standing),
        importance=importance(state, space),
        noise={r: list(state.noise(r)) for r in rungs},
        spent_minutes=round(state.minutes(), 3),
    )

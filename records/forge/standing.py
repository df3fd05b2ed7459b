"""Where a campaign stands, as plain values: everything that `status` prints and the report shows is
gathered here from the replayed state, once, and nothing is rendered.
"""

import json
import statistics
from collections import Counter
from typing import Any

import numpy as np

from . import forecasts, skill_review
from .space import CODE, config_id
from .state import Experiment, State
from .view import View


def label(change: dict) -> str:
    """A change in one line."""
    return ", ".join(f"{n}={v}" for n, v in sorted(change.items())) or "the base configuration"


def moved(x: Experiment) -> dict:
    """What an experiment changes of its parent."""
    return {n: v for n, v in x.change.items() if x.parent.get(n) != v}


def gain_of(state: State) -> dict | None:
    """The champion's confirmed gain: the verdict of the last confirmation that changed it."""
    words = ("confirmed", "equal_simpler")  # the second in ledgers of old only
    found = [
        x
        for x in state.experiments.values()
        if x.kind == "confirm" and x.verdict and x.verdict["verdict"] in words
    ]
    return dict(exp=found[-1].id, **found[-1].verdict) if found else None


def gain_in_all(state: State) -> dict | None:
    """The champion against the base on fresh seeds: the closing comparison, or the confirmation if
    that was against the base; None when there was neither."""
    found = []
    for x in state.experiments.values():
        if x.kind in ("confirm", "closing") and not x.parent and x.cid == config_id(state.champion):
            if x.verdict and x.verdict.get("scores_new"):
                found.append(x)
    return dict(exp=found[-1].id, **found[-1].verdict) if found and state.champion else None


def marks(state: State) -> dict[str, str]:
    """{skill: inert or retired} for those that the search leaves alone."""
    inert = state.metas[-1]["inert"] if state.metas else ()
    return dict.fromkeys(inert, "inert") | dict.fromkeys(sorted(state.retired), "retired")


def run_kinds(state: State) -> dict[str, int]:
    """How many runs are waiting, running, or ended with each status."""
    found: Counter = Counter()
    for r in state.runs.values():
        waiting = "running" if r.started else "waiting"
        found[r.record["status"] if r.finished else waiting] += 1
    return dict(found)


def standing(view: View) -> dict[str, Any]:
    """Where a campaign stands, for people and programs."""
    state = view.state
    rung = view.rung
    named = dict(base={}, anchor=state.anchor, champion=state.champion)
    means = {}
    for name, change in named.items():
        scores = state.scores(change, rung)
        means[name] = statistics.mean(scores) if scores else None
    return dict(
        name=view.name,
        stopped=state.stopped,
        spent=view.spent(),
        budget=view.config["budget"],
        runs=run_kinds(state),
        slots={r.key: r.slots for r in view.running() if r.slots},
        rung=rung,
        scores=means,
        anchor=state.anchor,
        champion=state.champion,
        confirmed=gain_of(state),
        in_all=gain_in_all(state),
        forecasts=forecasts.calibration(state),
        noise=list(state.noise(rung)),
        skills=skill_review.skill_table(state, view.space) if state.searches() else [],
        inert=state.metas[-1]["inert"] if state.metas else [],
        retired=sorted(state.retired),
        prior=state.prior,
        marks=marks(state),
        claims=skill_review.claims(state),
    )


# ---- The report's tables -------------------------------------------------------------------------
def failures(state: State) -> list[list]:
    """[status, reason, runs] of every way in which runs failed, tampered ones first."""
    found: dict[tuple, list] = {}
    for r in state.runs.values():
        if r.finished and r.record["status"] not in ("ok", "pruned"):
            status, reason = r.record["status"], r.record["reason"][:160]
            found.setdefault((status != "tampered", status, reason), []).append(r.key)
    return [[k[1], k[2], " ".join(v)] for k, v in sorted(found.items())]


def what_happened(x: Experiment, delta: float | None, sigma: float) -> str:
    """How an idea that did not work ended."""
    reason = x.verdict["reason"]
    if x.kind != "search" or delta is None or reason.startswith("pruned"):
        return reason
    if delta < 0:
        return "ahead, but not by enough"
    return "within the noise" if delta < 2 * sigma else "clearly worse"


def failed_ideas(view: View) -> list[dict]:
    """What did not work, claims that fell on fresh seeds first, then failed runs, then the
    worst."""
    rows = []
    for x in view.state.experiments.values():
        if not x.verdict or x.verdict["verdict"] not in ("reject", "refuted", "not upheld"):
            continue
        old, new = view.space.values(x.parent), view.space.values(x.change)
        delta = x.verdict.get("delta")
        sigma = x.verdict.get("sigma") or view.state.noise(x.rung).sigma
        row = dict(
            change=label({n: f"{old[n]} -> {v}" for n, v in new.items() if old[n] != v}),
            skill=x.skill or x.kind,
            delta=delta,
            sigmas=None if delta is None else delta / sigma,
            how=what_happened(x, delta, sigma),
            id=x.id,
        )
        claim = x.kind in ("confirm", "closing")
        rows.append((not claim, delta is not None, -(delta or 0.0), row))
    return [row for *_, row in sorted(rows, key=lambda r: r[:3])]


def experiments(state: State) -> list[dict]:
    """Every experiment as a row."""
    keys: dict[str, list] = {}
    for r in state.runs.values():
        keys.setdefault(r.exp, []).append(r.key)
    rows = []
    for x in state.experiments.values():
        v = x.verdict or dict(verdict="open", reason="")
        rows.append(
            dict(
                id=x.id,
                kind=x.kind,
                skill=x.skill,
                source=x.source,
                verdict=v["verdict"],
                delta=v.get("delta"),
                reason=v["reason"],
                change=label(moved(x)),
                runs=" ".join(keys.get(x.id, ())),
            )
        )
    return rows


def pairs(state: State) -> list[dict]:
    """Every 2x2 that was judged."""
    return [
        dict(
            id=x.id,
            claims=[f["claim"] for f in x.factors],
            delta=x.verdict.get("delta"),
            reason=x.verdict["reason"],
        )
        for x in state.experiments.values()
        if x.kind == "pair" and x.verdict
    ]


# ---- The report's pictures -----------------------------------------------------------------------
def progress(view: View) -> dict[str, Any]:
    """Every try, the anchor's stairs, and the bands of base and champion, on the search's rung."""
    state = view.state
    rung = view.rung
    points, stairs = [], []
    anchor: dict = {}
    for i, x in enumerate(state.searches(), 1):
        if scores := state.scores(x.change, rung):
            points.append((i, statistics.mean(scores)))
        anchor = x.verdict.get("anchor_after", anchor)
        if scores := state.scores(anchor, rung):
            stairs.append((i, statistics.mean(scores)))
    sigma = state.noise(rung).sigma
    bands = {}
    for name, change in (("base", {}), ("champion (confirmed)", state.champion)):
        scores = state.scores(change, rung)
        if scores and (change or name == "base"):
            bands[name] = (statistics.mean(scores), 2 * sigma / len(scores) ** 0.5)
    return dict(points=points, stairs=stairs, bands=bands, sigma=sigma)


def noise_groups(state: State) -> dict[str, dict]:
    """{rung: distances of scores from their configuration's mean, and one pooled sigma}."""
    groups: dict[tuple, list] = {}
    for (cid, rung, _), r in state.by_place.items():
        if r.score is not None:
            groups.setdefault((rung, cid), []).append(r.score)
    found = {}
    for rung in sorted({g[0] for g in groups}):
        gaps = []
        for (where, _), scores in groups.items():
            if where == rung and len(scores) > 1:
                gaps += list(np.array(scores) - statistics.mean(scores))
        found[rung] = dict(gaps=gaps, sigma=state.noise(rung).sigma)
    return found


def minutes_spent(state: State) -> dict[str, float]:
    """Device minutes by skill, or by kind of experiment where no skill is behind it."""
    spent: Counter = Counter()
    for r in state.runs.values():
        if r.finished:
            x = state.experiments[r.exp]
            spent[x.skill or x.kind] += r.record["wall_s"] / 60
    return dict(spent)


def curves(view: View) -> dict[str, list]:
    """{name: [step, nats]} of one run each of base, anchor and champion, as their folders say."""
    state = view.state
    rung = view.rung
    scored = [r for r in state.runs.values() if r.score is not None and r.rung == rung]
    found = {}
    for name, change in (("base", {}), ("anchor", state.anchor), ("champion", state.champion)):
        run = next((r for r in scored if r.cid == config_id(change)), None)
        path = view.folder / "runs" / (run.key if run else "none") / "metrics.json"
        if path.exists():
            losses = json.loads(path.read_text("utf-8"))["losses"]
            found |= {name: losses} if losses else {}
    return found


def everything(view: View) -> dict[str, Any]:
    """All that the report shows."""
    state = view.state
    scored = [r for r in state.runs.values() if r.score is not None]
    found = standing(view)
    best = found["in_all"] or found["confirmed"]
    longer = None
    if best:
        where = state.experiments[best["exp"]].rung
        base = max(1e-9, state.expected_seconds(where, {}))
        longer = state.expected_seconds(where, state.champion) / base
    return found | dict(
        base=view.config["base"],
        patched=CODE in state.champion,
        rung_table=view.config["rungs"][view.rung],
        reference=state.reference.get(view.rung, {}),
        longer=longer,
        failures=failures(state),
        searched=bool(state.searches()),
        failed_ideas=failed_ideas(view),
        progress=progress(view),
        pairs=pairs(state),
        transfers=forecasts.report(state, view.space),
        sizes=[(r.record["artifact_bytes"], r.score) for r in scored if r.record["artifact_bytes"]],
        noise_groups=noise_groups(state),
        minutes=minutes_spent(state),
        curves=curves(view),
        forecast_rows=[(r.forecast, r.score) for r in scored if r.forecast],
        forecast_any=any(r.forecast for r in state.runs.values()),
        importance=state.metas[-1]["importance"] if state.metas else {},
        experiments=experiments(state),
        refused=state.refused[-50:],
        agent_failures=[c for c in state.agent_calls if not c["ok"]][-20:],
    )

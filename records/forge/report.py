"""What people read: one self-contained HTML page (plots embedded as SVG, nothing loaded from elsewhere), a table of
runs, a heartbeat, and the skills' evidence and playbooks. All of it is rendered from the state and can be thrown away.
"""

import html
import io
import json
import statistics
import time
from typing import Any

import numpy as np

from . import forecasts, skill_review
from .ledger import now, write_atomic
from .space import config_id

FORECAST_NOTE = (
    "Halfway, the end of a run is foretold from its training loss; {cut} without prospects were ended there. Of the "
    "last {n} forecasts that met their score, {covered:.0%} covered it (90 % intervals); below 75 % no run is ended. "
    "What confirms is never cut short."
)
SKILL_HEAD = [
    "skill",
    "tries",
    "moved the anchor",
    "upheld",
    "failed",
    "gain per try",
    "from",
    "to (95 %)",
    "minutes",
    "minutes per 0.001",
]
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 13px; width: 100%; } td, th { text-align: left; padding: .15rem .5rem;
border-bottom: 1px solid var(--soft); vertical-align: top; } th { cursor: pointer; } code { font-size: 12px; }
figure { margin: .5rem 0; background: #fff; border-radius: 6px; } figure svg { width: 100%; height: auto; }
.big { font-size: 1.15rem; } .bad { color: #c33; } .muted { opacity: .7; }
"""
SORT = """
for (const th of document.querySelectorAll('th')) th.onclick = () => {
  const i = [...th.parentNode.children].indexOf(th), body = th.closest('table').tBodies[0];
  const key = r => { const t = r.children[i].innerText, n = parseFloat(t); return isNaN(n) ? t : n; };
  const rows = [...body.rows].sort((a, b) => key(a) > key(b) ? 1 : -1);
  if (th.dataset.up) rows.reverse(); th.dataset.up = th.dataset.up ? '' : '1'; body.append(...rows);
};
"""


def label(change: dict) -> str:
    """A change in one line."""
    return ", ".join(f"{n}={v}" for n, v in sorted(change.items())) or "the base configuration"


def gain_of(state) -> dict | None:
    """The champion's confirmed gain: the verdict of the last confirmation that changed it."""
    found = [
        x
        for x in state.experiments.values()
        if x.kind == "confirm"
        and x.verdict
        and x.verdict["verdict"] in ("confirmed", "equal_simpler")
    ]  # the second in ledgers of old only
    return dict(exp=found[-1].id, **found[-1].verdict) if found else None


def gain_in_all(state) -> dict | None:
    """The champion against the base on fresh seeds: the closing comparison, or the confirmation if that was against the
    base; None when there was neither."""
    found = [
        x
        for x in state.experiments.values()
        if x.kind in ("confirm", "closing")
        and not x.parent
        and x.verdict
        and x.verdict.get("scores_new")
        and x.cid == config_id(state.champion)
    ]
    return dict(exp=found[-1].id, **found[-1].verdict) if found and state.champion else None


def summary(c) -> dict[str, Any]:
    """Where a campaign stands, for people and programs."""
    state, rung = c.state, c.config["search"]["rung"]
    kinds: dict[str, int] = {}
    for r in state.runs.values():
        kind = r.record["status"] if r.finished else "running" if r.started else "waiting"
        kinds[kind] = kinds.get(kind, 0) + 1
    means = {
        n: statistics.mean(s) if (s := state.scores(ch, rung)) else None
        for n, ch in (("base", {}), ("anchor", state.anchor), ("champion", state.champion))
    }
    return dict(
        name=c.folder.name,
        stopped=state.stopped,
        spent=c.spent(),
        budget=c.config["budget"],
        runs=kinds,
        rung=rung,
        scores=means,
        anchor=state.anchor,
        champion=state.champion,
        confirmed=gain_of(state),
        in_all=gain_in_all(state),
        forecasts=forecasts.calibration(state),
        noise=list(state.noise(rung)),
        skills=skill_review.skill_table(state, c.space) if state.searches() else [],
        inert=state.metas[-1]["inert"] if state.metas else [],
        retired=sorted(state.retired),
        prior=state.prior,
        marks=marks(state),
        claims=skill_review.claims(state),
    )


def marks(state) -> dict[str, str]:
    """{skill: inert or retired} for those that the search leaves alone."""
    return dict.fromkeys(state.metas[-1]["inert"] if state.metas else (), "inert") | dict.fromkeys(
        sorted(state.retired), "retired"
    )


def summary_text(d: dict) -> str:
    """The same in a few lines."""
    lines = [
        f"{d['name']}: {d['spent']['experiments']} of {d['budget']['experiments']} experiments, "
        f"{d['spent']['minutes']:.1f} device minutes; runs "
        + ", ".join(f"{k} {v}" for k, v in d["runs"].items())
    ]
    shown = {k: f"{v:.4f}" if v is not None else "?" for k, v in d["scores"].items()}
    lines.append(
        f"base {shown['base']}, anchor {shown['anchor']}, champion {shown['champion']} bits per byte on "
        f"{d['rung']}; noise {d['noise'][0]:.4f} ({d['noise'][1]:.0f} degrees of freedom)"
    )
    found = d["confirmed"]
    lines.append(
        "champion: "
        + label(d["champion"])
        + (
            f"; confirmed {found['delta']:+.4f} [{found['ci95'][0]:+.4f}, {found['ci95'][1]:+.4f}] on fresh seeds"
            if found
            else "; nothing is confirmed yet"
        )
    )
    if d["in_all"]:
        lines.append(
            "against the base, on fresh seeds: {:+.4f} [{:+.4f}, {:+.4f}]".format(
                d["in_all"]["delta"], *d["in_all"]["ci95"]
            )
        )
    lines += ["anchor: " + label(d["anchor"])] + (
        [f"stopped: {d['stopped']}"] if d["stopped"] else []
    )
    return "\n".join(lines) + ("\n\n" + skill_text(d["skills"], d["marks"]) if d["skills"] else "")


def skill_text(rows: list[dict], marks: dict[str, str]) -> str:
    """The skill table as text."""
    lines = [
        f"{'skill':<24} tries moves upheld failed  gain per try [95 %]            minutes per 0.001"
    ]
    for r in rows:
        per = f"{r['minutes_per_milli']:.3g}" if r["minutes_per_milli"] is not None else "-"
        lines.append(
            f"{r['skill']:<24} {r['tries']:>5} {r['moves']:>5} {r['upheld']:>6} {r['failed']:>6}  "
            f"{r['mean']:.5f} [{r['low']:+.5f}, {r['high']:+.5f}]  {per}"
            + f"  {marks.get(r['skill'], '')}".rstrip()
        )
    return "\n".join(lines)


def news(c, since: int) -> list[str]:
    """What happened after event number `since`, one line per verdict, with progress and time left."""
    found = []
    for e in c.ledger.read()[since:]:
        if e["event"] == "judged":
            x = c.state.experiments[e["exp"]]
            done, all_ = len(c.state.searches()), c.config["budget"]["experiments"]
            seconds = c.state.expected_seconds(c.config["search"]["rung"])
            left = max(0, all_ - done) * seconds / 60 / c.config["loop"]["workers"]
            found.append(
                f"{x.id} {x.kind:<9} {x.verdict['verdict']:<10} {x.skill or '-':<22} "
                f"{x.verdict['reason'][:80]}   [{done}/{all_}, about {left:.0f} min left]"
            )
        elif e["event"] == "refused":
            found.append(f"refused: {e['proposal']['reason'][:100]}")
        elif e["event"] == "meta":
            found.append(
                f"meta {e['meta']['index']}: "
                + ", ".join(f"{r['skill']} {r['moves']}/{r['tries']}" for r in e["meta"]["skills"])
            )
    return found


# ---- Plots -----------------------------------------------------------------------------------------------------------
def svg(draw, width: float = 9, height: float = 3.2) -> str:
    """One matplotlib figure as SVG text; the same data, the same text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "forge", "font.size": 9, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    try:
        draw(axis)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    finally:
        plt.close(figure)
    return "<figure>" + out.getvalue()[out.getvalue().index("<svg") :] + "</figure>"


def plot_progress(c):
    """Every run, the anchor's stairs and the champion's band."""

    def draw(axis):
        state, rung = c.state, c.config["search"]["rung"]
        points = [
            (i, statistics.mean(s))
            for i, x in enumerate(state.searches(), 1)
            if (s := state.scores(x.change, rung))
        ]
        if points:
            axis.scatter(*zip(*points), s=12, color="0.6", label="tried once")
        anchor, stairs = {}, []
        for i, x in enumerate(state.searches(), 1):
            anchor = x.verdict.get("anchor_after", anchor)
            if s := state.scores(anchor, rung):
                stairs.append((i, statistics.mean(s)))
        if stairs:
            axis.step(*zip(*stairs), where="post", color="tab:blue", label="anchor (may be luck)")
        sigma = state.noise(rung).sigma
        for change, name, color in (
            ({}, "base", "tab:gray"),
            (state.champion, "champion (confirmed)", "tab:green"),
        ):
            s = state.scores(change, rung)
            if s and (change or name == "base"):
                m, half = statistics.mean(s), 2 * sigma / len(s) ** 0.5
                axis.axhspan(m - half, m + half, color=color, alpha=0.2)
                axis.axhline(m, color=color, linewidth=1, label=name)
        values = [p[1] for p in points] or [1]
        middle = float(np.quantile(values, 0.8))
        axis.set_ylim(
            min(values) - 4 * sigma, max(middle, *[p[1] for p in stairs] or [middle]) + 8 * sigma
        )
        axis.set(xlabel="experiment", ylabel="bits per byte")
        axis.legend(loc="upper right", fontsize=8)

    return svg(draw)


def plot_skills(c):
    """Posterior mean credit of each skill with its 95 % interval."""

    def draw(axis):
        rows = skill_review.skill_table(c.state, c.space)
        axis.barh(
            [r["skill"] for r in rows],
            [r["mean"] for r in rows],
            color="tab:blue",
            alpha=0.6,
            xerr=[[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]],
            ecolor="0.3",
        )
        axis.set(xlabel="gain per try, bits per byte (posterior, 95 %)")

    return svg(draw, height=0.8 + 0.3 * len(c.space.skills))


def plot_bytes(c):
    """Score against size, with the budget."""

    def draw(axis):
        rows = [
            (r.record["artifact_bytes"], r.score)
            for r in c.state.runs.values()
            if r.score is not None and r.record["artifact_bytes"]
        ]
        if rows:
            axis.scatter([b / 1e6 for b, _ in rows], [y for _, y in rows], s=10, color="tab:purple")
        axis.axvline(c.config["budget"]["artifact_bytes"] / 1e6, color="tab:red", linewidth=1)
        axis.set(xlabel="artifact, million bytes (line: the budget)", ylabel="bits per byte")

    return svg(draw, height=2.6)


def plot_noise(c):
    """Scores of every configuration that ran on several seeds, about their mean."""

    def draw(axis):
        groups: dict[tuple, list] = {}
        for (cid, rung, _), r in c.state.by_place.items():
            if r.score is not None:
                groups.setdefault((rung, cid), []).append(r.score)
        rungs = sorted({g[0] for g in groups})
        for i, rung in enumerate(rungs):
            gaps = [
                y - statistics.mean(ys)
                for (g, _), ys in groups.items()
                if g == rung and len(ys) > 1
                for y in ys
            ]
            axis.scatter(gaps, [i] * len(gaps), s=10, alpha=0.6)
            sigma = c.state.noise(rung).sigma
            axis.errorbar([0], [i + 0.2], xerr=[sigma], color="tab:red", capsize=3)
        axis.set(
            yticks=range(len(rungs)),
            yticklabels=rungs,
            xlabel="score minus its configuration's mean (red: one sigma, pooled)",
            ylim=(-0.6, len(rungs) - 0.2),
        )

    return svg(draw, height=1.2 + 0.4 * len(c.state.reference))


def plot_transfer(rows: list[dict]):
    """Rung against rung for all classes."""
    row = next((r for r in rows if r["klass"] == "all" and r["points"]), None)

    def draw(axis):
        axis.scatter(*zip(*row["points"]), s=14)
        axis.set(xlabel=f"bits per byte on {row['lower']}", ylabel=f"on {row['upper']}")

    return svg(draw, 4.5, 3.2) if row else ""


def plot_time(c):
    """Device minutes per skill and kind of experiment."""

    def draw(axis):
        spent: dict[str, float] = {}
        for r in c.state.runs.values():
            if r.finished:
                x = c.state.experiments[r.exp]
                name = x.skill or x.kind
                spent[name] = spent.get(name, 0) + r.record["wall_s"] / 60
        order = sorted(spent, key=spent.get)
        axis.barh(order, [spent[n] for n in order], color="tab:orange", alpha=0.7)
        axis.set(xlabel="device minutes")

    return svg(draw, height=1 + 0.25 * len(c.space.skills))


def plot_curves(c):
    """Training losses of the base, the anchor and the champion."""

    def draw(axis):
        state, rung = c.state, c.config["search"]["rung"]
        for name, change in (("base", {}), ("anchor", state.anchor), ("champion", state.champion)):
            run = next(
                (
                    r
                    for r in state.runs.values()
                    if r.score is not None and r.rung == rung and r.cid == config_id(change)
                ),
                None,
            )
            path = c.folder / "runs" / (run.key if run else "none") / "metrics.json"
            if path.exists() and (losses := json.loads(path.read_text())["losses"]):
                axis.plot(*zip(*losses), label=name, linewidth=1)
        axis.set(xlabel="step", ylabel="training loss, nats", yscale="log")
        if axis.lines:
            axis.legend(fontsize=8)

    return svg(draw, height=2.6)


def plot_forecasts(c):
    """Score against forecast with its interval."""

    def draw(axis):
        rows = [
            (r.forecast, r.score)
            for r in c.state.runs.values()
            if r.forecast and r.score is not None
        ]
        for f, y in rows:
            axis.errorbar(
                f["middle"],
                y,
                xerr=[[f["middle"] - f["low"]], [f["high"] - f["middle"]]],
                fmt="o",
                markersize=3,
                color="tab:blue",
                ecolor="0.7",
            )
        if rows:
            axis.axline((rows[0][1], rows[0][1]), slope=1, color="0.4", linewidth=0.8)
        axis.set(xlabel="forecast halfway, bits per byte (90 %)", ylabel="score")

    return svg(draw, 4.5, 3.2)


def plot_importance(found: dict[str, float]):
    """Knobs by PED-ANOVA importance."""

    def draw(axis):
        names = sorted(found, key=found.get)[-15:]
        axis.barh(names, [found[n] for n in names], color="tab:cyan")
        axis.set(xlabel="share of the difference between good and other tries (PED-ANOVA)")

    return svg(draw, height=1 + 0.22 * min(15, len(found)))


# ---- The page --------------------------------------------------------------------------------------------------------
def table(head: list[str], rows: list[list]) -> str:
    """An HTML table; every cell is escaped."""
    cell = lambda v: html.escape(
        "" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v)
    )  # noqa: E731
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in rows)
    return (
        "<table><thead><tr>"
        + "".join(f"<th>{html.escape(h)}</th>" for h in head)
        + f"</tr></thead><tbody>{body}</tbody></table>"
    )


def setting(c, d: dict) -> str:
    """What was done, for a reader who has seen nothing else."""
    state, rung = c.state, c.config["rungs"][d["rung"]]
    base = ", ".join(
        f"{n}={v}"
        for n, v in c.config["base"].items()
        if n not in ("CHECKPOINT_EVERY", "STRICT_ENV")
    )
    own = ", ".join(
        f"{n}={v}"
        for n, v in rung.get("env", {}).items()
        if not (rung.get("tokens") and n == "MAX_WALLCLOCK_SECONDS")
    )
    val, host = ((state.reference.get(d["rung"]) or {}).get(k) for k in ("val", "host"))
    length = f"{rung['tokens']:,} training tokens" if rung.get("tokens") else "its own limits"
    text = (
        f"A score is bits per byte of validation text; lower is better. The campaign began at the base "
        f"configuration <code>{html.escape(base)}</code> and tried {d['spent']['experiments']} changes on the rung "
        f"<i>{html.escape(d['rung'])}</i>: every run there ends after {length}"
        + (f", with <code>{html.escape(own)}</code>" if own else "")
        + ". "
    )
    if val and val[0]:
        text += f"Every run is scored on the same {val[0]:,} tokens ({val[1]:,} bytes), on {html.escape(host)}. "
    return (
        f"<p>{text}From seed to seed the score of one configuration varies by {d['noise'][0]:.4f} (standard "
        "deviation), so one better run proves nothing: a claim must hold on seeds that no decision has seen.</p>"
    )


def headline(c, d: dict) -> str:
    """What the campaign may claim, in a few sentences."""
    state, found, base = c.state, d["in_all"] or d["confirmed"], d["scores"]["base"]
    claim = "Nothing is confirmed: what the search found may be luck. "
    if found:
        (low, high), n = found["ci95"], len(found["seeds_used"])
        against = "the base configuration" if d["in_all"] else "the champion before it"
        where = state.experiments[found["exp"]].rung
        longer = state.expected_seconds(where, state.champion) / max(
            1e-9, state.expected_seconds(where, {})
        )
        claim = (
            f"scores <b>{-found['delta']:.4f}</b> bits per byte less than {against} (95 % interval {-high:.4f} to "
            f"{-low:.4f}, one-sided p {found['p']:.2g}), on {n} + {n} runs with fresh seeds ({found['exp']}). "
            f"A run of it takes {longer:.2f} times as long. "
        )
    return (
        f"<p class=big>{html.escape(label(state.champion))}</p><p>{claim}The base scores "
        f"{base if base is not None else float('nan'):.4f}.</p>"
    )


def failures_of_ideas(c) -> list[list]:
    """What did not work: [change, skill, difference, in sigmas, how it ended, experiment], claims that fell on fresh
    seeds first, then the worst."""
    rows = []
    for x in c.state.experiments.values():
        v = x.verdict or {}
        if v.get("verdict") not in ("reject", "refuted", "not upheld"):
            continue
        change = label(
            {
                n: f"{c.space.values(x.parent).get(n, '-')} -> {w}"
                for n, w in c.space.values(x.change).items()
                if c.space.values(x.parent)[n] != w
            }
        )
        sigma, delta = v.get("sigma") or c.state.noise(x.rung).sigma, v.get("delta")
        how = (
            v["reason"]
            if x.kind != "search" or delta is None or v["reason"].startswith("pruned")
            else (
                "ahead, but not by enough"
                if delta < 0
                else "within the noise"
                if delta < 2 * sigma
                else "clearly worse"
            )
        )
        rows.append(
            [
                change,
                x.skill or x.kind,
                delta,
                delta / sigma if delta is not None else None,
                how,
                x.id,
            ]
        )
    return sorted(
        rows,
        key=lambda r: (r[1] not in ("confirm", "closing"), -(r[2] if r[2] is not None else 1e9)),
    )


def experiment_rows(state) -> list[list]:
    """Every experiment as a row of the last table."""
    return [
        [
            x.id,
            x.kind,
            x.skill,
            x.source,
            (x.verdict or {}).get("verdict", "open"),
            (x.verdict or {}).get("delta"),
            (x.verdict or {}).get("reason", ""),
            label({n: v for n, v in x.change.items() if x.parent.get(n) != v}),
            " ".join(r.key for r in state.runs.values() if r.exp == x.id),
        ]
        for x in state.experiments.values()
    ]


def page(c) -> str:
    """The whole report."""
    state, d = c.state, summary(c)
    transfers, failures = forecasts.report(state, c.space), {}
    for r in state.runs.values():
        if r.finished and r.record["status"] not in ("ok", "pruned"):
            failures.setdefault(
                (r.record["status"] != "tampered", r.record["status"], r.record["reason"][:160]), []
            ).append(r.key)
    stand = summary_text(d).splitlines()[0] + (
        f" · stopped: {state.stopped}" if state.stopped else ""
    )
    parts = [
        f"<h1>{html.escape(d['name'])}</h1><p class=muted>{now()} · {html.escape(stand)}</p><h2>Champion</h2>",
        headline(c, d),
        setting(c, d),
    ]

    def section(title: str, *body: str, note: str = ""):
        parts.append(
            f"<h2>{title}</h2>" + (f"<p class=muted>{note}</p>" if note else "") + "".join(body)
        )

    if failures:
        section(
            "Failures",
            table(
                ["status", "reason", "runs"],
                [[k[1], k[2], " ".join(v)] for k, v in sorted(failures.items())],
            ),
            note="Tampered runs first: their numbers did not survive the checks.",
        )
    section(
        "Progress",
        plot_progress(c),
        note="Grey dots are single runs. The blue line is where the search stands; "
        "it may follow luck. Only the green line survived fresh seeds.",
    )
    if state.searches():
        section(
            "What did not work",
            table(
                ["change", "skill", "difference", "in sigmas", "what happened", "id"],
                failures_of_ideas(c),
            ),
            note="Against the anchor of the moment, most by a single run: a change that is only a little worse "
            "here may be worth nothing or a little. Claims that fell on fresh seeds come first, then failed runs.",
        )
        section(
            "Skills",
            table(SKILL_HEAD, [list(r.values()) for r in d["skills"]]),
            plot_skills(c),
            note="A skill is a group of knobs with notes on them. With few experiments this ranking is a tendency: "
            "read the intervals. Inert: "
            + (", ".join(d["inert"]) or "none so far")
            + ". Retired: "
            + (", ".join(d["retired"]) or "none")
            + "."
            + (
                " Records of others speak for and against "
                + ", ".join(f"{s} {a:g}:{b:g}" for s, (a, b) in sorted(d["prior"].items()))
                + "; their weight falls with every "
                "try of one's own."
                if d["prior"]
                else ""
            ),
        )
    section(
        "Claims",
        table(
            ["id", "standing", "claim", "k", "parents", "mean", "low", "high", "rung", "evidence"],
            [
                [
                    r["id"],
                    r["label"],
                    r["claim"],
                    r["k"],
                    r["parents"],
                    r["mean"],
                    r["low"],
                    r["high"],
                    r["rung"],
                    " ".join(r["experiments"]),
                ]
                for r in d["claims"]
            ],
        )
        if d["claims"]
        else "<p>None yet.</p>",
        note="A claim is proven by three comparisons on two parents with an upper bound below zero.",
    )
    pairs = [x for x in state.experiments.values() if x.kind == "pair" and x.verdict]
    if pairs:
        section(
            "Pairs",
            table(
                ["id", "one change", "the other", "beyond their sum", "verdict"],
                [
                    [
                        x.id,
                        *(f["claim"] for f in x.factors),
                        x.verdict.get("delta"),
                        x.verdict["reason"],
                    ]
                    for x in pairs
                ],
            ),
            note="Two changes that an ablation suspected of helping or harming each other, in a 2x2 on fresh seeds. "
            "They interact when the 95 % interval excludes zero.",
        )
    if transfers:
        head = ["from", "to", "class", "n", "verdict", "tau", "low", "high", "regret"]
        section(
            "Transfer between rungs",
            table(
                head,
                [
                    [
                        r["lower"],
                        r["upper"],
                        r["klass"],
                        r["n"],
                        r["word"],
                        r.get("tau"),
                        r.get("low"),
                        r.get("high"),
                        r.get("regret"),
                    ]
                    for r in transfers
                ],
            ),
            plot_transfer(transfers),
        )
    section("Size", plot_bytes(c))
    section("Learning curves", plot_curves(c))
    section("Noise", plot_noise(c))
    section(
        "Where the time went",
        plot_time(c),
        table(
            ["budget", "used", "limit"],
            [
                ["experiments", d["spent"]["experiments"], d["budget"]["experiments"]],
                [
                    "device minutes",
                    round(d["spent"]["minutes"], 2),
                    d["budget"]["minutes"] or "none",
                ],
                ["runs", d["spent"]["runs"], d["budget"]["runs"] or "none"],
                ["agent calls", d["spent"]["agent_calls"], d["budget"]["agent_calls"]],
            ],
        ),
    )
    if any(r.forecast for r in state.runs.values()):
        (n, covered), cut = (
            d["forecasts"],
            sum(r.record["status"] == "pruned" for r in state.runs.values() if r.record),
        )
        section(
            "Forecasts", plot_forecasts(c), note=FORECAST_NOTE.format(cut=cut, n=n, covered=covered)
        )
    if state.metas and state.metas[-1]["importance"]:
        section("Which knobs matter", plot_importance(state.metas[-1]["importance"]))
    section(
        "Experiments",
        table(
            ["id", "kind", "skill", "source", "verdict", "delta", "reason", "change", "runs"],
            experiment_rows(state),
        ),
        note="Repeat a run: <code>forge.py replay CAMPAIGN RUN</code>. Click a heading to sort.",
    )
    if state.refused:
        section(
            "Refused before they started",
            table(
                ["skill", "reason", "change"],
                [
                    [p.get("skill", ""), p["reason"], label(p["change"])]
                    for p in state.refused[-50:]
                ],
            ),
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(d['name'])}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + f"<script>{SORT}</script></body></html>"
    )


def publish(c, quick: bool = False):
    """Write heartbeat, results.tsv, skills and report; `quick` leaves the report out if it is younger than a minute."""
    state = c.state
    running = [dict(key=r.key, rung=r.rung) for r in c.running()]
    write_atomic(
        c.folder / "heartbeat.json",
        json.dumps(
            c.spent()
            | dict(time=now(), events=state.events, running=running, stopped=state.stopped)
        ),
    )
    lines = ["key\texp\trung\tseed\tstatus\tval_bpb\tseconds\tchange"]
    lines += [
        "\t".join(
            map(
                str,
                (
                    r.key,
                    r.exp,
                    r.rung,
                    r.seed,
                    r.record["status"],
                    r.score,
                    r.record["wall_s"],
                    label(r.change),
                ),
            )
        )
        for r in state.runs.values()
        if r.finished
    ]
    write_atomic(c.folder / "results.tsv", "\n".join(lines) + "\n")
    write_skills(c)
    target = c.folder / "report.html"
    if (
        not (quick and target.exists() and time.time() - target.stat().st_mtime < 60)
        and state.reference
    ):
        write_atomic(target, page(c))


def write_skills(c):
    """Evidence and playbook of every skill that has some, from the state alone; meta/<index>.json for each pass."""
    state = c.state
    by_skill: dict[str, list] = {}
    for evidence in state.evidence.values():
        for e in evidence:
            by_skill.setdefault(e["skill"], []).append(e)
    for skill, evidence in by_skill.items():
        folder = c.folder / "skills" / skill
        if folder.is_dir():
            write_atomic(folder / "assets" / "evidence.json", json.dumps(evidence, indent=1))
    for skill, versions in state.playbooks.items():
        folder = c.folder / "skills" / skill / "references"
        folder.mkdir(parents=True, exist_ok=True)
        v = versions[-1]
        ranges = "\n".join(f"- search {n} in {a} to {b}" for n, (a, b) in v["ranges"].items())
        write_atomic(
            folder / "playbook.md",
            f"# Playbook of {skill}, version {v['version']} ({v['reason']})\n\n"
            f"{v['text']}\n\n{ranges}\n",
        )
        for old in versions[:-1]:
            history = c.folder / "skills_history"
            history.mkdir(exist_ok=True)
            path = history / f"{skill}-{old['version']}.json"
            if not path.exists():
                write_atomic(path, json.dumps(old, indent=1))
    folder = c.folder / "meta"
    for m in state.metas:
        path = folder / f"{m['index']:04d}.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(m, indent=1))

"""What people read: one self-contained HTML page, pictures embedded as SVG, nothing loaded from
elsewhere. Everything here renders the plain values that standing.py gathers.
"""

import html
import io

import numpy as np

from .ledger import now
from .standing import label

FORECAST_NOTE = (
    "Halfway, the end of a run is foretold from its training loss; {cut} without prospects were "
    "ended there. Of the last {n} forecasts that met their score, {covered:.0%} covered it (90 % "
    "intervals); below 75 % no run is ended. What confirms is never cut short."
)
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto;
padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
td, th { text-align: left; padding: .15rem .5rem; border-bottom: 1px solid var(--soft);
vertical-align: top; } th { cursor: pointer; } code { font-size: 12px; }
figure { margin: .5rem 0; background: #fff; border-radius: 6px; }
figure svg { width: 100%; height: auto; }
.big { font-size: 1.15rem; } .bad { color: #c33; } .muted { opacity: .7; }
"""
SORT = """
for (const th of document.querySelectorAll('th')) th.onclick = () => {
  const i = [...th.parentNode.children].indexOf(th), body = th.closest('table').tBodies[0];
  const key = r => { const t = r.children[i].innerText, n = parseFloat(t);
                     return isNaN(n) ? t : n; };
  const rows = [...body.rows].sort((a, b) => key(a) > key(b) ? 1 : -1);
  if (th.dataset.up) rows.reverse(); th.dataset.up = th.dataset.up ? '' : '1'; body.append(...rows);
};
"""


# ---- Words ---------------------------------------------------------------------------------------
def bpb(value: float | None) -> str:
    """A score: four digits behind the point are what seeds can tell apart."""
    return "" if value is None else f"{value:.4f}"


def difference(value: float | None, digits: int = 4) -> str:
    """A difference with its sign."""
    return "" if value is None else f"{value:+.{digits}f}"


def standing_text(d: dict) -> str:
    """Where a campaign stands, in a few lines."""
    kinds = ", ".join(f"{k} {v}" for k, v in d["runs"].items())
    lines = [
        f"{d['name']}: {d['spent']['experiments']} of {d['budget']['experiments']} experiments, "
        f"{d['spent']['minutes']:.1f} device minutes; runs {kinds}"
    ]
    shown = {k: bpb(v) or "?" for k, v in d["scores"].items()}
    lines.append(
        f"base {shown['base']}, anchor {shown['anchor']}, champion {shown['champion']} bits per "
        f"byte on {d['rung']}; noise {d['noise'][0]:.4f} ({d['noise'][1]:.0f} degrees of freedom)"
    )
    found = "; nothing is confirmed yet"
    if d["confirmed"]:
        found = "; confirmed {} [{}, {}] on fresh seeds".format(*interval(d["confirmed"]))
    lines.append("champion: " + label(d["champion"]) + found)
    if d["in_all"]:
        text = "against the base, on fresh seeds: {} [{}, {}]"
        lines.append(text.format(*interval(d["in_all"])))
    lines.append("anchor: " + label(d["anchor"]))
    if d["slots"]:
        held = "; ".join(f"{key} on {','.join(s)}" for key, s in d["slots"].items())
        lines.append(f"running: {held}")
    if d["stopped"]:
        lines.append(f"stopped: {d['stopped']}")
    if d["skills"]:
        lines += ["", skill_text(d["skills"], d["marks"])]
    return "\n".join(lines)


def interval(verdict: dict) -> tuple[str, str, str]:
    """A verdict's difference and its two bounds as texts."""
    return tuple(difference(v) for v in (verdict["delta"], *verdict["ci95"]))


def skill_text(rows: list[dict], marks: dict[str, str]) -> str:
    """The skill table as text."""
    lines = [
        f"{'skill':<24} tries moves upheld failed  gain per try [95 %]            minutes per 0.001"
    ]
    for r in rows:
        per = "-" if r["minutes_per_milli"] is None else f"{r['minutes_per_milli']:.3g}"
        lines.append(
            f"{r['skill']:<24} {r['tries']:>5} {r['moves']:>5} {r['upheld']:>6} "
            f"{r['failed']:>6}  {r['mean']:.5f} [{r['low']:+.5f}, {r['high']:+.5f}]  {per}"
            + f"  {marks.get(r['skill'], '')}".rstrip()
        )
    return "\n".join(lines)


def news(events: list[dict], view) -> list[str]:
    """What happened in these events, one line per verdict, with progress and time left."""
    state = view.state
    done, wanted = len(state.searches()), view.config["budget"]["experiments"]
    seconds = state.expected_seconds(view.rung)
    left = max(0, wanted - done) * seconds / 60 / view.config["loop"]["workers"]
    found = []
    for e in events:
        if e["event"] == "judged":
            x = state.experiments[e["exp"]]
            found.append(
                f"{x.id} {x.kind:<9} {x.verdict['verdict']:<10} {x.skill or '-':<22} "
                f"{x.verdict['reason'][:80]}   [{done}/{wanted}, about {left:.0f} min left]"
            )
        elif e["event"] == "refused":
            found.append(f"refused: {e['proposal']['reason'][:100]}")
        elif e["event"] == "agent" and not e["call"]["ok"]:
            found.append(f"agent: {e['call']['reason'][:160]}")
        elif e["event"] == "meta":
            skills = ", ".join(
                f"{r['skill']} {r['moves']}/{r['tries']}" for r in e["meta"]["skills"]
            )
            found.append(f"meta {e['meta']['index']}: {skills}")
    return found


# ---- Plots ---------------------------------------------------------------------------------------
def svg(draw, width: float = 9, height: float = 3.2) -> str:
    """One matplotlib figure as SVG text; the same data, the same text."""
    import matplotlib

    matplotlib.use("svg")
    settings = {"svg.hashsalt": "forge", "font.size": 9, "svg.fonttype": "none"}
    matplotlib.rcParams.update(settings)
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    try:
        draw(axis)
        out = io.StringIO()
        blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=blank)
    finally:
        plt.close(figure)
    text = out.getvalue()
    return "<figure>" + text[text.index("<svg") :] + "</figure>"


def plot_progress(d: dict) -> str:
    """Every run, the anchor's stairs and the champion's band."""
    points, stairs, sigma = (d["progress"][k] for k in ("points", "stairs", "sigma"))
    colors = {"base": "tab:gray", "champion (confirmed)": "tab:green"}

    def draw(axis):
        if points:
            axis.scatter(*zip(*points), s=12, color="0.6", label="tried once")
        if stairs:
            name = "anchor (may be luck)"
            axis.step(*zip(*stairs), where="post", color="tab:blue", label=name)
        for name, (middle, half) in d["progress"]["bands"].items():
            axis.axhspan(middle - half, middle + half, color=colors[name], alpha=0.2)
            axis.axhline(middle, color=colors[name], linewidth=1, label=name)
        values = [p[1] for p in points] or [1]
        top = max(float(np.quantile(values, 0.8)), *(p[1] for p in stairs), 0.0)
        axis.set_ylim(min(values) - 4 * sigma, top + 8 * sigma)
        axis.set(xlabel="experiment", ylabel="bits per byte")
        axis.legend(loc="upper right", fontsize=8)

    return svg(draw)


def plot_skills(d: dict) -> str:
    """Posterior mean credit of each skill with its 95 % interval."""
    rows = d["skills"]
    below = [r["mean"] - r["low"] for r in rows]
    above = [r["high"] - r["mean"] for r in rows]

    def draw(axis):
        names, means = [r["skill"] for r in rows], [r["mean"] for r in rows]
        look = dict(color="tab:blue", alpha=0.6, ecolor="0.3")
        axis.barh(names, means, xerr=[below, above], **look)
        axis.set(xlabel="gain per try, bits per byte (posterior, 95 %)")

    return svg(draw, height=0.8 + 0.3 * len(rows))


def plot_bytes(d: dict) -> str:
    """Score against size, with the budget."""
    rows = d["sizes"]

    def draw(axis):
        if rows:
            sizes, scores = [b / 1e6 for b, _ in rows], [y for _, y in rows]
            axis.scatter(sizes, scores, s=10, color="tab:purple")
        axis.axvline(d["budget"]["artifact_bytes"] / 1e6, color="tab:red", linewidth=1)
        axis.set(xlabel="artifact, million bytes (line: the budget)", ylabel="bits per byte")

    return svg(draw, height=2.6)


def plot_noise(d: dict) -> str:
    """Scores of every configuration that ran on several seeds, about their mean."""
    groups = d["noise_groups"]

    def draw(axis):
        for i, found in enumerate(groups.values()):
            axis.scatter(found["gaps"], [i] * len(found["gaps"]), s=10, alpha=0.6)
            axis.errorbar([0], [i + 0.2], xerr=[found["sigma"]], color="tab:red", capsize=3)
        axis.set(
            yticks=range(len(groups)),
            yticklabels=list(groups),
            xlabel="score minus its configuration's mean (red: one sigma, pooled)",
            ylim=(-0.6, len(groups) - 0.2),
        )

    return svg(draw, height=1.2 + 0.4 * len(groups))


def plot_transfer(rows: list[dict]) -> str:
    """Rung against rung for all classes."""
    row = next((r for r in rows if r["klass"] == "all" and r["points"]), None)

    def draw(axis):
        axis.scatter(*zip(*row["points"]), s=14)
        axis.set(xlabel=f"bits per byte on {row['lower']}", ylabel=f"on {row['upper']}")

    return svg(draw, 4.5, 3.2) if row else ""


def plot_time(d: dict) -> str:
    """Device minutes per skill and kind of experiment."""
    spent = d["minutes"]
    order = sorted(spent, key=spent.get)

    def draw(axis):
        axis.barh(order, [spent[n] for n in order], color="tab:orange", alpha=0.7)
        axis.set(xlabel="device minutes")

    return svg(draw, height=1 + 0.25 * len(order))


def plot_curves(d: dict) -> str:
    """Training losses of the base, the anchor and the champion."""

    def draw(axis):
        for name, losses in d["curves"].items():
            axis.plot(*zip(*losses), label=name, linewidth=1)
        axis.set(xlabel="step", ylabel="training loss, nats", yscale="log")
        if axis.lines:
            axis.legend(fontsize=8)

    return svg(draw, height=2.6)


def plot_forecasts(d: dict) -> str:
    """Score against forecast with its interval."""
    rows = d["forecast_rows"]

    def draw(axis):
        for f, y in rows:
            error = [[f["middle"] - f["low"]], [f["high"] - f["middle"]]]
            look = dict(fmt="o", markersize=3, color="tab:blue", ecolor="0.7")
            axis.errorbar(f["middle"], y, xerr=error, **look)
        if rows:
            axis.axline((rows[0][1], rows[0][1]), slope=1, color="0.4", linewidth=0.8)
        axis.set(xlabel="forecast halfway, bits per byte (90 %)", ylabel="score")

    return svg(draw, 4.5, 3.2)


def plot_importance(found: dict[str, float]) -> str:
    """Knobs by PED-ANOVA importance."""
    names = sorted(found, key=found.get)[-15:]

    def draw(axis):
        axis.barh(names, [found[n] for n in names], color="tab:cyan")
        axis.set(xlabel="share of the difference between good and other tries (PED-ANOVA)")

    return svg(draw, height=1 + 0.22 * len(names))


# ---- The page ------------------------------------------------------------------------------------
def table(head: list[str], rows: list[list]) -> str:
    """An HTML table; every cell is escaped."""
    lines = ["<table><thead><tr>"]
    lines += [f"<th>{html.escape(h)}</th>" for h in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = ("" if v is None else html.escape(str(v)) for v in row)
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(lines) + "</tbody></table>"


def section(title: str, *body: str, note: str = "") -> str:
    """A headed part of the page."""
    muted = f"<p class=muted>{note}</p>" if note else ""
    return f"<h2>{title}</h2>{muted}" + "".join(body)


def settings_text(env: dict, without: tuple = ()) -> str:
    """Knobs as NAME=VALUE, escaped."""
    return html.escape(", ".join(f"{n}={v}" for n, v in env.items() if n not in without))


def setting(d: dict) -> str:
    """What was done, for a reader who has seen nothing else."""
    rung = d["rung_table"]
    base = settings_text(d["base"], ("CHECKPOINT_EVERY", "STRICT_ENV"))
    own = settings_text(
        rung.get("env", {}), ("MAX_WALLCLOCK_SECONDS",) if rung.get("tokens") else ()
    )
    val, host = d["reference"].get("val"), d["reference"].get("host")
    length = f"{rung['tokens']:,} training tokens" if rung.get("tokens") else "its own limits"
    text = (
        "A score is bits per byte of validation text; lower is better. The campaign began at the "
        f"base configuration <code>{base}</code> and tried {d['spent']['experiments']} changes on "
        f"the rung <i>{html.escape(d['rung'])}</i>: every run there ends after {length}"
    )
    text += f", with <code>{own}</code>. " if own else ". "
    if val and val[0]:
        text += (
            f"Every run is scored on the same {val[0]:,} tokens ({val[1]:,} bytes), on "
            f"{html.escape(host)}. "
        )
    return (
        f"<p>{text}From seed to seed the score of one configuration varies by {d['noise'][0]:.4f} "
        "(standard deviation), so one better run proves nothing: a claim must hold on seeds that "
        "no decision has seen.</p>"
    )


def headline(d: dict) -> str:
    """What the campaign may claim, in a few sentences."""
    found = d["in_all"] or d["confirmed"]
    claim = "Nothing is confirmed: what the search found may be luck. "
    if found:
        low, high = found["ci95"]
        n = len(found["seeds_used"])
        against = "the base configuration" if d["in_all"] else "the champion before it"
        claim = (
            f"scores <b>{-found['delta']:.4f}</b> bits per byte less than {against} (95 % interval "
            f"{-high:.4f} to {-low:.4f}, one-sided p {found['p']:.2g}), on {n} + {n} runs with "
            f"fresh seeds ({found['exp']}). A run of it takes {d['longer']:.2f} times as long. "
        )
    base = bpb(d["scores"]["base"]) or "nothing yet"
    champion = html.escape(label(d["champion"]))
    return f"<p class=big>{champion}</p><p>{claim}The base scores {base}.</p>"


def skill_section(d: dict) -> str:
    """How every skill did."""
    head = ["skill", "tries", "moved the anchor", "upheld", "failed", "gain per try", "from"]
    head += ["to (95 %)", "minutes", "minutes per 0.001"]
    rows = []
    for r in d["skills"]:
        per = r["minutes_per_milli"]
        row = [r[k] for k in ("skill", "tries", "moves", "upheld", "failed")]
        row += [bpb(r["mean"]), difference(r["low"]), difference(r["high"])]
        rows.append([*row, f"{r['minutes']:.1f}", "" if per is None else f"{per:.3g}"])
    note = (
        "A skill is a group of knobs with notes on them. With few experiments this ranking is a "
        f"tendency: read the intervals. Inert: {', '.join(d['inert']) or 'none so far'}. Retired: "
        f"{', '.join(d['retired']) or 'none'}."
    )
    if d["prior"]:
        counts = ", ".join(f"{s} {a:g}:{b:g}" for s, (a, b) in sorted(d["prior"].items()))
        note += (
            f" Records of others speak for and against {counts}; their weight falls with every "
            "try of one's own."
        )
    return section("Skills", table(head, rows), plot_skills(d), note=note)


def claim_section(d: dict) -> str:
    """Claims and what they rest on."""
    head = ["id", "standing", "claim", "k", "parents", "mean", "low", "high", "rung", "evidence"]
    rows = []
    for r in d["claims"]:
        numbers = [difference(r[k]) for k in ("mean", "low", "high")]
        row = [r["id"], r["label"], r["claim"], r["k"], r["parents"], *numbers]
        rows.append([*row, r["rung"], " ".join(r["experiments"])])
    note = "A claim is proven by three comparisons on two parents with an upper bound below zero."
    return section("Claims", table(head, rows) if rows else "<p>None yet.</p>", note=note)


def transfer_section(d: dict) -> str:
    """Whether small runs foretell large ones."""
    head = ["from", "to", "class", "n", "verdict", "tau", "low", "high", "regret"]
    rows = []
    for r in d["transfers"]:
        row = [r[k] for k in ("lower", "upper", "klass", "n", "word")]
        row += [difference(r.get(k), 2) for k in ("tau", "low", "high")]
        rows.append([*row, bpb(r.get("regret"))])
    return section("Transfer between rungs", table(head, rows), plot_transfer(d["transfers"]))


def failed_section(d: dict) -> str:
    """What did not work."""
    head = ["change", "skill", "difference", "in sigmas", "what happened", "id"]
    rows = []
    for r in d["failed_ideas"]:
        numbers = [difference(r["delta"]), difference(r["sigmas"], 1)]
        rows.append([r["change"], r["skill"], *numbers, r["how"], r["id"]])
    return section(
        "What did not work",
        table(head, rows),
        note="Against the anchor of the moment, most by a single run: a change that is only a "
        "little worse here may be worth nothing or a little. Claims that fell on fresh seeds come "
        "first, then failed runs.",
    )


def spent_section(d: dict) -> str:
    """Where the time went, and the budgets."""
    spent, budget = d["spent"], d["budget"]
    rows = [
        ["experiments", spent["experiments"], budget["experiments"]],
        ["device minutes", f"{spent['minutes']:.1f}", budget["minutes"] or "none"],
        ["runs", spent["runs"], budget["runs"] or "none"],
        ["agent calls", spent["agent_calls"], budget["agent_calls"] or "none"],
        ["agent dollars", f"{spent['agent_dollars']:.2f}", budget["agent_dollars"] or "none"],
    ]
    return section("Where the time went", plot_time(d), table(["budget", "used", "limit"], rows))


def later_sections(d: dict) -> list[str]:
    """Parts that only some campaigns have: pairs, forecasts, importance, agents, refusals."""
    parts = []
    if d["forecast_any"]:
        n, covered = d["forecasts"]
        cut = d["runs"].get("pruned", 0)
        note = FORECAST_NOTE.format(cut=cut, n=n, covered=covered)
        parts.append(section("Forecasts", plot_forecasts(d), note=note))
    if d["importance"]:
        parts.append(section("Which knobs matter", plot_importance(d["importance"])))
    if d["agent_failures"]:
        rows = [
            [c["skill"], c["attempt"], c["reason"], c.get("stderr", "")[-300:]]
            for c in d["agent_failures"]
        ]
        head = ["skill", "attempt", "reason", "its standard error"]
        parts.append(section("What the agent did wrong", table(head, rows)))
    return parts


def page(d: dict) -> str:
    """The whole report."""
    stand = standing_text(d).splitlines()[0]
    stand += f" · stopped: {d['stopped']}" if d["stopped"] else ""
    title = html.escape(d["name"])
    parts = [
        f"<h1>{title}</h1><p class=muted>{now()} · {html.escape(stand)}</p>",
        section("Champion", headline(d), setting(d)),
    ]
    if d["failures"]:
        note = "Tampered runs first: their numbers did not survive the checks."
        body = table(["status", "reason", "runs"], d["failures"])
        parts.append(section("Failures", body, note=note))
    note = (
        "Grey dots are single runs. The blue line is where the search stands; it may follow luck. "
        "Only the green line survived fresh seeds."
    )
    parts.append(section("Progress", plot_progress(d), note=note))
    if d["searched"]:
        parts += [failed_section(d), skill_section(d)]
    parts.append(claim_section(d))
    if d["pairs"]:
        head = ["id", "one change", "the other", "beyond their sum", "verdict"]
        rows = [[p["id"], *p["claims"], difference(p["delta"]), p["reason"]] for p in d["pairs"]]
        note = (
            "Two changes that an ablation suspected of helping or harming each other, in a 2x2 on "
            "fresh seeds. They interact when the 95 % interval excludes zero."
        )
        parts.append(section("Pairs", table(head, rows), note=note))
    if d["transfers"]:
        parts.append(transfer_section(d))
    parts.append(section("Size", plot_bytes(d)))
    parts.append(section("Learning curves", plot_curves(d)))
    parts.append(section("Noise", plot_noise(d)))
    parts.append(spent_section(d))
    parts += later_sections(d)
    head = ["id", "kind", "skill", "source", "verdict", "delta", "reason", "change", "runs"]
    rows = [list((x | dict(delta=difference(x["delta"]))).values()) for x in d["experiments"]]
    note = "Repeat a run: <code>forge.py replay CAMPAIGN RUN</code>. Click a heading to sort."
    parts.append(section("Experiments", table(head, rows), note=note))
    if d["refused"]:
        rows = [[p.get("skill", ""), p["reason"], label(p["change"])] for p in d["refused"]]
        body = table(["skill", "reason", "change"], rows)
        parts.append(section("Refused before they started", body))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + f"<script>{SORT}</script></body></html>"
    )

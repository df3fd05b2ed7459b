"""README.md of a record: tables between markers, from submission.json and the files alone."""

import json
from pathlib import Path
from typing import Any

PICTURES = {
    "loss.svg": "Loss and score",
    "bytes.svg": "Bytes",
}  # that a README shows; report.html has them all


def row(*cells) -> str:
    return "| " + " | ".join("unknown" if c is None else str(c) for c in cells) + " |"


def seconds(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds / 1e3:,.1f}"


def seed_table(s: dict[str, Any]) -> str:
    lines = [
        row(
            "seed",
            "steps",
            "ms/step",
            "bpb before quantisation",
            "**bpb**",
            "nats per token",
            "bytes",
            "training s",
            "evaluation s",
        ),
        "|---" * 9 + "|",
    ]
    for seed, r in s["seed_results"].items():
        pace = r["train_time_ms"] and r["steps"] and f"{r['train_time_ms'] / r['steps']:.2f}"
        lines.append(
            row(
                seed,
                r["steps"],
                pace,
                r["pre_quant_val_bpb"] and f"{r['pre_quant_val_bpb']:.4f}",
                f"**{r['val_bpb']:.6f}**",
                f"{r['val_loss']:.6f}",
                f"{r['artifact_bytes']:,}",
                seconds(r["train_time_ms"]),
                seconds(r["eval_time_ms"]),
            )
        )
    spread = f" ± {s['val_bpb_std']:.6f}" if s["val_bpb_std"] is not None else ""
    return "\n".join(
        [
            *lines,
            row(
                "mean",
                "",
                "",
                "",
                f"**{s['val_bpb']:.6f}**{spread}",
                f"{s['val_loss']:.6f}",
                f"{s['bytes_total']:,} (largest)",
                "",
                "",
            ),
        ]
    )


def headline(s: dict[str, Any]) -> str:
    spread = f" ± {s['val_bpb_std']:.4f}" if s["val_bpb_std"] is not None else ""
    seeds = "seeds" if len(s["seeds"]) > 1 else "seed"
    return (
        f"**{s['val_bpb']:.4f}{spread} bits per byte** ({s['evidence']['variant']}, "
        f"{len(s['seeds'])} {seeds}, {s['bytes_total']:,} bytes, {s['hardware']}, "
        f"text of {s['evidence']['val_bytes']:,} bytes)"
    )


def settings(s: dict[str, Any]) -> str:
    e = s["evidence"]
    phases = ", ".join(
        f"{name} {milliseconds / 1e3:.1f}" for name, milliseconds in e["phases_ms"].items()
    )
    return "\n".join(
        [
            row("what", "value"),
            "|---|---|",
            row("preset", f"`{s['technique_summary']}`"),
            row("parameters", e["model_params"] and f"{e['model_params']:,}"),
            row("code bytes", f"{s['bytes_code']:,}{' (packed)' if e['code_wrapped'] else ''}"),
            row("model bytes", s["bytes_model"] and f"{s['bytes_model']:,}"),
            row("tokens scored", f"{e['val_tokens']:,}"),
            row("data manifest", f"`{e['data_manifest']}`"),
            row("seconds by phase (longest of the seeds)", phases),
            row("left out", e["left_out"] or "nothing"),
            row("torch, Python", f"{s['pytorch_version']}, {s['python_version']}"),
        ]
    )


def compliance(s: dict[str, Any]) -> str:
    rule = dict(
        artifact_under_16mb="W1",
        train_under_600s="W2",
        eval_under_600s="W2",
        score_first_ttt="C3",
        no_slot="C14",
        no_etlb="C15",
        no_ngram_cache="C6",
        no_pre_quant_ttt="C9",
        three_seeds="W6",
    )
    shown = {True: "yes", False: "no", None: "unknown"}
    lines = [row("what", "rule", "holds"), "|---|---|---|"]
    lines += [row(name, rule[name], shown[value]) for name, value in s["compliance"].items()]
    lines += [row(f"audit {a['id']}", "", a["status"]) for a in s["evidence"]["audits"]]
    return "\n".join(lines)


def statistics_text(s: dict[str, Any]) -> str:
    t = s["evidence"]["statistics"]
    if not t:
        return "Compared with nothing yet: `python records/tools.py compare BASE THIS`."
    p = [f"p = {x:.2g}" if x is not None else "p unknown" for x in (t["p_any_gain"], t["p_value"])]
    return (
        f"Gain over `{t['baseline']}`: {t['delta_bpb']:+.5f} bits per byte, "
        f"{t['delta_nats_per_token']:+.5f} nats per token. {t['test']}, n = {t['n'][0]} and "
        f"{t['n'][1]}: {p[0]} for any gain, {p[1]} for more than "
        f"{t['margin_nats_per_token']} nats per token."
    )


def tables(s: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Every generated part of a README."""
    pictures = [f"![{title}]({name})" for name, title in PICTURES.items() if name in names]
    return dict(
        headline=headline(s),
        pictures="\n\n".join([*pictures, "More: [report.html](report.html)."]),
        seeds=seed_table(s),
        settings=settings(s),
        compliance=compliance(s),
        statistics=statistics_text(s),
        setup=f"Runs made on {s['hardware']} with torch {s['pytorch_version']}; "
        "`pip install -r requirements.txt` first.",
        files="\n".join(f"- `{n}`" for n in names),
    )


def between_markers(text: str, parts: dict[str, str]) -> str:
    """A text with each part put between its markers. Raises ValueError when a marker is missing."""
    for name, part in parts.items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        head, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"no marker for {name}")
        text = f"{head}{begin}{part}\n{end}{rest.partition(end)[2]}"
    return text


def file_names(folder: Path) -> list[str]:
    """What a README lists: every file but itself."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.name != "README.md"
    )


def refreshed(folder: Path) -> str:
    """A record's README with its tables as submission.json says now."""
    s = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    return between_markers(
        (folder / "README.md").read_text(encoding="utf-8"), tables(s, file_names(folder))
    )

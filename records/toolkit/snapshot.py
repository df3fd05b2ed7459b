"""Make a record folder out of run folders: every number comes from what the runs left, nothing is
typed in.

A folder appears whole or not at all: it is put together beside its place, judged by `check`, and
then moved.
"""

import ast
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from facts.files import sha256_of, write_atomic
from facts.limits import ARTIFACT_BYTES, EVALUATION_SECONDS, TRAINING_SECONDS
from facts.logs import FREE, Log, read_ends, read_log
from facts.wrappers import parsed, unwrapped

from .check import check
from .readme import PICTURES, refreshed
from .report import picture, read_curves, report

TRACKS = ("non_record_16mb", "10min_16mb")
SMOKE_TOKENS = dict(train=30_000, val=3_000)  # of the runs' own text, for ./launch.sh +tiny
OF_ONE_RUN = (
    "run_mode",
    "run_id",
    "runs_dir",
    "seed",
    "resume",
    "artifact",
    "data_path",
    "tokenizer_path",
)
OF_A_MACHINE = ("device", "numerics", "attention", "compile", "threads")
BLURB = "(No description.)"
STATEMENTS = {
    True: "These are leaderboard conditions.",
    False: "These are scaled-down runs, not leaderboard scores: another text, size or machine than "
    "the competition's.",
}


@dataclass
class Run:
    """One finished run folder."""

    folder: Path
    log: Log
    preset: str
    knobs: dict[str, dict[str, Any]]  # {name: {value, origin}}


@dataclass
class Wanted:
    """What only a person can say about a record."""

    name: str
    track: str = TRACKS[0]
    author: str | None = None
    github_id: str | None = None
    blurb: str | None = None
    date: str | None = None
    left_out: str | None = None  # why runs of the same configuration are not part of the record
    keep_artifacts: bool = False
    data: Path | None = None  # folder of the runs' shards, for smoke/
    tokenizer: Path | None = None  # of the runs, where it does not lie beside the shards
    without_smoke: bool = False  # a record that nobody can run alone, where the text is gone


def read_run(folder: Path) -> Run:
    """Read one run folder. Raises ValueError when it is none or not finished."""
    for name in ("log.txt", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; not a run folder")
    log, config = (
        read_log(folder / "log.txt"),
        json.loads((folder / "config.json").read_text(encoding="utf-8")),
    )
    if not log.finished or not log.official.label.startswith("final:official"):
        raise ValueError(f"{folder}: its log has no final:official line; the run is not finished")
    return Run(folder, log, config["preset"], config["knobs"])


def same_setup(a: Run, b: Run) -> bool:
    """Whether two runs differ in nothing but the seed and places."""
    return a.preset == b.preset and a.log.code_sha256 == b.log.code_sha256 and not differing(a, b)


def differing(a: Run, b: Run) -> list[str]:
    return sorted(
        k
        for k in a.knobs.keys() | b.knobs.keys()
        if not FREE.fullmatch(k)
        and k not in OF_ONE_RUN
        and a.knobs.get(k, {}).get("value") != b.knobs.get(k, {}).get("value")
    )


def refuse(runs: list[Run], script: bytes, wanted: Wanted):
    """Raise ValueError for every reason not to make a record of these runs."""
    first, wrong = runs[0], []
    digest = hashlib.sha256(script).hexdigest()
    seeds = [r.log.seed for r in runs]
    wrong += [
        f"seed {s} stands for {seeds.count(s)} runs"
        for s in sorted(set(seeds))
        if seeds.count(s) > 1
    ]
    for run in runs:
        if names := differing(first, run):
            wrong.append(
                f"{run.folder}: {', '.join(n.upper() for n in names[:6])} differ from "
                f"{first.folder.name}"
            )
        if run.preset != first.preset:
            wrong.append(f"{run.folder}: preset {run.preset}, not {first.preset}")
        if run.log.code_sha256 != [digest]:
            wrong.append(
                f"{run.folder}: made by code {', '.join(h[:12] for h in run.log.code_sha256)}, "
                f"the script is {digest[:12]}; name the right one with --script"
            )
        for what in ("manifest", "val_tokens", "val_bytes", "coverage", "tokenizer_sha256"):
            if getattr(run.log, what) != getattr(first.log, what):
                wrong.append(
                    f"{run.folder}: {what} differs from {first.folder.name}: not the same text"
                )
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,48}", wanted.name, re.ASCII) or re.search(
        r"[01]\.\d{3}", wanted.name
    ):
        wrong.append(
            f"--name {wanted.name!r}: want at most 49 letters, digits, . _ + - and no score"
        )
    if wanted.date and not re.fullmatch(r"20\d\d-\d\d-\d\d", wanted.date):
        wrong.append(f"--date {wanted.date!r}: want YYYY-MM-DD")
    if wanted.track == "10min_16mb" and len(set(seeds)) < 3:
        wrong.append(f"{len(set(seeds))} seeds; a record of track 10min_16mb has at least 3")
    if (others := left_out(runs)) and not wanted.left_out:
        wrong.append(
            f"runs of the same configuration are left out: {', '.join(others[:6])}; a record has "
            "every seed that was run, or says why with --left-out"
        )
    if wrong:
        raise ValueError("\n       ".join(wrong))


def left_out(runs: list[Run]) -> list[str]:
    """Names of finished runs beside the given ones that differ from them in nothing but the
    seed."""
    used, found = {r.folder.resolve() for r in runs}, []
    for folder in sorted({p for r in runs for p in r.folder.resolve().parent.iterdir()} - used):
        try:
            if same_setup(runs[0], read_run(folder)):
                found.append(folder.name)
        except (ValueError, KeyError, OSError):
            continue
    return found


# submission.json: historical core keys, then the evidence.
def seed_result(run: Run, wanted: Wanted) -> dict[str, Any]:
    """What one seed reached, and the files that show it."""
    g, before = run.log, run.log.before_quantisation
    result = dict(
        val_bpb=g.official.bpb,
        val_loss=g.official.loss,
        pre_quant_val_bpb=before and before.bpb,
        pre_quant_val_loss=before and before.loss,
        steps=g.steps,
        train_time_ms=g.train_seconds and round(g.train_seconds * 1e3),
        eval_time_ms=g.eval_seconds and round(g.eval_seconds * 1e3),
        artifact_bytes=max(g.total_bytes),
        log=f"train_seed{g.seed}.log",
        log_sha256=g.sha256,
        artifact_sha256=g.artifact_sha256,
    )
    for name, what, keep in (
        ("doc_loss.npy", "doc_loss", True),
        ("metrics.jsonl", "metrics", True),
        ("analysis.json", "analysis", True),
        ("model.golf", "artifact", wanted.keep_artifacts),
    ):
        if keep and (run.folder / name).is_file():
            kept = f"{Path(name).stem}_seed{g.seed}{Path(name).suffix}"
            result |= {what: kept, f"{what}_sha256": sha256_of(run.folder / name)}
    return result


def at_most(values: list[float | None], limit: float) -> bool | None:
    """Whether all values are known and within a limit; None when one is unknown."""
    return None if None in values else max(values) <= limit


def hardware(log: Log) -> str:
    """Words for the machine of a log."""
    world, gpu = log.environment.get("world_size", "1"), log.environment.get("gpu", "none")
    return (
        f"{world}x{gpu}"
        if gpu != "none"
        else f"CPU, {log.environment.get('threads', '?')} threads x {world}"
    )


def submission(runs: list[Run], script: bytes, wanted: Wanted, date: str) -> dict[str, Any]:
    """The generated submission.json: unknown is null, the score is the mean, deviations are those
    of a sample."""
    logs = [r.log for r in runs]
    scores, losses = [g.official.bpb for g in logs], [g.official.loss for g in logs]
    several = len(runs) > 1
    worst = max(logs, key=lambda g: max(g.total_bytes))
    ttt = runs[0].knobs.get("ttt", {}).get("value")
    phases = {
        name: round(max(g.phases.get(name, 0.0) for g in logs) * 1e3) for name in logs[0].phases
    }
    return dict(
        author=wanted.author,
        github_id=wanted.github_id,
        name=wanted.name.replace("_", " "),
        date=date,
        track=wanted.track,
        blurb=wanted.blurb,
        technique_summary=runs[0].preset,
        attribution=None,
        val_bpb=statistics.mean(scores),
        val_loss=statistics.mean(losses),
        val_bpb_std=statistics.stdev(scores) if several else None,
        val_loss_std=statistics.stdev(losses) if several else None,
        seeds=[g.seed for g in logs],
        seed_results={str(r.log.seed): seed_result(r, wanted) for r in runs},
        bytes_total=max(worst.total_bytes),
        bytes_code=len(script),
        bytes_model=worst.model_bytes,
        hardware=hardware(logs[0]),
        pytorch_version=logs[0].environment.get("torch"),
        python_version=logs[0].environment.get("python"),
        wallclock_seconds=max((g.train_seconds for g in logs if g.train_seconds), default=None),
        eval_time_seconds=max((g.eval_seconds for g in logs if g.eval_seconds), default=None),
        step_stop=max((g.steps for g in logs if g.steps), default=None),
        compliance=dict(
            artifact_under_16mb=max(worst.total_bytes) <= ARTIFACT_BYTES,
            train_under_600s=at_most([g.train_seconds for g in logs], TRAINING_SECONDS),
            eval_under_600s=at_most([g.eval_seconds for g in logs], EVALUATION_SECONDS),
            score_first_ttt=None,
            no_slot=None,
            no_etlb=None,
            no_ngram_cache=None,
            no_pre_quant_ttt=ttt and not any(g.noncompliant for g in logs),
            three_seeds=len(runs) >= 3,
        ),
        evidence=dict(
            schema=1,
            code_sha256=hashlib.sha256(script).hexdigest(),
            code_wrapped=unwrapped(script) != script,
            data_manifest=logs[0].manifest,
            tokenizer_sha256=logs[0].tokenizer_sha256,
            val_tokens=logs[0].val_tokens,
            val_bytes=logs[0].val_bytes,
            implied_bytes=round(logs[0].implied_bytes),
            scored_once=logs[0].scored_once,
            coverage_sha256=logs[0].coverage,
            variant=logs[0].official.label.removeprefix("final:official variant:"),
            model_params=logs[0].parameters,
            ttt=ttt,
            phases_ms=phases,
            left_out=wanted.left_out,
            audits=[],
            statistics=None,
        ),
    )


# launch.sh and smoke/.
def set_by_overlay(script: bytes, overlay: str) -> set[str]:
    """Knobs that an overlay of a script's PRESETS sets, read from its text."""
    tree = parsed(unwrapped(script))
    pairs = [
        (k, v) for n in ast.walk(tree) if isinstance(n, ast.Dict) for k, v in zip(n.keys, n.values)
    ]
    found = set()
    for key, value in pairs:
        if isinstance(key, ast.Constant) and key.value == overlay:
            for node in ast.walk(value):
                if isinstance(node, ast.keyword) and node.arg:  # as older scripts write it
                    found.add(node.arg)
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= {name.lower() for name in re.findall(r"([A-Z]\w*)<?=", node.value)}
    return found


def exports(knobs: dict[str, Any]) -> list[str]:
    """Shell lines that set knobs."""
    values = {k: int(v) if isinstance(v, bool) else v for k, v in knobs.items()}
    return [f"export {k.upper()}={shlex.quote(str(v))}" for k, v in values.items()]


def launch_script(runs: list[Run], tiny: set[str]) -> str:
    """A shell script with the exact settings. With an overlay, knobs that the overlay shrinks and
    those that belong to a machine are left to it."""
    first = runs[0]
    typed = {
        k: v["value"]
        for k, v in first.knobs.items()
        if v["origin"] == "environment" and k not in OF_ONE_RUN
    }
    left_to_overlay = tiny | set(OF_A_MACHINE)
    fixed = exports({k: v for k, v in typed.items() if k in left_to_overlay})
    own = exports({k: v for k, v in typed.items() if k not in left_to_overlay})
    if fixed:
        fixed = ['if [ -z "$overlay" ]; then', *(f"  {line}" for line in fixed), "fi"]
    ranks = int(first.log.environment.get("world_size", 1))
    start = "train_gpt.py"
    if ranks > 1:
        start = f"-m torch.distributed.run --standalone --nproc_per_node={ranks} train_gpt.py"
    return LAUNCH.format(
        seed=first.log.seed,
        preset=first.preset,
        own="\n".join(own + fixed),
        text="\n".join(where_the_text_is(text_folder(first))),
        start=start,
    )


LAUNCH = """\
#!/usr/bin/env bash
# The exact settings of these runs. Usage: ./launch.sh [SEED] [+OVERLAY], for example ./launch.sh
# +tiny
# The text is looked for in DATA_PATH, then where the runs had it; +tiny is content with smoke/.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
seed={seed} overlay=
for word in "$@"; do case "$word" in +*) overlay=$word ;; *) seed=$word ;; esac; done
export PRESET="{preset}$overlay" SEED="$seed"
{own}
if [ -z "${{DATA_PATH:-}}" ]; then
  if [ "$overlay" = +tiny ] && [ -d smoke ]; then export DATA_PATH=smoke
{text}
  else echo "error: set DATA_PATH to the folder of the shards" >&2; exit 2; fi
fi
if [ -n "$overlay" ]; then exec "${{PYTHON:-python}}" train_gpt.py; fi
exec "${{PYTHON:-python}}" {start}
"""


def where_the_text_is(text: str) -> list[str]:
    """Shell lines that find the runs' text in the repository; the embedded sample is built
    first."""
    if text.endswith("/sample_sp1024"):
        return [
            f"  elif [ -f ../../../{text}/../../build_sample.py ]; then",
            f'    "${{PYTHON:-python}}" ../../../{text}/../../build_sample.py > /dev/null',
            f"    export DATA_PATH=../../../{text}",
        ]
    if text:
        return [f"  elif [ -d ../../../{text} ]; then export DATA_PATH=../../../{text}"]
    return []


def text_folder(run: Run) -> str:
    """Where the run's log says that its shards lay in the repository; empty when they lay
    elsewhere."""
    found = re.search(
        r"^val_loader:shards pattern=(data/[\w./-]+)/fineweb_val_\*\.bin ",
        read_ends(run.folder / "log.txt")[0],
        re.MULTILINE,
    )
    return found[1] if found and ".." not in found[1] else ""


def places(run: Run, knob: str, repository: Path) -> list[Path]:
    """Where a path that a run was given may lead to: as it is, from the repository, from the
    run."""
    value = str(run.knobs.get(knob, {}).get("value", "auto"))
    if value in ("auto", ""):
        return []
    return [
        base / value for base in (Path(), repository, run.folder.parent, run.folder.parent.parent)
    ]


def shards(folder: Path, split: str) -> list[Path]:
    """Shards of one split, in order."""
    return sorted(
        p for p in folder.glob("fineweb_*.bin") if re.match(rf"fineweb_{split}_\d", p.name)
    )


def text_at_hand(run: Run, wanted: Wanted, repository: Path) -> tuple[Path, Path]:
    """(folder of the runs' shards, their tokenizer), known by its hash. Raises ValueError that says
    what is missing."""
    if wanted.data:
        folders = [wanted.data]
    else:
        folders = places(run, "data_path", repository)
        folders += [repository / text_folder(run)] if text_folder(run) else []
    whole = [f for f in folders if shards(f, "train") and shards(f, "val")]
    if not whole:
        looked = wanted.data or (folders[0] if folders else "a place that the log does not name")
        raise ValueError(
            f"the text of the runs is not at hand ({looked}: no fineweb_train_*.bin and "
            "fineweb_val_*.bin), so that smoke/ cannot be made and nobody could run the record "
            "alone; name its folder with --data, or say --without-smoke"
        )
    models = [wanted.tokenizer] if wanted.tokenizer else []
    models += [*sorted(whole[0].glob("*.model")), *places(run, "tokenizer_path", repository)]
    models += sorted((repository / "data" / "tokenizers").glob("*.model"))
    for model in models:
        if model.is_file() and sha256_of(model) == run.log.tokenizer_sha256:
            return whole[0], model
    raise ValueError(
        f"no tokenizer with the hash of the runs' ({str(run.log.tokenizer_sha256)[:12]}) lies in "
        f"{whole[0]} or where TOKENIZER_PATH led; name it with --tokenizer, or say --without-smoke"
    )


def write_smoke(data: Path, tokenizer: Path, out: Path):
    """A few tokens of the runs' own text, its tokenizer, and the bytes of its tokens where they
    have a file of their own."""
    out.mkdir()
    sidecars = sorted(data.glob("fineweb_val_bytes_*.bin"))[:1]
    for split, count in SMOKE_TOKENS.items():
        copy_head(shards(data, split)[0], out / f"fineweb_{split}_000000.bin", count)
    for sidecar in sidecars:
        copy_head(sidecar, out / "fineweb_val_bytes_000000.bin", SMOKE_TOKENS["val"])
    shutil.copyfile(tokenizer, out / tokenizer.name)


def copy_head(shard: Path, out: Path, count: int):
    """The first entries of a file of uint16 behind a header of 256 int32, whose third says how
    many."""
    header = np.fromfile(shard, "<i4", 256)
    entries = np.fromfile(shard, "<u2", count, offset=1024)
    header[2] = len(entries)
    out.write_bytes(header.tobytes() + entries.tobytes())


# Putting it together.
def requirements(script: bytes, pinned: Path) -> str:
    """Lines of the repository's requirements that the script imports."""
    words = set(re.findall(r"\w+", unwrapped(script).decode("utf-8", "replace")))
    lines = pinned.read_text(encoding="utf-8").splitlines() if pinned.is_file() else []
    return (
        "\n".join(n for n in lines if re.split(r"[=<>~ ]", n)[0].replace("-", "_") in words) + "\n"
    )


def fill(folder: Path, runs: list[Run], script: bytes, wanted: Wanted, repository: Path):
    """Write every file of a record into an empty folder."""
    write = {
        "train_gpt.py": script,
        "launch.sh": launch_script(runs, set_by_overlay(script, "tiny")).encode(),
    }
    kept = {k: v for k, v in runs[0].knobs.items() if k not in OF_ONE_RUN}
    write["config.json"] = json.dumps(dict(preset=runs[0].preset, knobs=kept), indent=1).encode()
    write["requirements.txt"] = requirements(script, repository / "requirements.txt").encode()
    info = submission(runs, script, wanted, folder.name[:10])
    write["submission.json"] = json.dumps(info, indent=1).encode()
    for name, content in write.items():
        (folder / name).write_bytes(content)
    (folder / "launch.sh").chmod(0o755)
    for run in runs:
        result = info["seed_results"][str(run.log.seed)]
        for source, what in (
            ("log.txt", "log"),
            ("doc_loss.npy", "doc_loss"),
            ("metrics.jsonl", "metrics"),
            ("analysis.json", "analysis"),
        ):
            if what in result:
                shutil.copyfile(run.folder / source, folder / result[what])
        if (run.folder / "model.golf").is_file():  # kept or not, the pictures need it
            shutil.copyfile(run.folder / "model.golf", folder / f"model_seed{run.log.seed}.golf")
    if not wanted.without_smoke:
        data, tokenizer = text_at_hand(runs[0], wanted, repository)
        write_smoke(data, tokenizer, folder / "smoke")
    draw(folder)
    for path in () if wanted.keep_artifacts else folder.glob("model_seed*.golf"):
        path.unlink()
    template = Path(__file__).with_name("record.md").read_text(encoding="utf-8")
    filled = template.format(
        name=info["name"],
        blurb=wanted.blurb or BLURB,
        statement=STATEMENTS[wanted.track == "10min_16mb"],
    )
    write_atomic(folder / "README.md", filled)
    write_atomic(folder / "README.md", refreshed(folder))


def draw(folder: Path):
    """Write report.html and the pictures of the README."""
    write_atomic(folder / "report.html", report(folder))
    curves = read_curves(folder)
    for name, title in PICTURES.items():
        if drawn := picture(title, curves):
            write_atomic(folder / name, drawn)


def shipped_code(runs: list[Run], script: Path) -> bytes:
    """The code that the runs were counted with: what they kept of the script's packed form, else
    the script itself."""
    source = script.read_bytes()
    kept = runs[0].folder / "submission" / "train_gpt.py"
    ran = [hashlib.sha256(source).hexdigest()]
    if kept.is_file() and all(run.log.source_sha256 == ran for run in runs):
        return kept.read_bytes()
    return source


def new(folders: list[Path], script: Path, records: Path, wanted: Wanted) -> Path:
    """Make records/track_<track>/<date>_<name>/ and return it. Raises ValueError with every reason
    not to."""
    runs = sorted((read_run(f) for f in folders), key=lambda r: r.log.seed)
    code = shipped_code(runs, script)
    refuse(runs, code, wanted)
    made = max((r.folder / "log.txt").stat().st_mtime for r in runs)
    date = wanted.date or datetime.datetime.fromtimestamp(made, datetime.UTC).strftime("%Y-%m-%d")
    place = records / f"track_{wanted.track}" / f"{date}_{wanted.name}"
    if place.exists():
        raise ValueError(f"{place}: exists already")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".track_{wanted.track}.", dir=records) as scratch:
        folder = Path(scratch) / place.name
        folder.mkdir()
        fill(folder, runs, code, wanted, script.resolve().parent)
        result = check(folder)
        if not result["passed"]:
            raise ValueError(
                "check fails: "
                + "; ".join(
                    f"{f['rule']} {f['file']} {f['evidence']}"
                    for f in result["findings"]
                    if f["level"] == "fail"
                )
            )
        os.rename(folder, place)
    return place

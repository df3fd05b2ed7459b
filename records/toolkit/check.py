"""Judge a record folder by dated rules, from what lies in it alone: nothing is executed, nothing is
downloaded.

A check is a function that yields findings. Which rule it serves, and whether that rule binds, is
said in rules.json. A finding fails a folder only when the rule is binding, in force at the folder's
date, and the evidence leaves no doubt.
"""

import ast
import functools
import hashlib
import json
import lzma
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from facts.files import number, read_json
from facts.folder import Folder, Source, read_folder
from facts.limits import ARTIFACT_BYTES, EVALUATION_SECONDS, TEXT_BYTES, TRAINING_SECONDS
from facts.logs import Claim, Log, different_knobs, is_result
from facts.wrappers import unopened

BYTES_PER_TOKEN = {
    1024: (2.43592,),
    4096: (3.31968,),
    8192: (3.72663, 3.15715),
}  # the second: with case operations
# Counts of honest runs agree within this; the smallest real defect is twenty times as large.
TOLERANCE = 0.002
# Tokens of the validation shards that the naive baseline was published with.
BASELINE_EXPORT = 63_779_840
# Fingerprints of the data of #2127.
OVERLAPPING = dict(train_shards=(1499,), val_tokens=(9_662_464, 9_662_463))
# Of the bits per byte before quantisation: windows, adaptation and quantisation explain no more.
TOO_GOOD = 0.92
PACKAGES = {
    "torch",
    "numpy",
    "sentencepiece",
    "zstandard",
    "brotli",
    "tqdm",
    "triton",
    "flash_attn",
    "tiktoken",
    "fla",
    "flash_attn_interface",
    "huggingface_hub",
    "datasets",
    "transformers",
    "scipy",
    "einops",
    "mlx",
    "cutlass",
    "constriction",
    "numba",
    "psutil",
    "matplotlib",
    "tokenizers",
    "safetensors",
    "kernels",
    "pyppmd",
    "wandb",
}
SIBLINGS = re.compile(r"train_gpt.*|lossless_caps|prepare_caseops_data|caseops.*|build_sample")
NETWORK = re.compile(
    r"urlopen|urlretrieve|snapshot_download|hf_hub_download|create_connection"
    r"|requests\.(get|post|Session)|load_dataset"
)
PROGRAM = re.compile(r"\b(pip3?|curl|wget|git clone|apt(?:-get)?|conda|huggingface-cli)\b")
USUAL_PROGRAMS = ("nvidia-smi", "git", "python", "python3", "lscpu", "pyminify")
COMPILED = re.compile(r"(^|\.)(exec|load_inline|RawModule|RawKernel)$|cpp_extension\.load")
NEWER_SYNTAX = re.compile(rb"^\s*(?:type \w+ ?=|def \w+\[|class \w+\[)", re.MULTILINE)
MACHINE_PATH = re.compile(rb"(?<![\w.:/~-])/(?:home|root|workspace|Users)/\w")
CORE_FIELDS = dict(
    author=str,
    github_id=str,
    name=str,
    date=str,
    val_bpb=float,
    val_loss=float,
    bytes_total=int,
    seeds=(list, dict),
)
LEVELS = ("fail", "warn", "contested", "open", "later")


class Finding(NamedTuple):
    """Evidence found by a check. `certain` is False where only behaviour or a person could
    decide."""

    evidence: str
    file: str = ""
    certain: bool = True


Findings = Iterator[Finding]


def rules() -> list[dict[str, Any]]:
    """The registry of rules."""
    return json.loads(Path(__file__).with_name("rules.json").read_text(encoding="utf-8"))


def claimed_bpb(folder: Folder) -> Any:
    """The headline as submission.json writes it; None when it has none."""
    for key in ("val_bpb", "mean_val_bpb", "val_bpb_mean"):
        if number(folder.submission.get(key)) is not None:
            return folder.submission[key]
    return None


def official_claims(folder: Folder) -> list[Claim]:
    """The official result of each seed. A log of somebody else may end with another line than the
    one that counts: then the last kind of line that all seeds have and whose mean is the claim."""
    logs = [g for g in folder.seed_logs if g.official]
    claim = claimed_bpb(folder)
    results = [{c.label: c for c in g.claims if is_result(c)} for g in logs]
    shared = [
        label for label in (results[-1] if results else ()) if all(label in r for r in results)
    ]
    agreeing = [
        label
        for label in shared
        if claim is not None and agrees(claim, statistics.mean(r[label].bpb for r in results))
    ]
    for label in (agreeing or shared)[-1:]:
        return [r[label] for r in results]
    return [g.official for g in logs]


def officials(folder: Folder) -> list[float]:
    """Official score of each seed, bits per byte."""
    return [c.bpb for c in official_claims(folder)]


# Budgets.
def least_packed(folder: Folder) -> float:
    """Bytes that a packed script can hardly be below: without comments, names shortened, no base
    85."""
    text = ast.unparse(folder.tree).encode() if folder.tree else folder.inner
    return 0.9 * len(lzma.compress(text))


def cap(folder: Folder) -> Findings:
    """Sizes that were logged with the raw script in them leave open what the packed one would have
    weighed."""
    least = least_packed(folder) if folder.inner else math.inf
    for g in folder.logs:
        total = max(g.total_bytes, default=(g.model_bytes or 0) + max(g.code_bytes, default=0))
        fits = g.model_bytes is not None and g.model_bytes + least <= ARTIFACT_BYTES
        if total > ARTIFACT_BYTES:
            why = ", with the script unpacked" if fits else ""
            yield Finding(f"{total:,} bytes logged{why}", g.name, not fits)
    for key in ("bytes_total", "artifact_bytes", "artifact_bytes_max"):
        if (size := number(folder.submission.get(key))) and size > ARTIFACT_BYTES:
            yield Finding(f"{key} is {size:,.0f}", "submission.json")


def shipped_size(folder: Folder) -> Findings:
    """What the folder ships, not a wrapper that was only measured, is what the size rule can be
    held against: every file whose code runs, helper modules and sources of other languages
    included."""
    models = [g.model_bytes for g in folder.seed_logs if g.model_bytes]
    models += [size for name, size in folder.files.items() if re.search(r"\.(golf|ptz)$", name)]
    total = sum(folder.code.values()) + max(models, default=0)
    if models and folder.script and total > ARTIFACT_BYTES:
        helpers = sorted(name for name in folder.code if name != folder.script_name)
        named = f" ({', '.join([folder.script_name, *helpers])})" if helpers else ""
        yield Finding(
            f"shipped code {sum(folder.code.values()):,}{named} + model {max(models):,} "
            f"= {total:,} bytes"
        )


def sure(folder: Folder) -> bool:
    """Whether the seed logs are surely those of a record."""
    return folder.track == "record" and bool(folder.named_logs)


def late(folder: Folder, seconds: float | None, lo: float, hi: float = math.inf) -> bool:
    return seconds is not None and folder.track != "non-record" and lo < seconds <= hi


def training_time(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        if late(folder, g.train_seconds, TRAINING_SECONDS + 1):
            yield Finding(f"training ended at {g.train_seconds:.3f} s", g.name, sure(folder))


def last_step(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        if late(folder, g.train_seconds, TRAINING_SECONDS, TRAINING_SECONDS + 1):
            yield Finding(f"training ended at {g.train_seconds:.3f} s", g.name)


def hessian_time(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        if g.hessian_seconds and late(
            folder, (g.train_seconds or 0) + g.hessian_seconds, TRAINING_SECONDS
        ):
            yield Finding(
                f"training {g.train_seconds:.1f} s + Hessians {g.hessian_seconds:.1f} s", g.name
            )


def evaluation_time(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        if late(folder, g.eval_seconds, EVALUATION_SECONDS):
            yield Finding(
                f"the official evaluation took {g.eval_seconds:.1f} s", g.name, sure(folder)
            )


def all_evaluations(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        if late(folder, g.all_eval_seconds, EVALUATION_SECONDS) and not late(
            folder, g.eval_seconds, EVALUATION_SECONDS
        ):
            yield Finding(f"all evaluations took {g.all_eval_seconds:.1f} s", g.name)


# The metric.
def near(value: float, wanted: float, tolerance: float = TOLERANCE) -> bool:
    return abs(value / wanted - 1) <= tolerance


def implied_bytes(folder: Folder) -> Findings:
    """val_loss / ln 2 / val_bpb * tokens is the number of bytes that a score was divided by."""
    for g in folder.logs:
        if g.official is None or g.official.bpb <= 0 or g.official.loss <= 0:
            continue
        ratio, implied = g.official.loss / math.log(2) / g.official.bpb, g.implied_bytes
        if g.val_bytes is not None:  # our own logs count the bytes of their text
            if not near(implied, g.val_bytes, 1e-5):
                yield Finding(
                    f"the score stands for {implied:,.0f} bytes, the text has {g.val_bytes:,}",
                    g.name,
                )
            elif not near(implied, TEXT_BYTES) and folder.track != "non-record":
                yield Finding(
                    f"scored on {g.val_bytes:,} bytes of another text than the {TEXT_BYTES:,} of "
                    "the validation documents",
                    g.name,
                    folder.track == "record",
                )
        elif g.val_tokens == BASELINE_EXPORT:
            yield Finding(
                f"{g.val_tokens:,} tokens are another export of the validation text", g.name, False
            )
        elif implied is not None:
            if not near(implied, TEXT_BYTES):
                yield Finding(
                    f"the score stands for {implied:,.0f} bytes (x{implied / TEXT_BYTES:.3f} of "
                    f"{TEXT_BYTES:,})",
                    g.name,
                )
        else:
            yield from unusual_ratio(g, ratio)


def unusual_ratio(g: Log, ratio: float) -> Findings:
    """A log without a token count still has bytes per token, which its vocabulary fixes."""
    known = BYTES_PER_TOKEN.get(g.vocabulary or 0, ())
    if g.vocabulary is None:
        known = tuple(r for ratios in BYTES_PER_TOKEN.values() for r in ratios)
    if known and not any(near(ratio, r) for r in known):
        nearest = min(known, key=lambda r: abs(math.log(ratio / r)))
        yield Finding(
            f"{ratio:.4f} bytes per token, want {nearest} (x{ratio / nearest:.3f})",
            g.name,
            g.vocabulary is not None,
        )


def scored_once(folder: Folder) -> Findings:
    for g in folder.logs:
        if g.scored_once is False:
            yield Finding("a score line says scored_once:0", g.name)
        if g.data_tokens and g.val_tokens and g.data_tokens != g.val_tokens:
            yield Finding(f"{g.val_tokens:,} of {g.data_tokens:,} targets scored", g.name)


def too_good(folder: Folder) -> Findings:
    for g in folder.seed_logs:
        before, final = g.before_quantisation, g.official
        if before and final and 0 < final.bpb < TOO_GOOD * before.bpb:
            yield Finding(
                f"{final.bpb:.4f} bits per byte after {before.bpb:.4f} before quantisation: more "
                "than windows and adaptation give",
                g.name,
                False,
            )


# Claims and seeds.
def translated(log: Log) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The configuration in a log of another script in the words of ours: ({our name: value}, a line
    for each option without a counterpart, {our name: their name}). Empty for a log of our own, and
    where train_gpt.py cannot be imported."""
    if log.origins or not log.knobs:
        return {}, [], {}
    switches = {"true": "1", "false": "0"}
    return names_here(tuple((k.upper(), switches.get(v.lower(), v)) for k, v in log.knobs.items()))


@functools.cache
def names_here(options: tuple[tuple[str, str], ...]) -> tuple[dict, list, dict]:
    """What translate() of train_gpt.py says, asked in a process of its own: the script imports
    torch, which needs more memory than a reader of strangers' files should."""
    asked = subprocess.run(
        [sys.executable, "-c", TRANSLATE],
        cwd=Path(__file__).resolve().parents[2],
        input=json.dumps(dict(options)),
        capture_output=True,
        encoding="utf-8",
    )
    return tuple(json.loads(asked.stdout)) if asked.returncode == 0 else ({}, [], {})


TRANSLATE = """
import json, sys
from train_gpt import translate
json.dump(translate(json.load(sys.stdin)), sys.stdout)
"""


def decimals(value: Any) -> int:
    text = repr(value) if not isinstance(value, str) else value.strip()
    return len(text.partition(".")[2]) if "e" not in text else 8


def agrees(claim: Any, value: float, fewest: int = 3) -> bool:
    """Whether a written number is `value` rounded to at least `fewest` decimals, with room for one
    more rounding on the way."""
    written = max(decimals(claim), fewest)
    return abs(number(claim) - value) <= max(0.51 * 10.0**-written, 5.1e-5)


def headline(folder: Folder) -> Findings:
    scores, claim = officials(folder), claimed_bpb(folder)
    if not scores or number(claim) is None:
        return
    every = [c.bpb for g in folder.logs for c in g.claims if is_result(c)]
    if not any(agrees(claim, s) for s in [statistics.mean(scores), *every]):
        yield Finding(
            f"val_bpb {claim} is on no result line of a log; their official scores are "
            + ", ".join(f"{s:.5f}" for s in scores[:6]),
            "submission.json",
            bool(folder.named_logs),
        )
    results = folder.submission.get("seed_results")
    for seed, result in results.items() if isinstance(results, dict) else ():
        mine = [
            c.bpb for g in folder.logs if str(g.seed) == str(seed) for c in g.claims if is_result(c)
        ]
        said = result.get("val_bpb") if isinstance(result, dict) else result
        if mine and number(said) is not None and not any(agrees(said, s) for s in mine):
            yield Finding(
                f"seed {seed}: {said} claimed, {mine[-1]:.5f} logged",
                "submission.json",
                bool(folder.named_logs),
            )


def claimed_loss(folder: Folder) -> Findings:
    """val_loss is nats per token; bits per byte stand there by mistake."""
    official, claim = official_claims(folder), folder.submission.get("val_loss")
    if not official or number(claim) is None:
        return
    mean_loss = statistics.mean(c.loss for c in official)
    losses = [c.loss for g in folder.logs for c in g.claims if is_result(c)]
    if any(agrees(claim, value, 2) for value in [mean_loss, *losses]):
        return
    scores = [statistics.mean(c.bpb for c in official), *(c.bpb for c in official)]
    scores += [number(said) for said in [claimed_bpb(folder)] if said is not None]
    what = "bits per byte" if any(agrees(claim, value) for value in scores) else "in no log"
    yield Finding(
        f"val_loss {claim} is {what}; the logs' mean is {mean_loss:.4f} nats per token",
        "submission.json",
    )


def best_seed(folder: Folder) -> Findings:
    scores, claim = officials(folder), claimed_bpb(folder)
    if len(scores) < 2 or number(claim) is None or agrees(claim, statistics.mean(scores)):
        return
    if agrees(claim, min(scores)):
        yield Finding(
            f"val_bpb {claim} is the best of {len(scores)} seeds; their mean is "
            f"{statistics.mean(scores):.5f}",
            "submission.json",
        )


def spread(folder: Folder) -> Findings:
    scores, claim = officials(folder), folder.submission.get("val_bpb_std")
    if len(scores) < 2 or number(claim) is None:
        return
    wanted, room = statistics.stdev(scores), max(0.6 * 10.0 ** -decimals(claim), 2e-6)
    if abs(number(claim) - wanted) > room:
        why = (
            "that of a population"
            if abs(number(claim) - statistics.pstdev(scores)) <= room
            else "neither kind"
        )
        yield Finding(
            f"val_bpb_std {claim} is {why}; a sample's is {wanted:.6f}", "submission.json"
        )


def claimed_sizes(folder: Folder) -> Findings:
    claim, totals = (
        number(folder.submission.get("bytes_total")),
        [b for g in folder.logs for b in g.total_bytes],
    )
    if claim and totals and min(abs(claim - b) for b in totals) > 2000:
        yield Finding(
            f"bytes_total {claim:,.0f}; the logs say {', '.join(f'{b:,}' for b in totals[:6])}",
            "submission.json",
        )


def seed_count(folder: Folder) -> Findings:
    """Evidence only: early records were merged with one log, the others having been seen
    elsewhere."""
    seeds = {g.seed if g.seed is not None else g.name for g in folder.seed_logs if g.official}
    if folder.track == "record" and len(seeds) < 3:
        yield Finding(f"{len(seeds)} of at least 3 seeds have a finished log", certain=False)


def seed_repeated(folder: Folder) -> Findings:
    names: dict[str, list[Log]] = {}
    for g in folder.logs:
        names.setdefault(g.sha256 or g.name, []).append(g)
    for same in names.values():
        numbers = {m[1] for g in same if (m := re.search(r"seed[_-]?(\d+)", g.name))}
        if len(numbers) > 1:
            yield Finding(
                f"the same log stands for seeds {', '.join(sorted(numbers))}", same[0].name
            )
    seeds = [g.seed for g in folder.seed_logs if g.seed is not None]
    for seed in sorted({s for s in seeds if seeds.count(s) > 1}):
        yield Finding(
            f"seed {seed} stands for {seeds.count(seed)} logs", certain=bool(folder.named_logs)
        )


def mixed_seeds(folder: Folder) -> Findings:
    logs = folder.seed_logs
    ours = {theirs.lower(): name for g in logs for name, theirs in translated(g)[2].items()}
    for name, values in different_knobs(logs).items():
        here = f" ({ours[name]} here)" if ours.get(name, name.upper()) != name.upper() else ""
        yield Finding(
            f"{name}{here} differs: {', '.join(sorted(values))[:120]}",
            certain=bool(folder.named_logs),
        )
    tokens = {g.val_tokens for g in folder.seed_logs if g.val_tokens}
    if len(tokens) > 1:
        yield Finding(
            f"scored tokens differ: {', '.join(f'{t:,}' for t in sorted(tokens))}",
            certain=bool(folder.named_logs),
        )


def mixed_shards(folder: Folder) -> Findings:
    for what in ("train_shards", "manifest"):
        values = {getattr(g, what) for g in folder.seed_logs} - {None}
        if len(values) > 1:
            yield Finding(f"{what} differs: {', '.join(map(str, sorted(values)))}")


def overlap(folder: Folder) -> Findings:
    for g in folder.logs:
        for what, known in OVERLAPPING.items():
            if getattr(g, what) in known:
                yield Finding(
                    f"{what} {getattr(g, what):,} is the fingerprint of data with most validation "
                    "documents in training",
                    g.name,
                )


def noncompliant(folder: Folder) -> Findings:
    """Our own script says so in every line when weights are trained on validation text before it is
    scored; other scripts show it in their configuration."""
    for g in folder.logs:
        ours, _, theirs = translated(g)
        if g.noncompliant:
            yield Finding(
                "its lines are marked [NONCOMPLIANT]: weights were trained on validation text",
                g.name,
            )
        elif ours.get("TTT") == "prequant":
            option = theirs["TTT"].lower()
            yield Finding(
                f"{option}={g.knobs[option]} (TTT=prequant here) trains on validation text",
                g.name,
                False,
            )


# Code.
def code_hash(folder: Folder) -> Findings:
    shipped = {
        hashlib.sha256((folder.path / n).read_bytes()).hexdigest()
        for n, size in folder.files.items()
        if n.endswith(".py") and size < 1 << 23
    }
    sizes = {len(folder.script), len(folder.inner)}
    for g in folder.seed_logs:
        if foreign := [h for h in g.code_sha256 if h not in shipped]:
            yield Finding(f"made by code {foreign[0][:12]}..., which is not in the folder", g.name)
        elif g.code_bytes and not g.code_sha256 and folder.script and not sizes & set(g.code_bytes):
            yield Finding(
                f"code of {g.code_bytes[-1]:,} bytes logged, {len(folder.script):,} shipped",
                g.name,
                False,
            )


def unknown_options(folder: Folder) -> Findings:
    """Options of a log that no code of the folder has. A name may be put together in the code, so a
    few are a warning; more than half mean that the script could not be read."""
    words = set()
    for source in folder.sources:
        words |= set(re.findall(r"\w+", source.text.decode("utf-8", "replace").lower()))
    for g in folder.seed_logs:
        missing = sorted(k for k in g.knobs if k.lower() not in words)
        if missing and len(missing) < 0.5 * len(g.knobs):
            yield Finding(
                f"the log has options that the script lacks: {', '.join(missing[:6])}",
                g.name,
                False,
            )


def calls(folder: Folder) -> Iterator[tuple[str, ast.Call, str]]:
    """(dotted name, call, file) of every call whose function is a plain dotted name."""
    for source in folder.sources:
        for node in source.nodes:
            if isinstance(node, ast.Call) and (name := dotted(node.func)):
                yield name, node, source.name


def dotted(node: ast.expr) -> str:
    """A plain dotted name as text; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def texts(node: ast.AST) -> str:
    return " ".join(
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def runs_program(name: str) -> bool:
    return name.startswith("subprocess.") or name in (
        "os.system",
        "os.popen",
        "Popen",
        "check_output",
        "check_call",
    )


def network(folder: Folder) -> Findings:
    for name, call, file in calls(folder):
        if NETWORK.search(name) or runs_program(name) and PROGRAM.search(texts(call)):
            yield Finding(f"line {call.lineno}: {name}({texts(call)[:60]})", file, False)


def programs(folder: Folder) -> Findings:
    readme = content_text(folder, "README.md")
    for name, call, file in calls(folder):
        said = texts(call.args[0]) if call.args else ""  # not what keywords hold
        words = [w for w in said.split() if w[0] != "-"] if runs_program(name) else []
        if not words or words[0] in readme or PROGRAM.search(said) or words[0] in USUAL_PROGRAMS:
            continue
        yield Finding(
            f"line {call.lineno}: {name} runs {words[0][:60]!r}, which README.md does not name",
            file,
            False,
        )


def content_text(folder: Folder, name: str) -> str:
    """A file of the folder as text, its first million bytes; empty when there is none."""
    if name not in folder.files:
        return ""
    with open(folder.path / name, "rb") as file:
        return file.read(1 << 20).decode("utf-8", "replace")


def side_code(folder: Folder) -> Findings:
    for name, call, file in calls(folder):
        if COMPILED.search(name):
            yield Finding(
                f"line {call.lineno}: {name} runs or compiles a source that must count as code",
                file,
                False,
            )


def imports(folder: Folder) -> Iterator[tuple[str, int, ast.stmt, bool, str]]:
    """(top name, level, statement, guarded by try, file) of each import."""
    for source in folder.sources:
        guarded = guarded_nodes(source)
        for node in source.nodes:
            inside = id(node) in guarded
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name.split(".")[0], 0, node, inside, source.name
            elif isinstance(node, ast.ImportFrom):
                name = (node.module or node.names[0].name).split(".")[0]
                yield name, node.level, node, inside, source.name


def guarded_nodes(source: Source) -> set[int]:
    """Identities of all that stands in the body of a `try`."""
    return {
        id(inner)
        for node in source.nodes
        if isinstance(node, ast.Try)
        for statement in node.body
        for inner in ast.walk(statement)
    }


def shipped_modules(folder: Folder, inside: str = "") -> set[str]:
    """Names of the modules and packages that lie in a folder of the record, by default its top."""
    names = [n.removeprefix(inside) for n in folder.files if n.startswith(inside)]
    return {n.split("/")[0].removesuffix(".py") for n in names if n.endswith(".py")}


def package(file: str, level: int) -> str:
    """The folder in which a relative import of a file looks: "facts/" for one dot in facts/a.py."""
    parts = file.split("/")[:-level]
    return "".join(f"{part}/" for part in parts)


def local_imports(folder: Folder) -> Findings:
    for name, level, node, guarded, file in imports(folder):
        local = level > 0 or SIBLINGS.fullmatch(name)
        beside = shipped_modules(folder, package(file, level) if level else "")
        if local and not guarded and name not in beside:
            yield Finding(f"line {node.lineno}: imports {name}, which is not in the folder", file)


def packages(folder: Folder) -> Findings:
    wanted = content_text(folder, "requirements.txt")
    named = {w.lower().replace("-", "_") for w in re.findall(r"^([\w.-]+)", wanted, re.MULTILINE)}
    known = PACKAGES | named | shipped_modules(folder) | sys.stdlib_module_names
    for name, level, node, guarded, file in imports(folder):
        if level or guarded or name in known or SIBLINGS.fullmatch(name):
            continue
        yield Finding(
            f"line {node.lineno}: {name} is neither shipped nor a package that requirements.txt "
            "names",
            file,
            False,
        )


def words(source: Source) -> Iterator[str]:
    """Names in a script and the texts without blanks that it uses, such as names of variables; not
    comments, documentation or tables in a text. All words of a script that cannot be parsed."""
    if source.tree is None:
        yield from re.findall(r"\w+", source.text.decode("utf-8", "replace"))
    for node in source.nodes:
        for field in ("id", "attr", "arg", "name", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str) and not re.search(r"\s", word):
                yield word


def matches(folder: Folder, pattern: str, what: str) -> Findings:
    for source in folder.sources:
        for word in words(source):
            if re.fullmatch(pattern, word):
                yield Finding(f"{what}: {word[:40]!r} in the code", source.name, False)
                break


def slot(folder: Folder) -> Findings:
    return matches(folder, r"(?i)slot_(?:steps|lr|enabled|delta)", "optimises on the scored window")


def etlb(folder: Folder) -> Findings:
    return matches(folder, r"(?i)etlb(?:_\w+)?", "learns a logit bias on the scored window")


def casefold(folder: Folder) -> Findings:
    return matches(folder, r"(?i)case_?fold(?:ed|ing|_\w+)?", "folds case")


def warmup_on_validation(folder: Folder) -> Findings:
    for source in folder.sources:
        for node in source.nodes:
            if not isinstance(node, ast.FunctionDef) or "warm" not in node.name:
                continue
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            seen = sorted(n for n in names if n.startswith("val_"))
            if "step" in names and seen:
                yield Finding(
                    f"line {node.lineno}: {node.name} steps an optimiser and reads {seen[0]}",
                    source.name,
                    False,
                )


# The folder.
def files(folder: Folder) -> Findings:
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if name not in folder.files:
            yield Finding(f"{name} is missing", certain=name != "train_gpt.py" or not folder.script)
    if not officials(folder):
        yield Finding("no training log with a score", certain=folder.track != "non-record")
    for name in folder.unread_logs:
        yield Finding("no line of it is understood", name, False)
    for g in folder.seed_logs:
        if g.official and not g.finished:
            yield Finding("the log ends in a traceback", g.name)
    if re.search(r"[^\x20-\x7e]", "".join(folder.files)):
        yield Finding("a file name is not plain ASCII", certain=False)
    author = folder.submission.get("author")
    if "author" in folder.submission and not (isinstance(author, (str, list)) and author):
        yield Finding("author is empty", "submission.json", folder.track == "record")


def parses(folder: Folder) -> Findings:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for source in folder.sources:
        if source.tree is None:
            newer = sys.version_info < (3, 12) and NEWER_SYNTAX.search(source.text)
            yield Finding(f"does not parse on Python {version}", source.name, not newer)
        elif source.name == folder.script_name and unopened(source.tree):
            yield Finding(
                "runs text that could not be opened: what it does is unknown", source.name, False
            )


def other_pythons(folder: Folder) -> Findings:
    """Syntax newer than Python 3.10. What only an older interpreter notices (quotes nested in
    f-strings before 3.12) is left to that interpreter."""
    try:
        ast.parse(folder.inner if folder.tree else "", feature_version=(3, 10))
    except SyntaxError as error:
        yield Finding(f"line {error.lineno}: syntax newer than Python 3.10", "train_gpt.py")


def inside(folder: Folder) -> Findings:
    for name in folder.links:
        yield Finding("a link; a record holds its own files", name)


def folder_name(folder: Folder) -> Findings:
    name = folder.path.resolve().name
    if not re.fullmatch(r"20\d\d-\d\d-\d\d_[\w.+-]+", name, re.ASCII) or len(name) > 60:
        yield Finding(f"{name[:80]!r} is not YYYY-MM-DD_Short_Name of at most 60 characters")
    elif re.search(r"_[01]\.\d{3,}", name):
        yield Finding(f"{name!r} holds a score, which goes stale")


def fields(folder: Folder) -> Findings:
    """An integer will do where a float is usual, and null where nothing is known."""
    for key, kind in CORE_FIELDS.items() if folder.submission else ():
        value = folder.submission.get(key, ...)
        if value is ...:
            yield Finding(f"{key} is missing", "submission.json")
        elif value is not None and (
            isinstance(value, bool)
            or not isinstance(value, (int, float) if kind is float else kind)
        ):
            yield Finding(f"{key} is a {type(value).__name__}", "submission.json")


def machine_paths(folder: Folder) -> Findings:
    for g in folder.logs:
        if g.machine_paths:
            yield Finding(f"{g.machine_paths} paths of a machine", g.name)
    for source in folder.sources:
        if MACHINE_PATH.search(source.text):
            yield Finding("a path of a machine", source.name)


# Evidence that the folder brings along.
def evidence(folder: Folder) -> Findings:
    found, hashes = folder.submission.get("evidence"), {}
    results = folder.submission.get("seed_results")
    if isinstance(found, dict) and isinstance(found.get("code_sha256"), str):
        hashes["train_gpt.py"] = found["code_sha256"]
    for result in results.values() if isinstance(results, dict) else ():
        if isinstance(result, dict):
            for what in ("log", "doc_loss", "metrics", "analysis", "artifact"):
                if isinstance(result.get(what), str) and isinstance(
                    result.get(f"{what}_sha256"), str
                ):
                    hashes[result[what]] = result[f"{what}_sha256"]
    for name, wanted in hashes.items():
        if name not in folder.files:
            yield Finding("named in submission.json but not in the folder", name[:100])
        elif folder.files[name] < 1 << 27:
            if hashlib.sha256((folder.path / name).read_bytes()).hexdigest() != wanted:
                yield Finding("its hash is not the one in submission.json", name[:100])


def audits(folder: Folder) -> dict[str, str]:
    """{audit id: status} as recorded in the folder."""
    found = folder.submission.get("evidence")
    listed = found.get("audits") if isinstance(found, dict) else None
    return {str(a.get("id")): str(a.get("status")) for a in listed or () if isinstance(a, dict)}


def audit(names: str, folder: Folder) -> Findings:
    """Recorded audits that failed, of those whose name matches."""
    for name, status in audits(folder).items():
        if status == "fail" and re.fullmatch(names, name):
            yield Finding(f"the recorded audit {name} failed", "submission.json")


def compliance(folder: Folder) -> Findings:
    claimed, done = folder.submission.get("compliance"), audits(folder)
    backed = {
        "artifact_under_16mb",
        "train_under_600s",
        "eval_under_600s",
        "three_seeds",
    }  # other checks see these
    if done.get("suffix_swap") == "pass":
        backed |= {"score_first_ttt", "no_slot", "no_etlb"}
    if done.get("target_swap") == "pass":
        backed.add("no_ngram_cache")
    found = folder.submission.get("evidence")
    if (
        done.get("val_text_unused") == "pass" or isinstance(found, dict) and found.get("ttt")
    ):  # see noncompliant()
        backed.add("no_pre_quant_ttt")
    unbacked = (
        sorted(k for k, v in claimed.items() if v is True and k not in backed)
        if isinstance(claimed, dict)
        else []
    )
    if unbacked:
        yield Finding(
            f"true without a check or an audit: {', '.join(unbacked)[:160]}", "submission.json"
        )


CHECKS: dict[str, Callable[[Folder], Findings]] = {
    f.__name__: f
    for f in (
        cap,
        shipped_size,
        training_time,
        last_step,
        hessian_time,
        evaluation_time,
        all_evaluations,
        implied_bytes,
        scored_once,
        too_good,
        headline,
        claimed_loss,
        best_seed,
        spread,
        claimed_sizes,
        seed_count,
        seed_repeated,
        mixed_seeds,
        mixed_shards,
        overlap,
        noncompliant,
        code_hash,
        unknown_options,
        network,
        programs,
        side_code,
        local_imports,
        packages,
        slot,
        etlb,
        casefold,
        warmup_on_validation,
        files,
        parses,
        other_pythons,
        inside,
        folder_name,
        fields,
        machine_paths,
        evidence,
        compliance,
    )
}
CHECKS |= dict(
    audit_suffix_swap=functools.partial(audit, "suffix_swap"),
    audit_target_swap=functools.partial(audit, "target_swap"),
    audit_state_digest=functools.partial(audit, "state_digest"),
    audit_val_text=functools.partial(audit, "val_text_unused"),
    audits_passed=functools.partial(
        audit, "(?!suffix_swap|target_swap|state_digest|val_text_unused).*"
    ),
)


def level(rule: dict[str, Any], finding: Finding, date: str) -> str:
    """How much a finding weighs: one of LEVELS."""
    if rule["status"] in ("contested", "open"):
        return rule["status"]
    if rule["status"] == "convention" or not finding.certain:
        return "warn"
    return "later" if rule["date"] and date and date < rule["date"] else "fail"


def undecided(folder: Folder) -> list[str]:
    """What a verdict wants and the folder does not show: without it nothing is known to be
    right."""
    reasons = []
    if not folder.script:
        reasons.append("no script")
    elif folder.tree is None or unopened(folder.tree):
        reasons.append("the script could not be opened")
    if not officials(folder):
        reasons.append("no log with a score was read")
    elif claimed_bpb(folder) is None:
        reasons.append("submission.json claims no val_bpb")
    return reasons


def answers(folder: Folder) -> dict[str, Any]:
    """What the author says to findings, {rule id: text}; shown beside them, and never a reason to
    pass."""
    if "answers.json" not in folder.files:
        return {}
    try:
        return read_json(folder.path / "answers.json")
    except ValueError:
        return {}


def check(path: Path) -> dict[str, Any]:
    """Findings of every check, the worst first, and what was looked at. Raises ValueError when
    there is no folder."""
    folder = read_folder(path)
    said, found = answers(folder), []
    for rule in rules():
        done = [
            Finding(evidence, file) for of, file, evidence in folder.problems if of == rule["id"]
        ]
        for finding in [f for name in rule["checks"] for f in CHECKS[name](folder)] + done:
            found.append(
                dict(
                    level=level(rule, finding, folder.date),
                    rule=rule["id"],
                    title=rule["title"],
                    status=rule["status"],
                    date=rule["date"],
                    source=rule["source"],
                    text=rule["text"],
                    evidence=finding.evidence,
                    file=finding.file,
                    answer=said.get(rule["id"]),
                )
            )
    found.sort(key=lambda f: LEVELS.index(f["level"]))
    failed, unknown = any(f["level"] == "fail" for f in found), undecided(folder)
    return dict(
        folder=path.resolve().name,
        track=folder.track or "unknown",
        date=folder.date or None,
        passed=not failed and not unknown,
        verdict="fail" if failed else "cannot tell" if unknown else "pass",
        undecided=unknown,
        findings=found,
        checks=len(CHECKS),
        logs=len(folder.logs),
        wrapped=folder.inner != folder.script,
    )


def as_text(result: dict[str, Any]) -> str:
    """A result for people: one block per finding, with its rule and source."""
    lines = []
    for f in result["findings"]:
        where = f"{f['file']}: " if f["file"] else ""
        lines += [
            f"{f['level']:9} {f['rule']:4} {f['title']} ({f['status']}"
            + (f", {f['date']}" if f["date"] else "")
            + f"; {f['source']})",
            f"{'':15}{where}{f['evidence']}",
        ]
        lines += [f"{'':15}the author answers: {str(f['answer'])[:300]}"] if f["answer"] else []
    verdict = result["verdict"].upper()
    if result["verdict"] == "cannot tell":
        verdict += f" ({'; '.join(result['undecided'])})"
    counts = ", ".join(f"{sum(f['level'] == n for f in result['findings'])} {n}" for n in LEVELS)
    lines.append(
        f"{result['folder']}: {verdict} ({counts}; {result['checks']} checks, "
        f"{result['logs']} logs, track {result['track']})"
    )
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join(lines))

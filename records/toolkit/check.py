"""Judge a record folder by dated rules, from what lies in it alone: nothing is executed, nothing is downloaded.

A check is a function that yields findings. Which rule it serves, and whether that rule binds, is said in rules.json. A
finding fails a folder only when the rule is binding, in force at the folder's date, and the evidence leaves no doubt.
"""

import ast
import functools
import hashlib
import json
import lzma
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from facts.files import number, read_json
from facts.folder import Folder, read_folder
from facts.limits import ARTIFACT_BYTES, EVALUATION_SECONDS, TEXT_BYTES, TRAINING_SECONDS
from facts.logs import Log, different_knobs, is_result

BYTES_PER_TOKEN = {
    1024: (2.43592,),
    4096: (3.31968,),
    8192: (3.72663, 3.15715),
}  # the second: with case operations
TOLERANCE = 0.002  # counts of honest runs agree within this; the smallest real defect is twenty times as large
BASELINE_EXPORT = (
    63_779_840  # tokens of the validation shards that the naive baseline was published with
)
OVERLAPPING = dict(train_shards=(1499,), val_tokens=(9_662_464, 9_662_463))  # fingerprints of #2127
TOO_GOOD = 0.92  # of the bits per byte before quantisation: windows, adaptation and quantisation explain no more
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
COMPILED = re.compile(r"(^|\.)(exec|load_inline|RawModule|RawKernel)$|cpp_extension\.load")
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
    """Evidence found by a check. `certain` is False where only behaviour or a person could decide."""

    evidence: str
    file: str = ""
    certain: bool = True


Findings = Iterator[Finding]


def rules() -> list[dict[str, Any]]:
    """The registry of rules."""
    return json.loads(Path(__file__).with_name("rules.json").read_text(encoding="utf-8"))


def officials(folder: Folder) -> list[float]:
    """Official score of each seed. A log of somebody else may end with another line than the one that counts: then the
    last kind of line that all seeds have and whose mean is the claim."""
    logs, claim = [g for g in folder.seed_logs if g.official], folder.submission.get("val_bpb")
    scores = [{c.label: c.bpb for c in g.claims if is_result(c)} for g in logs]
    shared = [label for label in (scores[-1] if scores else ()) if all(label in s for s in scores)]
    agreeing = [
        label
        for label in shared
        if number(claim) and agrees(claim, statistics.mean(s[label] for s in scores))
    ]
    for label in (agreeing or shared)[-1:]:
        return [s[label] for s in scores]
    return [g.official.bpb for g in logs]


# Budgets.
def cap(folder: Folder) -> Findings:
    """Sizes that were logged with the raw script in them leave open what the packed one would have weighed."""
    packed = 1.25 * len(lzma.compress(folder.inner))
    for g in folder.logs:
        total = max(g.total_bytes, default=(g.model_bytes or 0) + max(g.code_bytes, default=0))
        fits = bool(folder.inner and g.model_bytes) and g.model_bytes + packed <= ARTIFACT_BYTES
        if total > ARTIFACT_BYTES:
            yield Finding(
                f"{total:,} bytes logged" + ", with the script unpacked" * fits, g.name, not fits
            )
    for key in ("bytes_total", "artifact_bytes", "artifact_bytes_max"):
        if (size := number(folder.submission.get(key))) and size > ARTIFACT_BYTES:
            yield Finding(f"{key} is {size:,.0f}", "submission.json")


def shipped_size(folder: Folder) -> Findings:
    """The file in the folder, not a wrapper that was only measured, is what the size rule can be held against."""
    models = [g.model_bytes for g in folder.seed_logs if g.model_bytes]
    models += [size for name, size in folder.files.items() if re.search(r"\.(golf|ptz)$", name)]
    total = len(folder.script) + max(models, default=0)
    if models and folder.script and total > ARTIFACT_BYTES:
        yield Finding(
            f"shipped script {len(folder.script):,} + model {max(models):,} = {total:,} bytes"
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
                    f"scored on {g.val_bytes:,} bytes of another text than the {TEXT_BYTES:,} of the "
                    "validation documents",
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
    vocabulary = number(g.knobs.get("vocab_size"))
    known = (
        BYTES_PER_TOKEN.get(int(vocabulary or 0), ())
        if vocabulary
        else sum(BYTES_PER_TOKEN.values(), ())
    )
    if known and not any(near(ratio, r) for r in known):
        nearest = min(known, key=lambda r: abs(math.log(ratio / r)))
        yield Finding(
            f"{ratio:.4f} bytes per token, want {nearest} (x{ratio / nearest:.3f})",
            g.name,
            vocabulary is not None,
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
                f"{final.bpb:.4f} bits per byte after {before.bpb:.4f} before quantisation: more than "
                "windows and adaptation give",
                g.name,
                False,
            )


# Claims and seeds.
def decimals(value: Any) -> int:
    text = repr(value) if not isinstance(value, str) else value.strip()
    return len(text.partition(".")[2]) if "e" not in text else 8


def agrees(claim: Any, value: float) -> bool:
    """Whether a written number is `value` rounded, with room for one more rounding on the way."""
    return abs(number(claim) - value) <= max(0.51 * 10.0 ** -decimals(claim), 5.1e-5)


def headline(folder: Folder) -> Findings:
    scores, claim = officials(folder), folder.submission.get("val_bpb")
    if not scores or number(claim) is None:
        return
    every = [c.bpb for g in folder.logs for c in g.claims]
    if not any(agrees(claim, s) for s in [statistics.mean(scores), *every]):
        yield Finding(
            f"val_bpb {claim} is in no log; their official scores are "
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


def best_seed(folder: Folder) -> Findings:
    scores, claim = officials(folder), folder.submission.get("val_bpb")
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
    """Evidence only: early records were merged with one log, the others having been seen elsewhere."""
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
    for name, values in different_knobs(folder.seed_logs).items():
        yield Finding(
            f"{name} differs: {', '.join(sorted(values))[:120]}", certain=bool(folder.named_logs)
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
                    f"{what} {getattr(g, what):,} is the fingerprint of data with most validation documents "
                    "in training",
                    g.name,
                )


def noncompliant(folder: Folder) -> Findings:
    """Our own script says so in every line when weights are trained on validation text before it is scored."""
    for g in folder.logs:
        if g.noncompliant:
            yield Finding(
                "its lines are marked [NONCOMPLIANT]: weights were trained on validation text",
                g.name,
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
    words = set(re.findall(r"\w+", folder.inner.decode("utf-8", "replace").lower()))
    for g in folder.seed_logs:
        missing = sorted(k for k in g.knobs if k.lower() not in words)
        if missing and len(missing) < 0.5 * len(g.knobs):  # more: the script could not be read
            yield Finding(
                f"the log has options that the script lacks: {', '.join(missing[:6])}",
                g.name,
                False,
            )


def calls(folder: Folder) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call whose function is a plain dotted name."""
    for node in folder.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            parts, inner = [], node.func
            while isinstance(inner, ast.Attribute):
                parts, inner = [inner.attr, *parts], inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *parts]), node


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
    for name, call in calls(folder):
        if NETWORK.search(name) or runs_program(name) and PROGRAM.search(texts(call)):
            yield Finding(f"line {call.lineno}: {name}({texts(call)[:60]})", "train_gpt.py", False)


def programs(folder: Folder) -> Findings:
    readme = (
        (folder.path / "README.md").read_bytes()[: 1 << 20].decode("utf-8", "replace")
        if "README.md" in folder.files
        else ""
    )
    for name, call in calls(folder):
        words = [w for w in texts(call).split() if w[0] != "-"] if runs_program(name) else []
        if (
            words
            and words[0] not in readme
            and not PROGRAM.search(texts(call))
            and words[0] not in ("nvidia-smi", "git", "python", "python3", "lscpu", "pyminify")
        ):
            yield Finding(
                f"line {call.lineno}: {name} runs {words[0]!r}, which README.md does not name",
                "train_gpt.py",
                False,
            )


def side_code(folder: Folder) -> Findings:
    for name, call in calls(folder):
        if COMPILED.search(name):
            yield Finding(
                f"line {call.lineno}: {name} runs or compiles a source that must count as code",
                "train_gpt.py",
                False,
            )


def imports(folder: Folder) -> Iterator[tuple[str, int, ast.stmt, bool]]:
    """(top name, level, statement, guarded by try) of each import."""
    guarded = {
        id(n) for t in folder.nodes if isinstance(t, ast.Try) for b in t.body for n in ast.walk(b)
    }
    for node in folder.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], 0, node, id(node) in guarded
        elif isinstance(node, ast.ImportFrom):
            yield (
                (node.module or node.names[0].name).split(".")[0],
                node.level,
                node,
                id(node) in guarded,
            )


def shipped_modules(folder: Folder) -> set[str]:
    return {n.split("/")[0].removesuffix(".py") for n in folder.files if n.endswith(".py")}


def local_imports(folder: Folder) -> Findings:
    for name, level, node, guarded in imports(folder):
        local = level > 0 or SIBLINGS.fullmatch(name)
        if local and not guarded and name not in shipped_modules(folder):
            yield Finding(
                f"line {node.lineno}: imports {name}, which is not in the folder", "train_gpt.py"
            )


def packages(folder: Folder) -> Findings:
    wanted = (
        (folder.path / "requirements.txt").read_bytes()[: 1 << 16].decode("utf-8", "replace")
        if "requirements.txt" in folder.files
        else ""
    )
    named = {w.lower().replace("-", "_") for w in re.findall(r"^([\w.-]+)", wanted, re.MULTILINE)}
    known = PACKAGES | named | shipped_modules(folder) | sys.stdlib_module_names
    for name, level, node, guarded in imports(folder):
        if not level and not guarded and name not in known and not SIBLINGS.fullmatch(name):
            yield Finding(
                f"line {node.lineno}: {name} is neither shipped nor a package that requirements.txt names",
                "train_gpt.py",
                False,
            )


def matches(folder: Folder, pattern: bytes, what: str) -> Findings:
    if found := re.search(pattern, folder.inner):
        yield Finding(
            f"{what}: {found[0][:40].decode('utf-8', 'replace')!r} in the script",
            "train_gpt.py",
            False,
        )


def slot(folder: Folder) -> Findings:
    return matches(
        folder, rb"(?i)\bslot_(?:steps|lr|enabled|delta)\b", "optimises on the scored window"
    )


def etlb(folder: Folder) -> Findings:
    return matches(folder, rb"(?i)\betlb(?:_\w+)?\b", "learns a logit bias on the scored window")


def casefold(folder: Folder) -> Findings:
    return matches(folder, rb"(?i)\bcase_?fold(?:ed|ing|_\w+)?\b", "folds case")


def warmup_on_validation(folder: Folder) -> Findings:
    for node in folder.nodes:
        if isinstance(node, ast.FunctionDef) and "warm" in node.name:
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            if "step" in names and (seen := [n for n in names if n.startswith("val_")]):
                yield Finding(
                    f"line {node.lineno}: {node.name} steps an optimiser and reads {seen[0]}",
                    "train_gpt.py",
                    False,
                )


# The folder.
def files(folder: Folder) -> Findings:
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if name not in folder.files:
            yield Finding(f"{name} is missing", certain=name != "train_gpt.py" or not folder.script)
    if not officials(folder):
        yield Finding("no training log with a score", certain=folder.track != "non-record")
    for g in folder.seed_logs:
        if g.official and not g.finished:
            yield Finding("the log ends in a traceback", g.name)
    if re.search(r"[^\x20-\x7e]", "".join(folder.files)):
        yield Finding("a file name is not plain ASCII", certain=False)


def parses(folder: Folder) -> Findings:
    if folder.script and folder.tree is None:
        yield Finding(
            f"does not parse on Python {sys.version_info.major}.{sys.version_info.minor}",
            "train_gpt.py",
        )


def other_pythons(folder: Folder) -> Findings:
    """Syntax newer than Python 3.10. What only an older interpreter notices (quotes nested in f-strings before 3.12)
    is left to that interpreter."""
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
    if MACHINE_PATH.search(folder.inner):
        yield Finding("a path of a machine", "train_gpt.py")


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


def answers(folder: Folder) -> dict[str, Any]:
    """What the author says to findings, {rule id: text}; shown beside them, and never a reason to pass."""
    if "answers.json" not in folder.files:
        return {}
    try:
        return read_json(folder.path / "answers.json")
    except ValueError:
        return {}


def check(path: Path) -> dict[str, Any]:
    """Findings of every check, the worst first, and what was looked at. Raises ValueError when there is no folder."""
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
    return dict(
        folder=path.resolve().name,
        track=folder.track or "unknown",
        date=folder.date or None,
        passed=not any(f["level"] == "fail" for f in found),
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
    counts = ", ".join(f"{sum(f['level'] == n for f in result['findings'])} {n}" for n in LEVELS)
    lines.append(
        f"{result['folder']}: {'PASS' if result['passed'] else 'FAIL'} ({counts}; {result['checks']} checks, "
        f"{result['logs']} logs, track {result['track']})"
    )
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join(lines))

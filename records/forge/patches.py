"""What stands between a patch and a score: gates before it runs, a sandbox while it runs, a second
opinion after.

The static gates are a filter, not a proof. What protects the score is that patched code runs
without a network and may write only to its run folder, and that its artifact is scored again by the
unpatched script.
"""

import ast
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import ForgeError, devices, sandbox
from .campaign_folder import add_code
from .ledger import write_atomic
from .processes import clean_environment, located
from .run_record import FINAL
from .space import CODE, no_treatment
from .view import View

# What a patch may not touch: sections of train_gpt.py by number (runtime, data and bytes, artifact,
# evaluation, main) and, wherever they stand, what is scored, how, and how it is reported.
SECTIONS = (2, 3, 8, 9, 11)
PROTECTED = (
    "RunConfig",
    "DataConfig",
    "EvalConfig",
    "GROUPS",
    "LATE",
    "SYSTEMS",
    "OVERLAYS",
    "PRESETS",
    "PUBLISHED",
    "RULES",
    "model_rules",
    "run_rules",
    "export_rules",
    "eval_rules",
    "load",
    "parse_knob",
    "environment",
    "Clock",
    "true_score",
    "model_bytes",
    "log_lines",
    "main",
)
BANNED_NAMES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "globals",
    "vars",
    "setattr",
    "delattr",
    "breakpoint",
}
BANNED_MODULES = {
    "subprocess",
    "socket",
    "ctypes",
    "pickle",
    "marshal",
    "shelve",
    "urllib",
    "http",
    "requests",
    "asyncio",
    "multiprocessing",
    "threading",
    "shutil",
    "inspect",
    "gc",
    "builtins",
    "importlib",
    "signal",
}
BANNED_CALLS = {
    "os.system",
    "os.popen",
    "os.fork",
    "os.kill",
    "os.remove",
    "os.unlink",
    "open",
    "io.open",
    "os.open",
    "Path.write_bytes",
    "optional_import",
}
BANNED_METHODS = {
    "write_text",
    "write_bytes",
    "unlink",
    "rmdir",
    "read_bytes",
    "read_text",
    "memmap",
}
MAX_LINES = 400
SMOKE_WAIT = 3600.0  # seconds that the smoke run of a patch waits for a device


def names_of(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a script defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    single = isinstance(node, (ast.AnnAssign, ast.AugAssign)) and isinstance(node.target, ast.Name)
    return [node.target.id] if single else []


def protected_digest(source: str) -> dict[str, str]:
    """{protected section or name: hash of its syntax}; comments and layout do not count. Raises
    SyntaxError."""
    starts = []
    for i, line in enumerate(source.splitlines(), 1):
        if m := re.match(r"# -{4} (\d+) \S.* -{3,}$", line):
            starts.append((i, int(m[1])))
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        section = max(((i, n) for i, n in starts if i <= node.lineno), default=(0, -1))[1]
        regions = [n for n in names_of(node) if n in PROTECTED]
        if section in SECTIONS:
            regions.insert(0, f"section {section}")
        for region in regions:
            text = found.get(region, "") + ast.dump(node)
            found[region] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def shared_names(tree: ast.Module) -> set[str]:
    """Modules, functions and classes that the whole script sees."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            found |= {a.asname or a.name.split(".")[0] for a in n.names}
    return found | {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def danger(node: ast.AST, shared: set[str]) -> Iterator[str]:
    """What one piece of syntax could reach outside or change of what is protected."""
    if isinstance(node, ast.Assign):
        for t in node.targets:
            if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name):
                if t.value.id in shared:
                    yield f"assignment to {ast.unparse(t)}"
    if isinstance(node, ast.Global):
        yield "global " + ", ".join(node.names)
    modules = []
    if isinstance(node, ast.Import):
        modules = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    yield from (f"import {m}" for m in modules if m.split(".")[0] in BANNED_MODULES)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        module = name.split(".")[0]
        if name in BANNED_NAMES or name in BANNED_CALLS or module in BANNED_MODULES:
            yield f"call of {name}"
        if isinstance(node.func, ast.Attribute) and node.func.attr in BANNED_METHODS:
            yield f"call of .{node.func.attr}"
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
        if "os.environ" in ast.unparse(node):
            yield "change of os.environ"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.search(r"fineweb_val|final:official|_exact val_loss|audit:", node.value):
            yield f"text {node.value[:40]!r}"
    if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
        if node.attr not in ("__init__", "__doc__"):
            yield f"attribute {node.attr}"


def dangers(source: str) -> list[str]:
    """Statements of a script that could reach outside or change what is protected, one text
    each."""
    tree = ast.parse(source)
    shared = shared_names(tree)
    return [text for node in ast.walk(tree) for text in danger(node, shared)]


def apply_patch(source: str, patch: str) -> str:
    """The script after a unified diff of exactly that file. Raises ForgeError with the reason."""
    lines = source.splitlines()
    result = []
    at = 0
    headers = re.findall(r"^(?:---|\+\+\+) (\S+)", patch, re.M)
    if not headers or any(Path(h).name != "train_gpt.py" for h in headers):
        raise ForgeError("the patch must be a unified diff of train_gpt.py and of nothing else")
    hunks = re.split(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@.*$", patch, flags=re.M)[1:]
    if not hunks:
        raise ForgeError("the patch has no @@ hunk")
    for start, body in zip(hunks[::2], hunks[1::2]):
        begin = int(start) - 1
        if begin < at:
            raise ForgeError("hunks are not in order")
        result += lines[at:begin]
        at = begin
        for line in body.strip("\n").split("\n"):
            if line.startswith("+"):
                result.append(line[1:])
            elif line.startswith(("-", " ")) or not line:
                if at >= len(lines) or lines[at] != line[1:]:
                    raise ForgeError(
                        f"the patch does not apply at line {at + 1}: expected {line[1:60]!r}"
                    )
                result += [lines[at]] if not line.startswith("-") else []
                at += 1
            elif not line.startswith("\\"):
                raise ForgeError(
                    f"line {line[:40]!r} of the patch begins with none of space, + and -"
                )
    return "\n".join(result + lines[at:]) + "\n"


def inspect_patch(source: str, patch: str) -> tuple[str, str]:
    """The patched script and the name of the one knob that it adds. Raises ForgeError naming the
    gate that it failed: applies cleanly, small, valid Python, protected regions untouched, nothing
    that reaches outside, one new switch."""
    patched = apply_patch(source, patch)
    changed = sum(
        line.startswith(("+", "-")) and not line.startswith(("+++", "---"))
        for line in patch.splitlines()
    )
    if changed > MAX_LINES:
        raise ForgeError(f"{changed} changed lines, want at most {MAX_LINES}")
    try:
        after = protected_digest(patched)
    except SyntaxError as error:
        raise ForgeError(f"not Python after the patch: line {error.lineno}: {error.msg}") from None
    before = protected_digest(source)
    touched = sorted(n for n in set(before) | set(after) if before.get(n) != after.get(n))
    if touched:
        raise ForgeError(f"protected: {', '.join(touched)} may not be changed")
    old = dangers(source)
    for danger in dangers(patched):
        if danger in old:
            old.remove(danger)
        else:
            raise ForgeError(f"not allowed in a patch: {danger}")
    knob = re.compile(r"^\s+(\w+): \w+ = knob\(", re.M)
    added = sorted(set(knob.findall(patched)) - set(knob.findall(source)))
    if len(added) != 1 or set(knob.findall(source)) - set(knob.findall(patched)):
        raise ForgeError(
            f"the patch must add exactly one knob whose default keeps the old behaviour, it adds "
            f"{', '.join(added) or 'none'}"
        )
    if barred := no_treatment(added[0].upper()):
        raise ForgeError(barred)
    return patched, added[0].upper()


def execute(
    script: Path, env: dict[str, str], scratch: Path, cage: Sequence[str], seconds: float
) -> subprocess.CompletedProcess:
    """A script's answer under an environment of knobs, in its cage. Raises TimeoutExpired."""
    return subprocess.run(
        [*cage, sys.executable, str(script)],
        env=clean_environment(located(env, script) | dict(PYTHONIOENCODING="utf-8")),
        cwd=scratch,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
    )


def losses(script: Path, env: dict[str, str], scratch: Path, allow_none: bool) -> list[str]:
    """Training losses of a short run in a cage, as printed. Raises ForgeError with the run's
    complaint."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    env = env | dict(RUNS_DIR=str(scratch), RUN_ID="smoke", SEED="1")
    try:
        done = execute(script, env, scratch, sandbox.cage(scratch, script, env, allow_none), 600)
    except subprocess.TimeoutExpired:
        raise ForgeError("the smoke run took more than 600 s") from None
    found = re.findall(r"^step:\d+/\d+ train_loss:(\S+)", done.stdout, re.M)
    if done.returncode or not found:
        complaint = " ".join((done.stderr.strip() or "no loss").split())
        raise ForgeError("the smoke run failed: " + complaint[-300:])
    return found


def admit(patch: str, view: View) -> dict[str, str]:
    """Take patched code into a campaign: all static gates, a cage, and the same losses with the
    switch at its default. Returns {"@code": its digest}; the new switch is documented in
    code/<digest>/patch.json. Raises ForgeError naming the gate."""
    old = view.script(view.state.anchor)
    patched, switch = inspect_patch(old.read_text("utf-8"), patch)
    allowed = view.config["agent"]["allow_unsandboxed"]
    sandbox.require(allowed)
    scratch = view.folder / "scratch"
    scratch.mkdir(exist_ok=True)
    data = old.parent / "data"
    smoke = view.config["base"] | view.config["rungs"].get("smoke", {}).get("env", {})
    with tempfile.TemporaryDirectory(dir=scratch) as folder, free_device(view) as gpu:
        draft = Path(folder) / "train_gpt.py"
        draft.write_text(patched, "utf-8")
        if data.exists():
            (Path(folder) / "data").symlink_to(data.resolve())
        first, second = (losses(s, smoke | gpu, scratch / "smoke", allowed) for s in (old, draft))
        if first != second:
            raise ForgeError(
                f"with {switch} at its default the patch changes the losses of the first "
                f"{len(first)} steps: the old behaviour must stay the default"
            )
        code = add_code(view.folder, draft, data)
    table = dict(switch=switch, parent=old.parent.name, diff=patch)
    write_atomic(view.folder / "code" / code / "patch.json", json.dumps(table, indent=1))
    view.space.switches.add(switch)
    return {CODE: code}


@contextlib.contextmanager
def free_device(view: View) -> Iterator[dict[str, str]]:
    """The environment of a short run beside those of the search: it waits for a GPU that no run
    has, where there are GPUs."""
    base = view.config["base"].get("DEVICE", view.space.base_values.get("DEVICE", "auto"))
    taken = {s for r in view.running() for s in r.slots}
    among = [d for d in devices.visible() if d not in taken] or devices.visible()
    if not among or str(base) == "cpu":
        yield {}
        return
    with devices.held(among, 1, wait=SMOKE_WAIT) as (names, _):
        yield dict(CUDA_VISIBLE_DEVICES=names[0])


# ---- After the run -------------------------------------------------------------------------------
def rescore(
    script: Path, folder: Path, record: dict, given: Sequence[str] = (), allow_none: bool = False
) -> str:
    """Why a patched run's score is not believed; empty when it is: the unpatched script loads the
    artifact, in a cage and on the devices that the run had, and finds the same score, and the score
    fits to what training saw."""
    m = record["metrics"]
    live = m["val_bpb_prequant"]
    if live and abs(m["val_bpb"] - live) > 0.05 + 0.05 * live:
        return f"live weights scored {live}, the artifact {m['val_bpb']}"
    artifact = folder / f"a{record['attempt']}" / "model.golf"
    if not artifact.exists():
        return "no artifact to score again"
    kept = ("THREADS", "DATA_PATH", "TOKENIZER_PATH", "DEVICE")
    env = {k: v for k, v in record["env"].items() if k in kept}
    env |= dict(RUN_MODE="eval", ARTIFACT=str(artifact), RUNS_DIR=str(folder))
    env |= {"CUDA_VISIBLE_DEVICES": ",".join(given)} if given else {}
    try:
        cage = sandbox.cage(folder, script, env, allow_none)
        done = execute(script, env, folder, cage, record["budget"]["kill_s"])
    except subprocess.TimeoutExpired:
        return "scoring again took too long"
    found = FINAL.search(done.stdout)
    if done.returncode or not found:
        return "the unpatched script cannot score it: " + " ".join(done.stderr.split())[-200:]
    if abs(float(found[3]) - m["val_bpb"]) > 1e-3:
        return f"scored {m['val_bpb']}, again {found[3]}"
    return ""

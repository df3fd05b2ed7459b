"""What stands between a patch and a score: gates before it runs, a sandbox while it runs, a second opinion after.

The static gates are a filter, not a proof. What protects the score is that patched code runs without a network and may
write only to its run folder, and that its artifact is scored again by the unpatched script.
"""

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import ForgeError
from .runner import FINAL
from .space import clean_environment, located

# What a patch may not touch: sections of train_gpt.py by number (runtime, data and bytes, artifact, evaluation, main)
# and, wherever they stand, what is scored, how, and how it is reported.
SECTIONS = (2, 3, 8, 9, 11)
PROTECTED = (
    "RunConfig",
    "DataConfig",
    "EvalConfig",
    "GROUPS",
    "PRESETS",
    "RULES",
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
MAX_LINES = 400


def protected_digest(source: str) -> dict[str, str]:
    """{protected section or name: hash of its syntax}; comments and layout do not count. Raises SyntaxError."""
    starts = [
        (i, int(m[1]))
        for i, line in enumerate(source.splitlines(), 1)
        if (m := re.match(r"# -{4} (\d+) \S.* -{3,}$", line))
    ]
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        section = max(((i, n) for i, n in starts if i <= node.lineno), default=(0, -1))[1]
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [t.id for t in targets if isinstance(t, ast.Name)]
        )
        for region in [f"section {section}"] * (section in SECTIONS) + [
            n for n in names if n in PROTECTED
        ]:
            found[region] = hashlib.sha256(
                (found.get(region, "") + ast.dump(node)).encode()
            ).hexdigest()[:16]
    return found


def dangers(source: str) -> list[str]:
    """Statements of a script that could reach outside or change what is protected, one text each."""
    found, tree = [], ast.parse(source)
    shared = {
        a.asname or a.name.split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    } | {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        for t in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
            if (
                isinstance(t, ast.Attribute)
                and isinstance(t.value, ast.Name)
                and t.value.id in shared
            ):
                found.append(f"assignment to {ast.unparse(t)}")
        if isinstance(node, ast.Global):
            found.append("global " + ", ".join(node.names))
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [f"import {m}" for m in modules if m.split(".")[0] in BANNED_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if (
                name in BANNED_NAMES
                or name.split(".")[0] in BANNED_MODULES
                or name
                in (
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
                )
            ):
                found.append(f"call of {name}")
            if isinstance(node.func, ast.Attribute) and node.func.attr in (
                "write_text",
                "write_bytes",
                "unlink",
                "rmdir",
                "read_bytes",
                "read_text",
                "memmap",
            ):
                found.append(f"call of .{node.func.attr}")
        if isinstance(
            node, (ast.Assign, ast.AugAssign, ast.Delete)
        ) and "os.environ" in ast.unparse(node):
            found.append("change of os.environ")
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"fineweb_val|final:official|_exact val_loss|audit:", node.value)
        ):
            found.append(f"text {node.value[:40]!r}")
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("__")
            and node.attr not in ("__init__", "__doc__")
        ):
            found.append(f"attribute {node.attr}")
    return found


def apply_patch(source: str, patch: str) -> str:
    """The script after a unified diff of exactly that file. Raises ForgeError with the reason."""
    lines, result, at = source.splitlines(), [], 0
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
    """The patched script and the name of the one knob that it adds. Raises ForgeError naming the gate that it failed:
    applies cleanly, small, valid Python, protected regions untouched, nothing that reaches outside, one new switch."""
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
    return patched, added[0].upper()


def losses(script: Path, env: dict[str, str], scratch: Path, wrap: list[str]) -> list[str]:
    """Training losses of a short run, as printed. Raises ForgeError with the run's complaint."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    env = clean_environment(
        located(env, script) | dict(RUNS_DIR=str(scratch), RUN_ID="smoke", SEED="1")
    )
    try:
        done = subprocess.run(
            [*wrap, sys.executable, str(script)],
            env=env,
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        raise ForgeError("the smoke run took more than 600 s") from None
    found = re.findall(r"^step:\d+/\d+ train_loss:(\S+)", done.stdout, re.M)
    if done.returncode or not found:
        raise ForgeError(
            "the smoke run failed: " + " ".join((done.stderr.strip() or "no loss").split())[-300:]
        )
    return found


# ---- Sandbox ---------------------------------------------------------------------------------------------------------
def works(command: list[str]) -> bool:
    """Whether a sandbox command runs here."""
    try:
        return subprocess.run([*command, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def sandbox(writable: Path, allow_none: bool = False) -> list[str]:
    """The command that runs patched code without a network, bwrap with only `writable` to write to, or else unshare.
    Raises ForgeError when this machine has neither, unless the campaign allows that."""
    writable.mkdir(parents=True, exist_ok=True)
    bwrap = [
        "bwrap",
        "--ro-bind",
        "/",
        "/",
        "--dev-bind",
        "/dev",
        "/dev",
        "--proc",
        "/proc",
        "--tmpfs",
        "/tmp",
        "--bind",
        str(writable),
        str(writable),
        "--unshare-net",
        "--unshare-pid",
        "--die-with-parent",
    ]
    if shutil.which("bwrap") and works(bwrap):
        return bwrap
    # Root of a user namespace may mount: the whole tree turns read-only, then the run folder writable again.
    script = (
        'mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,bind,ro / && '
        'exec "$@"'
    )
    unshare = ["unshare", "-rnm", "sh", "-c", script, str(writable)]
    if shutil.which("unshare") and works(unshare):
        return unshare
    if shutil.which("unshare") and works(["unshare", "-rn"]):
        return ["unshare", "-rn"]
    if allow_none:
        return []
    raise ForgeError(
        "patches need a sandbox: install bwrap from the distribution, or set [agent] allow_unsandboxed = "
        "true"
    )


def tier() -> str:
    """What protects this machine from patched code, in words."""
    try:
        name = sandbox(Path("runs"))
    except ForgeError:
        return "0: knobs only; patches are refused"
    kind = {"bwrap": "bwrap", "unshare": "unshare"}[name[0]]
    return f"1: {kind}, no network" + ("" if len(name) > 2 else "; the file system stays writable")


# ---- After the run ---------------------------------------------------------------------------------------------------
def rescore(script: Path, folder: Path, record: dict) -> str:
    """Why a patched run's score is not believed; empty when it is: the unpatched script loads the artifact and finds
    the same score, and the score fits to what training saw."""
    m = record["metrics"]
    if (
        m["val_bpb_prequant"]
        and abs(m["val_bpb"] - m["val_bpb_prequant"]) > 0.05 + 0.05 * m["val_bpb_prequant"]
    ):
        return f"live weights scored {m['val_bpb_prequant']}, the artifact {m['val_bpb']}"
    artifact = folder / f"a{record['attempt']}" / "model.golf"
    if not artifact.exists():
        return "no artifact to score again"
    knobs = {
        k: v
        for k, v in record["env"].items()
        if k in ("THREADS", "DATA_PATH", "TOKENIZER_PATH", "DEVICE")
    }
    env = clean_environment(
        located(knobs, script) | dict(RUN_MODE="eval", ARTIFACT=str(artifact), RUNS_DIR=str(folder))
    )
    try:
        done = subprocess.run(
            [sys.executable, str(script)],
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=record["budget"]["kill_s"],
        )
    except subprocess.TimeoutExpired:
        return "scoring again took too long"
    found = FINAL.search(done.stdout)
    if done.returncode or not found:
        return "the unpatched script cannot score it: " + " ".join(done.stderr.split())[-200:]
    if abs(float(found[3]) - m["val_bpb"]) > 1e-3:
        return f"scored {m['val_bpb']}, again {found[3]}"
    return ""


# ---- Doctor ----------------------------------------------------------------------------------------------------------
def doctor(script: Path) -> dict[str, str]:
    """What this machine offers, and whether the script speaks the forge's language."""
    from importlib.metadata import PackageNotFoundError, version

    def package(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    found = dict(
        python=platform.python_version(),
        torch=package("torch"),
        optuna=package("optuna"),
        scipy=package("scipy"),
        remote=f"grpcio {package('grpcio')}",
        slurm=f"submitit {package('submitit')}",
        sandbox=tier(),
        cores=str(len(os.sched_getaffinity(0))),
        disk=f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free",
    )
    text = script.read_text() if script.exists() else ""
    found["script"] = (
        "missing"
        if not text
        else "speaks the log format"
        if "final:official" in text and ("predicted_bytes" in text)
        else "prints no final:official or predicted_bytes line"
    )
    found["protected"] = f"{len(protected_digest(text))} regions"
    return found

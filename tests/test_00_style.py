"""The house rules: size limits, no hidden switches, nothing dead, nothing that executes a
stranger's file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT

import train_gpt

SOURCE = SCRIPT.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
CLASSES = [n for n in ast.walk(TREE) if isinstance(n, ast.ClassDef)]
BANNER = re.compile(r"# -{4} (\d+) ([^:-]+?)(?::.*?)? -{3,}$")
BANNERS = [
    (number, int(m[1]), m[2].strip())
    for number, line in enumerate(LINES, 1)
    if (m := BANNER.match(line))
]
TOP_LEVEL = {"README.md", "data", "records", "requirements.txt", "tests", "train_gpt.py"}
# Overrides whose meaning is said once, on the class or on the interface.
UNDOCUMENTED = {
    "__init__",
    "build",
    "forward",
    "state_dict",
    "load_state_dict",
    "update",
    "apply",
    "shares",
    "batches",
    "rounds",
    "losses",
    "learn",
    "draw",
    "draw_order",
    "row",
    "add",
    "read",
    "out_of_range",
}


def length(node) -> int:
    return node.end_lineno - node.lineno + 1


def section(line: int) -> int:
    """Number of the section that holds a line of train_gpt.py; -1 before the first banner."""
    return max((n for start, n, _ in BANNERS if start <= line), default=-1)


def called(node, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def git_files() -> list[Path]:
    """Tracked files and those that git would track, of this checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The text of a repository file; empty for a binary one."""
    blob = (ROOT / path).read_bytes()
    return "" if b"\0" in blob[:8192] else blob.decode("utf-8", "replace")


def test_the_script_has_few_knobs():
    """A limit that nobody raises: what is over it goes by the keep rule."""
    assert len(train_gpt.KNOBS) <= 160


def test_the_script_is_one_readable_file():
    """At most 260,000 characters: a limit that nobody raises."""
    assert len(SOURCE) <= 260_000


def test_functions_are_short():
    lengths = sorted(length(f) for f in FUNCTIONS)
    long = [f"{f.name}: {length(f)}" for f in FUNCTIONS if length(f) > 60]
    assert not long, "\n" + "\n".join(long)
    assert lengths[int(0.9 * len(lengths))] <= 40, "90th percentile of function lengths"


def ruff(*arguments: str):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_house_style_is_kept():
    """Layout by `ruff format`, 100 columns, no unused or shadowed names: see .ruff.toml."""
    ruff("format", "--check", "--quiet")
    ruff("check", "--quiet")


def test_constructors_take_at_most_six_arguments():
    for f in FUNCTIONS:
        if f.name == "__init__":
            named = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
            assert len(named) - 1 <= 6 and not f.args.vararg and not f.args.kwarg, (
                f"line {f.lineno}"
            )


def test_section_list_of_the_docstring_equals_the_banners():
    listed = re.search(r"Sections: (.*?)\.  ", ast.get_docstring(TREE), re.DOTALL)[1]
    promised = [
        (int(number), name)
        for number, name in (
            item.split(" ", 1) for item in re.split(r"\s*·\s*", listed.replace("\n", " "))
        )
    ]
    assert [(n, name.lower()) for n, name in promised] == [
        (n, name.lower()) for _, n, name in BANNERS
    ]
    assert [n for _, n, _ in BANNERS] == list(range(12))


def test_the_environment_is_read_in_the_first_two_sections_only():
    """Section 0 may set a library's default, as a statement whose value nobody reads."""
    users = [
        n
        for n in ast.walk(TREE)
        if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv", "putenv")
    ]
    defaults = [
        n.value.func.value
        for n in TREE.body
        if isinstance(n, ast.Expr)
        and section(n.lineno) == 0
        and isinstance(n.value, ast.Call)
        and ast.unparse(n.value.func) == "os.environ.setdefault"
    ]
    assert users and not [
        n.lineno for n in users if n not in defaults and section(n.lineno) not in (1, 2)
    ]


def test_no_optional_attributes():
    """getattr with a default hides a misspelt or missing field."""
    assert not [
        n.lineno
        for n in ast.walk(TREE)
        if called(n, "getattr") and len(n.args) + len(n.keywords) > 2
    ]


def test_a_forward_hardly_branches():
    for f in FUNCTIONS:
        if f.name == "forward":
            branches = [n for n in ast.walk(f) if isinstance(n, (ast.If, ast.IfExp, ast.Match))]
            assert len(branches) <= 2, f"line {f.lineno}"


def is_trivial(f: ast.FunctionDef) -> bool:
    """An override, an operator, or one obvious line: a property or a no-argument method of a
    class."""
    return f.name in UNDOCUMENTED or len(f.body) == 1 and length(f) <= 2


def test_classes_and_public_functions_are_documented():
    nested = {id(n) for f in FUNCTIONS for n in ast.walk(f) if n is not f}
    public = [
        f
        for f in FUNCTIONS
        if id(f) not in nested and not f.name.startswith("_") and not is_trivial(f)
    ]
    knob_tables = {cls.__name__ for cls in train_gpt.GROUPS.values()}  # documented knob by knob
    bare = [
        f"{n.name}:{n.lineno}"
        for n in CLASSES + public
        if not ast.get_docstring(n) and n.name not in knob_tables
    ]
    assert not bare, "\n" + "\n".join(bare)


def test_no_knob_is_dead():
    """Every field of a configuration group is read outside section 1, as an attribute of that
    group."""
    groups = {
        "c",
        "o",
        "q",
        "s",
        "cfg",
        "model",
        *train_gpt.GROUPS,
    }  # what a group is called where it is read
    read = {
        n.attr
        for n in ast.walk(TREE)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Load)
        and section(n.lineno) > 1
        and ast.unparse(n.value).split(".")[-1] in groups
    }
    derived = {
        n.attr
        for f in FUNCTIONS
        if section(f.lineno) == 1
        for n in ast.walk(f)
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"
    }  # read by a property of its group
    read_by_load = {"strict_env", "allow_noncompliant"}
    dead = set(train_gpt.KNOBS) - read - derived - read_by_load
    assert not dead, ", ".join(dead)


def test_top_level_holds_the_house_and_nothing_else():
    names = {path.parts[0] for path in git_files()}
    assert not {n for n in names if not n.startswith(".")} - TOP_LEVEL - {"LICENSE"}


def test_no_file_names_a_machine_or_a_package_registry():
    machine = re.compile(r"(?<![\w.:/~-])/(?:home|root|work|tmp|mnt|Users)/\w")
    registry = re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|npmjs\."
    )
    found = [
        f"{path}:{i}"
        for path in git_files()
        for i, line in enumerate(text_of(path).splitlines(), 1)
        if machine.search(line) or registry.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_nothing_executes_what_it_reads():
    for node in ast.walk(TREE):
        assert not called(node, "eval", "exec", "compile", "__import__"), f"line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {m.split(".")[0] for m in modules} & {
                "pickle",
                "marshal",
                "shelve",
                "dill",
                "joblib",
            }
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert (
                flags.get("weights_only") == "True"
                or "allow_pickle" not in flags
                and "np" in ast.unparse(node.func)
            )

"""The shipped wrapper runs the whole job with the same score, counts its own size, and is opened
without being run."""

import ast
import base64
import bz2
import hashlib
import lzma
import os
import re
import subprocess
import sys
import time
import zlib

import pytest
from conftest import ROOT, SCRIPT, clean_env, official
from running import made_once, train

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
from facts import wrappers  # noqa: E402
from toolkit import pack  # noqa: E402

TOOLS = [sys.executable, str(ROOT / "records" / "tools.py")]


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """A packed script in a folder of its own, made by the command line."""
    return (
        made_once(
            tmp_path_factory,
            "packed",
            lambda folder: subprocess.run(
                [*TOOLS, "pack", "--out", str(folder / "new" / "train_gpt.py")],
                check=True,
                timeout=120,
            ),
        )
        / "new/train_gpt.py"
    )


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    return train(toy, tmp_path_factory.mktemp("plain"), "run")


def digest(folder) -> str:
    return hashlib.sha256((folder / "model.golf").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [0, 2])
def test_a_packed_script_runs_the_whole_job_and_gives_the_same_score(
    nproc, wrapper, plain, toy, tmp_path
):
    cache = tmp_path / "cache"
    run = train(toy, tmp_path, "run", nproc=nproc, script=wrapper, XDG_CACHE_HOME=cache)
    assert plain.code == 0 and run.code == 0, run.err
    size = wrapper.stat().st_size
    assert (
        f"sha256:{hashlib.sha256(wrapper.read_bytes()).hexdigest()} wrapped:1 bytes:{size}"
        in run.out
    )
    assert f"\nCode size: {size} bytes" in run.out
    assert (
        f"\nTotal submission size: {size + (run.folder / 'model.golf').stat().st_size} bytes"
        in run.out
    )
    files = list(cache.rglob("*.py"))
    assert len(files) == 1 and files[0].stem == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert files[0].parent.stat().st_mode & 0o77 == 0
    if nproc:  # two ranks add gradients in another order
        both = [float(re.search(r"val_bpb:(\S+)", official(r.out))[1]) for r in (plain, run)]
        assert both[0] == pytest.approx(both[1], rel=1e-3)
    else:
        assert official(run.out) == official(plain.out) and digest(run.folder) == digest(
            plain.folder
        )


@pytest.mark.slow
def test_help_is_that_of_the_script(wrapper, tmp_path):
    env = clean_env(XDG_CACHE_HOME=tmp_path)
    done = subprocess.run(
        [sys.executable, str(wrapper), "--help"], env=env, capture_output=True, text=True
    )
    assert done.stdout == train_gpt.help_text() + "\n"


STUB = """import inspect
def environment(): return {}
def main(argv, env):
    print(main.__code__.co_filename, __file__, inspect.getsource(main)[:15], *argv, sep="|")
    return 3
"""


def test_an_unsafe_or_closed_cache_is_not_used_and_stale_text_is_replaced(tmp_path):
    """Somebody else's writable folder could receive another text between writing and importing."""
    script = tmp_path / "train_gpt.py"
    script.write_bytes(pack.pack(STUB))

    def where(home) -> str:
        done = subprocess.run(
            [sys.executable, str(script), "word"],
            capture_output=True,
            text=True,
            env=clean_env(XDG_CACHE_HOME=home, TMPDIR=tmp_path),
        )
        path, file, source, word = done.stdout.strip().split("|")
        assert (
            done.returncode == 3
            and file == str(script)
            and source == "def main(argv,e"
            and word == "word"
        )
        return path

    good = where(tmp_path / "good")
    assert good.startswith(str(tmp_path / "good"))
    with open(good, "w") as file:
        file.write("raise SystemExit('stale')")
    assert where(tmp_path / "good") == good
    (tmp_path / "open" / "train_gpt").mkdir(parents=True)
    os.chmod(tmp_path / "open" / "train_gpt", 0o777)
    assert not where(tmp_path / "open").startswith(str(tmp_path / "open"))
    (tmp_path / "file").write_text("")
    assert not where(tmp_path / "file").startswith(str(tmp_path / "file"))


@pytest.mark.slow
def test_the_wrapper_is_small_parses_and_reveals_the_minified_script(wrapper):
    packed, source = wrapper.read_bytes(), SCRIPT.read_text(encoding="utf-8")
    assert len(packed) < 0.22 * len(source.encode())
    ast.parse(packed)
    shown = subprocess.run(
        [*TOOLS, "unpack", str(wrapper)], capture_output=True, check=True, timeout=60
    ).stdout
    assert shown == wrappers.unwrapped(packed)
    # shorter names and indentation on top of what goes with comments and docstrings
    bare = ast.parse(source)
    for node in ast.walk(bare):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0].value.value = ""
    assert len(shown) < 0.8 * len(ast.unparse(bare))
    names = {
        n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }
    assert names == {
        n.name for n in ast.parse(shown).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }


def test_any_bytes_survive_the_literal():
    for data in (bytes(range(256)) * 3, b"'''\\\r\n\0" * 5, b"\0" + b"7" * 9, b"\\'", b""):
        text = f"# coding: latin-1\nx = '''{pack.literal(data)}'''.encode('latin-1')\n".encode(
            "latin-1"
        )
        scope = {}
        exec(compile(text, "literal", "exec"), scope)
        assert scope["x"] == data


def test_a_triton_kernel_keeps_its_annotations_and_names():
    source = (
        "import triton\n\n\n@triton.jit\n"
        "def kernel(x_pointer, BLOCK: tl.constexpr):\n    offsets = x_pointer\n"
        '    return offsets\n\n\ndef plain(longer_name: int = 3):\n    """What it does."""\n'
        "    another_name = longer_name + 1\n    return another_name * another_name\n"
    )
    out = pack.minified(source)
    assert "BLOCK:tl.constexpr" in out and "offsets" in out and "x_pointer" in out
    assert "What it does" not in out and "(longer_name=3)" in out and "another_name" not in out


INNER = b"import os\nopen('executed', 'w').write('x')\n" + b"# a line of text\n" * 400
FORMS = {
    "xz, base 85": lambda s: f"exec(d({base64.b85encode(lzma.compress(s))!r}))",
    "raw LZMA2, base 85 text": lambda s: f"exec(d({base64.b85encode(raw_lzma(s)).decode()!r}))",
    "zlib, base 64": lambda s: f"exec(d({base64.b64encode(zlib.compress(s, 0)).decode()!r}))",
    "bz2, hexadecimal": lambda s: (
        f"exec(d({bz2.compress(s + os.urandom(600).hex().encode()).hex()!r}))"
    ),
    "raw LZMA2, short names": lambda s: (
        f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({raw_b85(s)!r}),"
        'format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))'
    ),
    "a name, compiled": lambda s: (
        "from base64 import b85decode as d\nimport zlib\n"
        f"X={base64.b85encode(zlib.compress(s)).decode()!r}\n"
        "exec(compile(zlib.decompress(d(X)).decode(), 'train_gpt.py', 'exec'))"
    ),
    "in pieces": lambda s: (
        f"P=({base64.b64encode(s).decode()[:500]!r}\n +{base64.b64encode(s).decode()[500:]!r})\n"
        "exec(__import__('base64').b64decode(P))"
    ),
    "twice": lambda s: FORMS["xz, base 85"](("import os\n" + FORMS["zlib, base 64"](s)).encode()),
}


def raw_b85(data: bytes) -> str:
    return base64.b85encode(raw_lzma(data)).decode()


def raw_lzma(data: bytes) -> bytes:
    return lzma.compress(
        data + b"#" + os.urandom(600).hex().encode(),
        lzma.FORMAT_RAW,
        filters=[dict(id=lzma.FILTER_LZMA2)],
    )


@pytest.mark.parametrize("form", FORMS)
def test_foreign_wrappers_are_opened_and_never_executed(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = INNER + b"#" + os.urandom(900).hex().encode()
    assert wrappers.unwrapped(f"import os\n{FORMS[form](inner)}\n".encode()).startswith(INNER)
    assert not os.path.exists("executed")


SIBLINGS = {
    "replaced": 'exec(open(__file__.replace("train_gpt.py","other.py")).read())',
    "path": "from pathlib import Path as P\nexec(P(__file__).with_name('other.py').read_text())",
    "with": "import os\nwith open(os.path.join(os.path.dirname(__file__), 'other.py')) as f:\n"
    " exec(f.read())",
    "runpy": "import runpy\nrunpy.run_path('other.py', run_name='__main__')",
    "runpy, module": "from runpy import run_module as r\nr('other')",
    "data": "import lzma\nexec(lzma.decompress(open('other.xz', 'rb').read()))",
    "nested": 'exec(open(__file__.replace("train_gpt.py","first.py")).read())',
}


def test_code_in_a_file_beside_the_script_is_opened(tmp_path, monkeypatch):
    """Finding R2: the code of a merged record lay in a sibling of a stub of one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_bytes(INNER)
    (tmp_path / "other.xz").write_bytes(lzma.compress(INNER))
    (tmp_path / "first.py").write_text(
        FORMS["twice"](INNER + b"#" + os.urandom(900).hex().encode())
    )
    (tmp_path / "loop.py").write_text("exec(open('train_gpt.py').read())\n")
    (tmp_path / "linked.py").symlink_to(tmp_path / "other.py")
    script = tmp_path / "train_gpt.py"
    for name, stub in SIBLINGS.items():
        script.write_text(stub + "\n")
        done = subprocess.run([*TOOLS, "unpack", str(script)], capture_output=True, timeout=60)
        assert done.stdout.startswith(INNER) and done.returncode == 0, (name, done)
    for stub in ("exec(open('loop.py').read())", "exec(open('linked.py').read())", "exec(x)"):
        script.write_text(stub + "\n")
        done = subprocess.run([*TOOLS, "unpack", str(script)], capture_output=True, timeout=60)
        assert done.returncode == 0 and INNER not in done.stdout, stub
    assert not os.path.exists("executed")


NEWER = {
    'f"{", ".join(x)}"': "', '.join(x)",
    "f'{d['k']}'": "d['k']",
    'f"{"\\n".join(x)!r:>{len("ab")}}"': "join",
    'rf"{x!r}\\d{{{y:{"3"}}}}" \'s\' f"{f"{z}"}"': "z",
    'f"{a != b} {a:%H:%M} {{no}}"': "a != b",
    'f"{x:{w}.{p}f}"': "w",
    'f"""{x} it\'s""" + "#{not code"': "not code",
}


def test_f_strings_of_later_pythons_are_read():
    """Finding R2: minified records nest quotes in f-strings, which Python 3.11 cannot parse."""
    for text, kept in NEWER.items():
        source = f"x = 1\ny = {text}  # \"a comment'\nimport last\n"
        tree = wrappers.parsed(source)
        rewritten = ast.parse(wrappers.older_syntax(source))
        assert tree is not None and isinstance(rewritten.body[-1], ast.Import), text
        assert rewritten.body[-1].lineno == 3 and len(rewritten.body) == 3
        assert kept in ast.unparse(rewritten).replace('"', "'"), (text, ast.unparse(rewritten))


def test_opening_takes_little_time_and_memory():
    """A tower of names, of nesting, of concatenations; a source that is all code."""
    tower = "a0='x'*9\n" + "".join(f"a{i + 1}=a{i}+a{i}\n" for i in range(60)) + "exec(a60)\n"
    doubled = "a0='x'\n" + "".join(f"a{i + 1}=a{i}+a{i}\n" for i in range(60)) + "exec(a60)\n"
    nested = "exec(" + "str(" * 3000 + "1" + ")" * 3000 + ")\n"
    open_strings = ["f'{" * 5000, 'f"{x' + "{" * 9000, "x = '" + "\\" * 99_999]
    for source in (tower, doubled, nested, "a=1\n" * 700_000, "exec(a)\na=a\n", *open_strings):
        begin = time.process_time()
        assert wrappers.unwrapped(source.encode()) == source.encode()
        assert time.process_time() - begin < 3, source[:20]


def test_a_bomb_and_nonsense_stay_closed():
    packed = base64.b85encode(lzma.compress(bytes(1 << 25), preset=0))
    bomb = f"import os\nexec(d({packed!r}))\n".encode()
    for source in (
        bomb,
        b"\0\xff",
        b"x = '" + b"A" * 5000 + b"'\n",
        b"(" * 100_000,
        b"def broken(:\n",
    ):
        assert wrappers.unwrapped(source) == source


def test_a_mistake_is_one_line(tmp_path):
    for args in (
        ["pack", str(tmp_path / "none.py"), "--out", str(tmp_path / "x.py")],
        ["pack", str(SCRIPT), "--out", str(SCRIPT)],
    ):
        done = subprocess.run([*TOOLS, *args], capture_output=True, text=True)
        assert done.returncode == 2 and re.fullmatch(r"error: .*\n", done.stderr)

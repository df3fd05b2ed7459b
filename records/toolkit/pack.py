"""Code bytes: train_gpt.py as a small single file, and such files opened again without running them.

The wrapper is itself a Python file. It decompresses the script, writes the text into a private cache folder under its
sha256 and imports it from there, because Triton and `inspect` read the source of functions from a file. `__file__` of
the imported text is the wrapper: what the script says about its own size, hash and folder is true of what is shipped.
"""

import ast
import base64
import binascii
import builtins
import bz2
import contextlib
import functools
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

try:
    import brotli
except ImportError:  # then foreign scripts wrapped with it stay closed
    brotli = None

MAX_SOURCE_BYTES = 1 << 23  # no script is longer; bounds what a hostile wrapper may expand to
MAX_LAYERS = 4
SHORTEST_PAYLOAD = 400  # characters of a literal worth trying to decompress

# What stays readable in a packed script. "{}" receives the compressed text as the inside of a Latin-1 literal: one
# byte per byte, where base 85 would take a quarter more. Other ranks may do the same at the same time; all write the
# same bytes, and the last rename wins.
WRAPPER = """\
# coding: latin-1
# A compressed script: "python records/tools.py unpack FILE" prints it, and runs nothing.
import hashlib,importlib.util as util,lzma,os,pathlib,sys,tempfile
text=lzma.decompress('''{}'''.encode('latin-1'))
try:
 folder=pathlib.Path(os.environ.get('XDG_CACHE_HOME')or pathlib.Path.home()/'.cache')/'train_gpt'
 folder.mkdir(448,True,True)
 if folder.stat().st_uid!=os.getuid()or folder.stat().st_mode&18 or not os.access(folder,2):raise OSError
except(OSError,RuntimeError):folder=pathlib.Path(tempfile.mkdtemp())
path=folder/(hashlib.sha256(text).hexdigest()+'.py')
if not path.is_file()or path.read_bytes()!=text:
 number,new=tempfile.mkstemp(dir=folder)
 with open(number,'wb')as file:file.write(text)
 os.replace(new,path)
spec=util.spec_from_file_location('train_gpt',path)
module=sys.modules['train_gpt']=util.module_from_spec(spec)
module.__file__=__file__
spec.loader.exec_module(module)
if __name__=='__main__':sys.exit(module.main(sys.argv[1:],module.environment()))
sys.modules[__name__]=module
"""


class Stripped(ast.NodeTransformer):
    """Drop docstrings of functions and classes and annotations of arguments; --help needs that of the module. A Triton
    kernel keeps its annotations: `constexpr` is one."""

    def __init__(self):
        self.kernel_names: set[str] = set()  # what must keep its name

    def visit_ClassDef(self, node: ast.ClassDef):
        self.generic_visit(node)
        return self.without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef):
        self.generic_visit(node)
        if any(ast.unparse(d).split("(")[0].endswith("jit") for d in node.decorator_list):
            self.kernel_names |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
            self.kernel_names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - set(
                dir(builtins)
            )
        else:
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        return self.without_docstring(node)

    @staticmethod
    def without_docstring(node):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def minified(source: str) -> str:
    """The script without comments, docstrings and long local names. Global names, attributes and class fields stay:
    knobs are named after fields, and the toolkit calls functions of a packed script."""
    import python_minifier

    strip = Stripped()
    text = ast.unparse(strip.visit(ast.parse(source)))
    keep = python_minifier.RemoveAnnotationsOptions(
        remove_argument_annotations=False, remove_class_attribute_annotations=False
    )
    return python_minifier.minify(
        text,
        remove_annotations=keep,
        remove_literal_statements=False,
        hoist_literals=False,
        preserve_locals=sorted(strip.kernel_names),
    )


def compressed(text: bytes) -> bytes:
    """The smallest .xz of several settings; Python's standard library reads all of them."""

    def settings() -> Iterator[list[dict]]:
        for lc, pb in ((3, 0), (4, 0), (2, 0), (3, 2)):
            yield [
                dict(
                    id=lzma.FILTER_LZMA2,
                    preset=9 | lzma.PRESET_EXTREME,
                    lc=lc,
                    lp=0,
                    pb=pb,
                    nice_len=273,
                    depth=1000,
                )
            ]

    return min(
        (lzma.compress(text, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=s) for s in settings()),
        key=len,
    )


def literal(data: bytes) -> str:
    """Inside of a triple-quoted Latin-1 string literal that means `data`, one character per byte but for a few."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r").replace("'", "\\'")
    return text.replace("\0", "\\x00")


def pack(source: str) -> bytes:
    """Wrap a script into the file that is shipped. Deterministic for one version of Python and of the minifier."""
    return WRAPPER.replace("{}", literal(compressed(minified(source).encode()))).encode("latin-1")


# Opening wrappers, ours and anybody's, as data: nothing of them is executed.
def inflated(data: bytes) -> Iterator[bytes]:
    """Every way to decompress `data` that succeeds, never more than MAX_SOURCE_BYTES."""
    raw = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2)])
    makers = [
        lambda: lzma.LZMADecompressor(memlimit=1 << 27),
        lambda: lzma.LZMADecompressor(**raw),
        bz2.BZ2Decompressor,
    ]
    for make in makers:
        try:
            yield make().decompress(data, MAX_SOURCE_BYTES)
        except (lzma.LZMAError, OSError, ValueError, EOFError):
            continue
    for bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # zlib or gzip, bare deflate
        try:
            yield zlib.decompressobj(bits).decompress(data, MAX_SOURCE_BYTES)
        except zlib.error:
            continue
    if brotli:
        with contextlib.suppress(brotli.error):
            yield brotli.Decompressor().process(data, output_buffer_limit=MAX_SOURCE_BYTES)


def decoded(value: str | bytes) -> Iterator[bytes]:
    """The bytes that a literal may stand for."""
    if isinstance(value, str):
        try:
            value = value.encode("latin-1")
        except UnicodeEncodeError:
            return
    yield value
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode, binascii.unhexlify):
        try:
            yield decode(value)
        except (ValueError, binascii.Error):
            continue


@functools.lru_cache(4)
def parsed(source: bytes | str) -> ast.Module | None:
    """The syntax tree, or None when Python cannot parse it."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, LookupError):
        return None


def inner_source(source: bytes) -> bytes | None:
    """The script inside one layer of wrapping, or None when there is none."""
    tree = parsed(source) if len(source) <= MAX_SOURCE_BYTES else None
    literals = (
        [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant)
            and isinstance(n.value, (str, bytes))
            and len(n.value) >= SHORTEST_PAYLOAD
        ]
        if tree
        else []
    )
    for value in sorted(literals, key=len, reverse=True)[:8]:
        for data in decoded(value):
            for text in inflated(data):
                if (
                    b"\n" in text
                    and len(text) < MAX_SOURCE_BYTES
                    and (inside := parsed(text))
                    and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in inside.body)
                ):
                    return text
    return None


def unwrapped(source: bytes) -> bytes:
    """The innermost script of a wrapper, or the source itself when it is not wrapped."""
    for _ in range(MAX_LAYERS):
        inside = inner_source(source)
        if inside is None:
            return source
        source = inside
    return source


def pack_file(script: Path, out: Path) -> dict:
    """Write the wrapper of a script; returns sizes in bytes. Raises ValueError."""
    source = script.read_text(encoding="utf-8")
    packed = pack(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(packed)
    out.chmod(0o755)
    return dict(
        script=script.name, out=str(out), raw_bytes=script.stat().st_size, packed_bytes=len(packed)
    )

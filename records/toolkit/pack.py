"""Code bytes: train_gpt.py as a small single file, and such files opened again without running
them.

The wrapper is itself a Python file. It decompresses the script, writes the text into a private
cache folder under its sha256 and imports it from there, because Triton and `inspect` read the
source of functions from a file. `__file__` of the imported text is the wrapper: what the script
says about its own size, hash and folder is true of what is shipped.
"""

import ast
import builtins
import lzma
from collections.abc import Iterator
from pathlib import Path

# What stays readable in a packed script. "{}" receives the compressed text as the inside of a
# Latin-1 literal: one byte per byte, where base 85 would take a quarter more. Other ranks may do
# the same at the same time; all write the same bytes, and the last rename wins.
WRAPPER = """\
# coding: latin-1
# A compressed script: "python records/tools.py unpack FILE" prints it, and runs nothing.
import hashlib,importlib.util as util,lzma,os,pathlib,sys,tempfile
text=lzma.decompress('''{}'''.encode('latin-1'))
try:
 folder=pathlib.Path(os.environ.get('XDG_CACHE_HOME')or pathlib.Path.home()/'.cache')/'train_gpt'
 folder.mkdir(448,True,True)
 info=folder.stat()
 if info.st_uid!=os.getuid()or info.st_mode&18 or not os.access(folder,2):raise OSError
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
    """Drop docstrings of functions and classes and annotations of arguments; --help needs that of
    the module. A Triton kernel keeps its annotations: `constexpr` is one."""

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
    """The script without comments, docstrings and long local names. Global names, attributes and
    class fields stay: knobs are named after fields, and the toolkit calls functions of a packed
    script."""
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
    """Inside of a triple-quoted Latin-1 string literal that means `data`, one character per byte
    but for a few."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r").replace("'", "\\'")
    return text.replace("\0", "\\x00")


def pack(source: str) -> bytes:
    """Wrap a script into the file that is shipped. Deterministic for one version of Python and of
    the minifier."""
    return WRAPPER.replace("{}", literal(compressed(minified(source).encode()))).encode("latin-1")


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

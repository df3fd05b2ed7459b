"""The code that really runs: scripts inside wrappers, ours or anybody's, opened as data. Nothing is
ever executed.

A wrapper hands text to `exec`, to `runpy` or to an import of its own making. What it hands over is
worked out from its syntax tree: constants, decoders and decompressors of known names, files beside
it. Where that does not lead to a script, the longest literals are tried with every decoder and
decompressor.
"""

import ast
import base64
import binascii
import bz2
import contextlib
import functools
import io
import lzma
import re
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

try:
    import brotli
except ImportError:  # then foreign scripts wrapped with it stay closed
    brotli = None

MAX_SOURCE_BYTES = 1 << 23  # no script is longer; bounds what a hostile wrapper may expand to
MAX_CODE = 3 << 19  # characters of a script, long literals aside: a tree takes 300 bytes for each
MAX_LAYERS = 6
MAX_STEPS = 5000  # of working out one wrapper
MAX_DICTIONARY = 1 << 27  # bytes of memory that a decompressor may want
SHORTEST_PAYLOAD = 400  # characters of a literal worth trying to decompress
Sibling = Callable[[str], bytes | None]  # content of a file beside the script, by its name


# ---- Python text of any version as a tree
QUOTED = re.compile(r"""(?<!\w)([rRbBuUfF]{0,2})('''|\"\"\"|'|\")""")


def end_of_string(source: str, at: int, quote: str) -> int:
    """Index behind the closing quote of a plain string whose content begins at `at`."""
    while (found := source.find(quote, at)) >= 0:
        slashes = found - len(source[:found].rstrip("\\")) if source[found - 1] == "\\" else 0
        if slashes % 2 == 0:
            return found + len(quote)
        at = found + 1
    raise ValueError("a string is not closed")


def older_code(source: str, at: int, outer: str, until: str) -> tuple[str, int]:
    """Code from `at` to a character of `until` outside brackets, rewritten, and where that is;
    `outer` is the quote of the f-string around it."""
    out, brackets = [], 0
    while at < len(source):
        letter = source[at]
        if not brackets and letter in until and source[at : at + 2] != "!=":
            return "".join(out), at
        if letter in "'\"rRbBuUfF" and (found := QUOTED.match(source, at)):
            text, at = older_string(source, found, outer)
        elif letter == "#":
            end = source.find("\n", at)
            end = len(source) if end < 0 else end
            text, at = source[at:end], end
        else:
            brackets += (letter in "([{") - (letter in ")]}")
            text, at = letter, at + 1
        out.append(text)
    if until:
        raise ValueError("a brace is not closed")
    return "".join(out), at


def older_string(source: str, found: re.Match, outer: str) -> tuple[str, int]:
    """A string literal rewritten, and the index behind it."""
    prefix, quote = found.groups()
    if "f" not in prefix.lower():
        end = end_of_string(source, found.end(), quote)
        text = source[found.start() : end]
        return re.sub(r"\\.", " ", text) if outer else text, end
    wide = {"": quote[0] * 3, "'''": '"""', '"""': "'''"}[outer]
    text, end = older_literal(source, found.end(), quote, wide, "r" in prefix.lower())
    return f"{prefix}{wide}{text}{wide}", end + len(quote)


def older_literal(source: str, at: int, stop: str, wide: str, raw: bool) -> tuple[str, int]:
    """The text of an f-string, or of a format in it, up to `stop`, with what stands in its braces
    rewritten."""
    out = []
    while not source.startswith(stop, at):
        if at >= len(source):
            raise ValueError("an f-string is not closed")
        pair = source[at : at + 2]
        if pair in ("{{", "}}") or pair[0] == "\\":
            out.append(pair)
            at += 2
        elif pair[0] == "{":
            code, at = older_code(source, at + 1, wide, "!:}")
            out.append("{" + code)
            if source[at] == "!":
                end = at + 2
                out.append(source[at:end])
                at = end
            if source[at : at + 1] == ":":
                text, at = older_literal(source, at + 1, "}", wide, raw)
                out.append(":" + text)
            out.append("}")
            at += 1
        else:
            out.append(pair[0])
            at += 1
    return "".join(out), at


def older_syntax(source: str) -> str:
    """A script whose f-strings older parsers read: since Python 3.12 an f-string may nest its own
    quotes and hold backslashes in its braces. Quotes become triple, such backslashes blanks; line
    numbers stay. Raises ValueError."""
    return older_code(source, 0, "", "")[0]


@functools.lru_cache(4)
def parsed(source: bytes | str) -> ast.Module | None:
    """The syntax tree, or None when this Python cannot parse it even with the f-strings of later
    ones rewritten."""
    lost = (SyntaxError, ValueError, RecursionError, MemoryError, LookupError)
    if len(source) > MAX_CODE and code_length(source) > MAX_CODE:
        return None
    try:
        return ast.parse(source)
    except lost:
        if sys.version_info >= (3, 12) or len(source) > MAX_CODE:
            return None
    try:
        text = source if isinstance(source, str) else decoded_text(source)
        return ast.parse(older_syntax(text))
    except (*lost, KeyError, IndexError):
        return None


def code_length(source: bytes | str) -> int:
    """Characters of a source without its long literals on one line."""
    text = source if isinstance(source, bytes) else source.encode("utf-8", "replace")
    return len(text) - sum(len(x) for x in re.findall(rb"[^\s'\"\\]{400,}", text))


def decoded_text(source: bytes) -> str:
    """Python source as text, by its own coding line. Raises SyntaxError, LookupError or
    ValueError."""
    coding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return source.decode(coding)


# ---- Decoders and decompressors
def inflated(data: bytes, **options) -> Iterator[bytes]:
    """Every way to decompress `data` that succeeds, never more than MAX_SOURCE_BYTES. `options` are
    those of lzma."""
    makers = [
        lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY),
        lambda: lzma.LZMADecompressor(
            lzma.FORMAT_RAW, filters=options.get("filters") or [dict(id=lzma.FILTER_LZMA2)]
        ),
        bz2.BZ2Decompressor,
    ]
    for make in makers:
        with contextlib.suppress(lzma.LZMAError, OSError, ValueError, EOFError, TypeError):
            yield make().decompress(data, MAX_SOURCE_BYTES)
    for bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # zlib or gzip, bare deflate
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj(bits).decompress(data, MAX_SOURCE_BYTES)
    if brotli:
        with contextlib.suppress(brotli.error):
            yield brotli.Decompressor().process(data, output_buffer_limit=MAX_SOURCE_BYTES)


DECODERS = dict(
    b85decode=base64.b85decode,
    b64decode=base64.b64decode,
    a85decode=base64.a85decode,
    b32decode=base64.b32decode,
    b16decode=base64.b16decode,
    urlsafe_b64decode=base64.urlsafe_b64decode,
    standard_b64decode=base64.standard_b64decode,
    a2b_base64=binascii.a2b_base64,
    unhexlify=binascii.unhexlify,
    a2b_hex=binascii.unhexlify,
)


def decoded(value: str | bytes) -> Iterator[bytes]:
    """The bytes that a literal may stand for."""
    if isinstance(value, str):
        try:
            value = value.encode("latin-1")
        except UnicodeEncodeError:
            return
    yield value
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode, binascii.unhexlify):
        with contextlib.suppress(ValueError):
            yield decode(value)


def is_script(text: Any) -> bool:
    """Whether a value is the text of a Python program that does more than start something: it has
    an import at the beginning of a line. The text need not parse here, it may be of another version
    of Python."""
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    return (
        isinstance(text, bytes)
        and len(text) < MAX_SOURCE_BYTES
        and b"\0" not in text
        and re.search(rb"^[ \t]*(?:import|from)[ \t]+\w|\bimport[ \t]+\w", text, re.MULTILINE)
        is not None
    )


# ---- What a wrapper hands over
class File(NamedTuple):
    """A file beside the script that code opens or names."""

    name: str


class Lost(Exception):
    """An expression that is not worked out."""


def base_name(path: Any) -> str:
    """The last part of a path: only files beside the script are looked at."""
    path = path.name if isinstance(path, File) else path
    if not isinstance(path, str):
        raise Lost
    return path.replace("\\", "/").rsplit("/", 1)[-1]


class Reader:
    """Works out expressions of one script as data."""

    def __init__(self, tree: ast.Module, name: str, sibling: Sibling):
        self.name, self.sibling, self.steps = name, sibling, 0
        self.values: dict[str, ast.expr] = {}  # what a name was last set to
        self.aliases: dict[str, str] = {}  # {local name: dotted name}
        self.files: list[str] = []  # files beside the script that were read
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.values[node.targets[0].id] = node.value
            elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
                self.values[node.optional_vars.id] = node.context_expr
            elif isinstance(node, ast.Import):
                for a in node.names:
                    self.aliases[a.asname or a.name.split(".")[0]] = (
                        a.name if a.asname else a.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                for a in node.names:
                    self.aliases[a.asname or a.name] = f"{node.module or ''}.{a.name}"

    def dotted(self, node: ast.expr) -> str:
        """Name of a function with its aliases resolved, e.g. "base64.b85decode"; empty when it has
        none."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Call) and self.dotted(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            module = self.value(node.args[0]) if node.args else ""
            return ".".join([str(module), *reversed(parts)])
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.aliases.get(node.id, node.id), *reversed(parts)])

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for: text, bytes, a number, a list or mapping of those, or a
        File. Raises Lost."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Lost
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.named(node.id)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(n) for n in node.elts]
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values)}
        if isinstance(node, ast.BinOp):
            return self.combined(node)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.called(node)
        raise Lost

    def named(self, name: str) -> Any:
        if name == "__file__":
            return self.name
        node = self.values.pop(name, None)  # popped, so that a name defined by itself ends
        if node is None:
            raise Lost
        try:
            return self.value(node)
        finally:
            self.values[name] = node

    def combined(self, node: ast.BinOp) -> Any:
        """Concatenation, or a path put together with /."""
        left, right = self.value(node.left), self.value(node.right)
        if (
            isinstance(node.op, ast.Add)
            and type(left) is type(right)
            and isinstance(left, (str, bytes))
        ):
            if len(left) + len(right) <= MAX_SOURCE_BYTES:
                return left + right
        if isinstance(node.op, ast.Div) and isinstance(right, str):
            return right
        if isinstance(node.op, ast.BitOr) and isinstance(left, int) and isinstance(right, int):
            return left | right
        raise Lost

    def attribute(self, node: ast.Attribute) -> Any:
        """A constant of lzma, or the folder or name of a path."""
        module, _, name = self.dotted(node).rpartition(".")
        if module == "lzma" and name.isupper() and isinstance(getattr(lzma, name, None), int):
            return getattr(lzma, name)
        value = self.value(node.value)
        if isinstance(value, (str, File)) and node.attr in ("parent", "name"):
            return "" if node.attr == "parent" else base_name(value)
        raise Lost

    def called(self, node: ast.Call) -> Any:
        """The result of a call that is known; everything else is Lost."""
        name = self.dotted(node.func)
        last = name.rpartition(".")[2]
        if last in (
            "compile",
            "str",
            "bytes",
            "bytearray",
            "Path",
            "abspath",
            "realpath",
            "fspath",
        ):
            return self.value(node.args[0]) if node.args else ""
        if last == "dirname":
            return ""
        if name in ("os.path.join", "posixpath.join"):
            return self.value(node.args[-1])
        if last == "fromhex":
            return self.decode(bytes.fromhex, self.value(node.args[0]))
        if name in ("open", "io.open"):
            return File(base_name(self.value(node.args[0])))
        if last in DECODERS:
            return self.decode(DECODERS[last], self.value(node.args[0]))
        if last in ("decompress", "process"):
            return self.decompressed(node)
        if isinstance(node.func, ast.Attribute):
            return self.method(node.func, node.args)
        raise Lost

    @staticmethod
    def decode(decode: Callable, value: Any) -> bytes:
        try:
            return decode(value)
        except (ValueError, TypeError):
            raise Lost from None

    def decompressed(self, node: ast.Call) -> bytes:
        """What one of the compressors that are known unpacks from the first argument."""
        options = {}
        for keyword in node.keywords:
            if keyword.arg == "filters":
                options["filters"] = self.value(keyword.value)
        for entry in options.get("filters") or ():
            if not isinstance(entry, dict) or int(entry.get("dict_size") or 0) > MAX_DICTIONARY:
                raise Lost
        data = self.value(node.args[0])
        if isinstance(data, File):
            data = self.content(data)
        if not isinstance(data, bytes):
            raise Lost
        for text in inflated(data, **options):
            return text
        raise Lost

    def content(self, file: File) -> bytes:
        """The bytes of a file beside the script. Raises Lost when there is none."""
        found = self.sibling(file.name)
        if found is None:
            raise Lost
        self.files.append(file.name)
        return found

    def method(self, function: ast.Attribute, args: list[ast.expr]) -> Any:
        """A method of a text, of bytes, of a path or of an open file."""
        value, name = self.value(function.value), function.attr
        if name in ("read", "read_bytes", "read_text"):
            return self.content(File(base_name(value)))
        if name in ("resolve", "absolute", "expanduser", "strip", "rstrip", "lstrip"):
            return (
                value.strip()
                if name.endswith("strip") and isinstance(value, (str, bytes))
                else value
            )
        if name in ("with_name", "joinpath"):
            return base_name(self.value(args[-1]))
        if name == "with_suffix":
            return base_name(value).rsplit(".", 1)[0] + self.value(args[0])
        if name == "open":
            return File(base_name(value))
        if name == "replace" and len(args) == 2 and isinstance(value, (str, bytes)):
            old, new = self.value(args[0]), self.value(args[1])
            if type(old) is type(new) is type(value) and old and len(new) <= 2 * len(old) + 100:
                return value.replace(old, new)
        if name in ("encode", "decode") and isinstance(value, (str, bytes)):
            coding = self.value(args[0]) if args else "utf-8"
            with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError):
                return getattr(value, name)(coding)
        if name == "join" and isinstance(value, (str, bytes)):
            with contextlib.suppress(TypeError):
                return value.join(self.value(args[0]))
        raise Lost

    def handed_over(self, node: ast.Call) -> Any:
        """The source that a call runs: `exec(text)`, or a file beside the script. Raises Lost."""
        name = self.dotted(node.func)
        if name in ("exec", "builtins.exec", "eval", "builtins.eval"):
            return self.value(node.args[0])
        if name == "runpy.run_path":
            return self.content(File(base_name(self.value(node.args[0]))))
        if name in ("runpy.run_module", "importlib.import_module", "__import__"):
            return self.content(File(base_name(self.value(node.args[0])) + ".py"))
        if name.endswith("spec_from_file_location") and len(node.args) > 1:
            return self.content(File(base_name(self.value(node.args[1]))))
        if name.endswith("SourceFileLoader") and len(node.args) > 1:
            return self.content(File(base_name(self.value(node.args[1]))))
        raise Lost


STARTERS = ("exec", "builtins.exec", "runpy.run_path", "runpy.run_module", "runpy._run_code")


class Layer(NamedTuple):
    """What one layer of wrapping gives way to."""

    source: bytes
    files: tuple[str, ...] = ()  # beside the script, read on the way


def starts_of(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that a script makes when it starts: not those inside its functions and classes."""
    waiting: list[ast.AST] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def handed_over(tree: ast.Module, name: str, sibling: Sibling) -> Layer | None:
    """The script that a wrapper starts, worked out from its tree; None when it starts none."""
    reader = Reader(tree, name, sibling)
    for call in starts_of(tree):
        reader.files.clear()
        try:
            found = reader.handed_over(call)
            found = reader.content(found) if isinstance(found, File) else found
        except (Lost, IndexError, TypeError, ValueError, RecursionError):
            continue
        if isinstance(found, str):
            found = found.encode("utf-8", "surrogatepass")
        if (
            isinstance(found, bytes)
            and (reader.files or is_script(found))
            and len(found) < MAX_SOURCE_BYTES
        ):
            return Layer(found, tuple(reader.files))
    return None


def unopened(tree: ast.Module) -> bool:
    """Whether a script without functions of its own starts text that could not be worked out."""
    if any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in tree.body):
        return False
    reader = Reader(tree, "train_gpt.py", no_sibling)
    return any(reader.dotted(call.func) in STARTERS for call in starts_of(tree))


def hidden_in(tree: ast.Module) -> Layer | None:
    """A script among the longest literals, whatever is done with them."""
    literals = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant)
        and isinstance(n.value, (str, bytes))
        and len(n.value) >= SHORTEST_PAYLOAD
    ]
    for value in sorted(literals, key=len, reverse=True)[:8]:
        for data in decoded(value):
            for text in inflated(data):
                if b"\n" in text and is_script(text) and is_text(text):
                    return Layer(text)
    return None


def is_text(data: bytes) -> bool:
    """Whether bytes are UTF-8 text."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def no_sibling(name: str) -> None:
    """A script that lies alone."""


def layers(source: bytes, name: str = "train_gpt.py", sibling: Sibling = no_sibling) -> list[Layer]:
    """The script as it is, then what each layer of wrapping gives way to; the last is the one that
    does the work."""
    found = [Layer(source)]
    while len(found) <= MAX_LAYERS and len(found[-1].source) <= MAX_SOURCE_BYTES:
        tree = parsed(found[-1].source)
        inside = (handed_over(tree, name, sibling) or hidden_in(tree)) if tree else None
        if inside is None or any(inside.source == layer.source for layer in found):
            break
        found.append(inside)
    return found


def unwrapped(source: bytes, name: str = "train_gpt.py", sibling: Sibling = no_sibling) -> bytes:
    """The innermost script of a wrapper, or the source itself when it is not wrapped."""
    return layers(source, name, sibling)[-1].source

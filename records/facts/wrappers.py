"""The script inside a compressed script, ours or anybody's, opened as data: nothing of it is executed."""

import ast
import base64
import binascii
import bz2
import contextlib
import functools
import lzma
import zlib
from collections.abc import Iterator

try:
    import brotli
except ImportError:  # then foreign scripts wrapped with it stay closed
    brotli = None

MAX_SOURCE_BYTES = 1 << 23  # no script is longer; bounds what a hostile wrapper may expand to


MAX_LAYERS = 4


SHORTEST_PAYLOAD = 400  # characters of a literal worth trying to decompress


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

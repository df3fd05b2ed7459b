"""Documents of text files as people have them.

Any line ending, encoding mark and compression; blank lines between, JSON lines or JSON arrays.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build_sample import SEPARATOR
from documents import DataError

CHUNK = 1 << 22  # bytes that are decoded at a time
PACKED_CHUNK = 1 << 16  # compressed bytes of a .zst that are expanded at a time
LONGEST_ITEM = 1 << 28  # characters of one item of a JSON array

COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
JSON_KINDS = (".jsonl", ".ndjson", ".json")
# What is no text although it would be read as such; each with what it is.
NOT_TEXT = {
    **dict.fromkeys((".csv", ".tsv"), "a table"),
    **dict.fromkeys((".arrow", ".feather", ".pkl", ".npy", ".npz", ".h5"), "a binary table"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive"),
    ".bin": "a file of tokens (`reencode` takes a folder of shards)",
}
SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a rar archive",
    b"PAR1": "a parquet file: call it .parquet",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF",
}
# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


# ---- Bytes ----


def unpacked(path: Path) -> Iterator[bytes]:
    """The content of a file in pieces, decompressed as its first bytes (or .lzma) tell."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        yield from unpacked_zstd(path)
        return
    opener = open
    if start.startswith(b"\x1f\x8b"):
        opener = gzip.open
    elif start.startswith(b"BZh"):
        opener = bz2.open
    elif start.startswith(b"\xfd7zXZ\0") or path.suffix == ".lzma":
        opener = lzma.open
    with opener(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def unpacked_zstd(path: Path) -> Iterator[bytes]:
    """The content of a .zst file of one or more frames. Raises EOFError when the last is cut."""
    if not importlib.util.find_spec("zstandard"):
        raise DataError(f"{path.name}: reading .zst needs the package zstandard (pip install it)")
    import zstandard

    def new_frame():
        # 2 GiB is the window of `zstd --long=31`, the largest there is.
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    frame = None
    try:
        with open(path, "rb") as file:
            while piece := file.read(PACKED_CHUNK):
                while piece:
                    frame = frame or new_frame()
                    yield frame.decompress(piece)
                    piece = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path.name}: damaged .zst ({error})") from None
    if frame is not None:
        raise EOFError("Compressed file ended before the end of its last frame")


def refuse_what_is_no_text(start: bytes, path: Path):
    """Raises DataError when the first bytes of a file are those of a format without plain text."""
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            raise DataError(f"{path.name}: this is {kind}, no text; unpack or convert it first")
    if start[257:262] == b"ustar":
        raise DataError(f"{path.name}: this is a tar archive, no text; unpack it first")
    sample = start[:4096]
    if 5 * sample.count(0) > len(sample) and not start.startswith(tuple(MARKS)):
        raise DataError(
            f"{path.name}: every {len(sample) / sample.count(0):.1f}th byte is zero: UTF-16 or "
            "UTF-32 without a byte-order mark, or no text; convert it to UTF-8"
        )


# ---- Text ----


def text_of(path: Path) -> Iterator[str]:
    r"""The text of a file in pieces that are not empty: decompressed; decoded as its byte-order
    mark says, without one as UTF-8; every line ending (\r\n, \r, \n) is \n. Raises DataError."""
    decoder, total = None, 0
    try:
        for raw in unpacked(path):
            if decoder is None:
                refuse_what_is_no_text(raw, path)
                marks = [name for mark, name in MARKS.items() if raw.startswith(mark)]
                coding = codecs.getincrementaldecoder(marks[0] if marks else "utf-8")
                decoder = io.IncrementalNewlineDecoder(coding(), translate=True)
            total += len(raw)
            if text := decoder.decode(raw):
                yield text
        if decoder and (text := decoder.decode(b"", final=True)):
            yield text
    except UnicodeDecodeError as error:
        at = total - len(error.object) + error.start
        name = error.encoding.upper().removesuffix("-SIG")
        raise DataError(
            f"{path.name}: byte {at} is not valid {name}; convert it to UTF-8 (iconv -t UTF-8)"
        ) from None


def lines_of(chunks: Iterator[str]) -> Iterator[str]:
    """Lines of a text that comes in pieces, however long they are."""
    held: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        held.append(first)
        for line in others:
            yield "".join(held)
            held = [line]
    yield "".join(held)


def separated(path: Path) -> Iterator[str]:
    """Documents of a text file that are separated by one blank line."""
    held: list[str] = []
    tail = ""  # a line ending that may be the first half of a separator
    for chunk in itertools.chain(text_of(path), [""]):
        chunk = tail + chunk
        odd = (len(chunk) - len(chunk.rstrip("\n"))) % 2
        tail = chunk[len(chunk) - odd :]
        first, *others = chunk[: len(chunk) - odd].split(SEPARATOR)
        held.append(first)
        for piece in others:
            yield "".join(held)
            held = [piece]
    yield "".join([*held, tail])


# ---- JSON ----


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line of a file of JSON lines, or of every item of one JSON array.
    Raises DataError that names the place."""
    chunks = text_of(path)
    start = ""
    while not start.strip() and (chunk := next(chunks, "")):
        start += chunk
    chunks = itertools.chain([start], chunks)
    is_array = start.lstrip().startswith("[")
    number = 0
    try:
        if is_array:
            for number, value in enumerate(items_of_array(chunks), 1):
                yield f"item {number}", value
            return
        for number, line in enumerate(lines_of(chunks), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        bad = f"item {number + 1}" if is_array else f"line {number}"
        hint = "; want JSON lines (one document a line) or one JSON array"
        raise DataError(f"{path.name}, {bad}: {error}{hint}") from None


def items_of_array(chunks: Iterator[str]) -> Iterator[Any]:
    """Items of one JSON array whose text comes in pieces. Raises ValueError for anything else."""
    read_value = json.JSONDecoder().raw_decode
    spaces = re.compile(r"[ \t\n\r]*")
    text = next(chunks)
    at = text.index("[") + 1
    wants_comma = False
    ask = 1  # pieces to read when an item goes on beyond the text
    while True:
        at = spaces.match(text, at).end()
        if at == len(text):
            text, at = next(chunks, ""), 0
            if not text:
                raise ValueError("the array does not end")
        elif text[at] == "]":
            rest = itertools.chain([text[at + 1 :]], chunks)
            if any(piece.strip() for piece in rest):
                raise ValueError("something follows the array")
            return
        elif wants_comma:
            if text[at] != ",":
                raise ValueError("no comma between two items")
            at += 1
            wants_comma = False
        else:
            try:
                value, at = read_value(text, at)
            except json.JSONDecodeError:
                more = "".join(itertools.islice(chunks, ask))
                if not more or len(text) - at > LONGEST_ITEM:
                    raise
                text, at = text[at:] + more, 0
                ask *= 2
                continue
            yield value
            wants_comma = True
            ask = 1


def json_documents(path: Path, field: str) -> Iterator[str]:
    """Documents of JSON lines or an array: objects with the text in a field, or JSON strings."""
    for place, value in json_values(path):
        if isinstance(value, dict):
            if field not in value:
                has = ", ".join(sorted(map(str, value))[:8]) or "none"
                raise DataError(
                    f"{path.name}, {place}: no field {field!r} (there are: {has}); see --field"
                )
            value = value[field]
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{path.name}, {place}: {field!r} is no text but {kind}")
        yield value


# ---- Files ----


def table_rows(path: Path, field: str) -> Iterator[str]:
    """Documents of a .parquet file: the rows of a column."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{path.name}: reading parquet needs the package pyarrow, which is not installed"
        ) from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(f"{path.name}: no column {field!r}; it has {', '.join(names)}")
        for batch in table.iter_batches(columns=[field], batch_size=256):
            for row in batch.column(0).to_pylist():
                if not isinstance(row, str):
                    raise DataError(f"{path.name}: column {field!r} has a row without text")
                yield row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name}: {error}") from None


def kind_of(path: Path) -> str:
    """The suffix that tells what a file holds, lower case, that of a compression left out."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def documents_of_file(path: Path, field: str) -> Iterator[str]:
    """The reader that the name of a file asks for. Raises DataError for a format without text."""
    kind = kind_of(path)
    if kind in NOT_TEXT:
        raise DataError(f"{path.name}: {NOT_TEXT[kind]}; want .txt, .jsonl, .json or .parquet")
    if kind == ".parquet":
        return table_rows(path, field)
    if kind in JSON_KINDS:
        return json_documents(path, field)
    return separated(path)


def refuse_surrogates(text: str, where: str):
    """Raises DataError for text that UTF-8 cannot write (half of a UTF-16 pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: a lone surrogate is not valid text") from None


def documents_of(paths: list[Path], field: str) -> Iterator[str]:
    """Every document of some files, in order, blank ones included. Raises DataError that names file
    and place for what is no text."""
    for path in paths:
        try:
            for number, text in enumerate(documents_of_file(path, field), 1):
                refuse_surrogates(text, f"{path.name}, document {number}")
                yield text
        except OSError as error:
            raise DataError(f"{path.name}: {error.strerror or error}") from None
        except (lzma.LZMAError, EOFError, zlib.error) as error:
            raise DataError(f"{path.name}: {error}") from None

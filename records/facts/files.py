"""Files that matter are written whole or not at all; files of strangers are read with bounds."""

import contextlib
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

JSON_BYTES = 1 << 20  # largest JSON that is read from a stranger


def write_atomic(path: Path, content: str | bytes):
    """Create or replace a file, text as UTF-8: a crash at any moment leaves the old file or the new
    one, never a mixture. Raises OSError that names the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path):
    """Make new names in a folder survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file, never more than `most`. Raises ValueError when it is longer or
    no regular file."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe must not make us wait
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{found.st_size:,} bytes; at most {most:,} are read")
    return content


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_constant(text: str):
    """NaN and Infinity, which Python's reader would let pass."""
    raise ValueError(f"{text} is no JSON")


def whole_number(text: str) -> int:
    """An integer of modest length; converting a long one takes quadratic time."""
    if len(text) > 30:
        raise ValueError("a number of more than 30 digits")
    return int(text)


def finite_number(text: str) -> float:
    """A float that is none too large: 1e999 would silently become infinity."""
    if len(text) > 400:
        raise ValueError("a number of more than 400 characters")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large for a number")
    return value


def parse_json(text: str) -> Any:
    """A value from JSON text. Raises ValueError for NaN, huge numbers and deep nesting too."""
    try:
        return json.loads(
            text,
            parse_constant=refuse_constant,
            parse_int=whole_number,
            parse_float=finite_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """An object from a file. Raises ValueError for anything that is not modest, plain JSON, OSError
    when it cannot be read."""
    try:
        value = parse_json(read_bounded(path, most).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def number(value: Any) -> float | None:
    """A finite number, also when it was written as a text; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 100:
        return None
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None

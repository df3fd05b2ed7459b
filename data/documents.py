"""What documents become: tokenizers, shards, fingerprints, files written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import caseops
import numpy as np
import sentencepiece as spm
from build_sample import SPACE, save, sync

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT_CHUNK = 1 << 22
MANIFEST = "manifest.json"
PROBE = (
    "Two  spaces,\nlines\n\n\tand tabs; \uff21 full width, \ufb01 ligature, e\u0301, \U0001f600, "
    "\x00 and \x7f. "
)


class DataError(ValueError):
    """A mistake in the input: one line that names the culprit, exit code 2."""


def script():
    """train_gpt.py as a module: its readers and its byte table are what training will use (it needs
    torch)."""
    return importlib.import_module("train_gpt")


# ---- Files ----


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; its exit code, or 2 after one line about a mistake in the input, 130 when
    interrupted."""
    with contextlib.suppress(BrokenPipeError):
        try:
            return command()
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
    return 2


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it, not even after a power cut."""
    work = path.with_name(f".{path.name}.part")
    save(work, content)
    os.replace(work, path)
    sync(path.parent)


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary as JSON, atomically."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """A JSON object, or None when the file is absent. Raises DataError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object")
    return found


def fingerprint(content: str | bytes) -> bytes:
    """16 bytes that identify a document."""
    return hashlib.blake2b(
        content.encode() if isinstance(content, str) else content, digest_size=16
    ).digest()


# ---- Tokenizers ----


class Tokenizer(NamedTuple):
    """A SentencePiece model and the exact bytes that each of its pieces spells."""

    path: Path
    processor: spm.SentencePieceProcessor
    pieces: list[bytes]  # spelling of each id; empty for control and unknown ids
    sizes: np.ndarray  # (V,) int32, their lengths
    starts: np.ndarray  # (V,) int32, where each begins in all of them
    joined: np.ndarray  # uint8, all of them
    operators: list[int]  # ids of the case operators, none in an ordinary tokenizer
    space_mark: list[int]  # byte pieces that spell U+2581; empty if there are none, see encode
    sha256: str

    @property
    def bos(self) -> int:
        return self.processor.bos_id()

    def spell(self, ids: np.ndarray) -> bytes:
        """The text that tokens stand for, case operators still in it, as UTF-8 that may be cut
        anywhere."""
        sizes = self.sizes[ids]
        narrow = (
            np.int32 if len(ids) * int(self.sizes.max()) < 2**31 else np.int64
        )  # twice as fast where it is enough
        ends = np.cumsum(sizes, dtype=narrow)
        where = np.repeat(
            self.starts[ids].astype(narrow) - (ends - sizes), sizes
        )  # of a piece, less that of its text
        where += np.arange(len(where), dtype=narrow)
        return self.joined[where].tobytes()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text (int32, no BOS). SentencePiece itself reads U+2581 as a space; here its
        three bytes are spelt, by a tokenizer that changes no other text and has byte pieces."""
        rows = self.processor.encode(texts, return_type="numpy", num_threads=1)
        for i, text in enumerate(texts):
            if SPACE in text and self.space_mark:
                mark = np.array(self.space_mark, np.int32)
                parts = self.processor.encode(text.split(SPACE), return_type="numpy", num_threads=1)
                joined = [parts[0]]
                for part in parts[1:]:
                    joined += [mark, part]
                rows[i] = np.concatenate(joined)
        return rows

    def text(self, ids: np.ndarray) -> str:
        """The original text of one document. Raises UnicodeDecodeError when the bytes are no
        text."""
        spelt = self.spell(ids).decode("utf-8")
        return caseops.decode(spelt) if self.operators else spelt

    def changes_text(self) -> bool:
        """Whether text is normalised, or anything else lost, before it is cut into pieces."""
        return (
            self.spell(np.array(self.processor.encode(PROBE))).decode("utf-8", "replace") != PROBE
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer that can count bytes. Raises DataError that names the file."""
    try:
        raw = path.read_bytes()
        processor = spm.SentencePieceProcessor(model_proto=raw)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except Exception as error:
        kind = type(error).__name__
        raise DataError(f"{path.name}: not a SentencePiece model ({kind})") from None
    if processor.vocab_size() > 2**16:
        raise DataError(f"{path.name}: {processor.vocab_size()} pieces do not fit 16 bits")
    if processor.bos_id() < 0:
        raise DataError(f"{path.name}: the tokenizer needs a BOS; train it with a bos_id")
    if processor.piece_to_id(SPACE) == processor.unk_id():
        raise DataError(f"{path.name}: the tokenizer needs a lone space piece ({SPACE})")
    try:
        operators = caseops.operator_ids(processor)
    except ValueError as error:
        raise DataError(f"{path.name}: {error}") from None
    pieces = [spelling(processor, i) for i in range(processor.vocab_size())]
    sizes = np.array([len(piece) for piece in pieces], np.int32)
    loaded = Tokenizer(
        path=path,
        processor=processor,
        pieces=pieces,
        sizes=sizes,
        starts=np.cumsum(sizes) - sizes,
        joined=np.frombuffer(b"".join(pieces), np.uint8),
        operators=operators,
        space_mark=[],
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
    if loaded.changes_text() or not all(map(processor.is_byte, mark)):
        return loaded
    return loaded._replace(space_mark=mark)


def spelling(processor: spm.SentencePieceProcessor, i: int) -> bytes:
    """The bytes that a piece adds to the decoded text."""
    if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
        return b""
    piece = processor.id_to_piece(i)
    return (
        bytes([int(piece[3:5], 16)])
        if processor.is_byte(i)
        else piece.replace(SPACE, " ").encode("utf-8")
    )


# ---- Documents of shards ----


def stream_of(folder: Path, split: str, vocab: int):
    """The shards of a split as one sequence of tokens (see train_gpt.TokenStream). Raises
    DataError."""
    tool = script()
    try:
        return tool.TokenStream(folder, split, vocab)
    except tool.UserError as error:
        raise DataError(str(error)) from None


def documents_of_shards(stream, bos: int) -> Iterator[np.ndarray]:
    """The tokens of every document without its BOS, uint16. Raises DataError when the stream begins
    without one, or holds an impossible id."""
    parts: list[np.ndarray] = []
    for number, shard in enumerate(stream.shards):
        for low in range(0, len(shard), TEXT_CHUNK):
            chunk = np.array(shard[low : low + TEXT_CHUNK])
            if (top := int(chunk.max())) >= stream.vocab:
                raise DataError(stream.out_of_range(number, top))
            starts = np.flatnonzero(chunk == bos)
            if number == low == 0 and (not len(starts) or starts[0]):
                raise DataError(
                    f"{stream.files[0].name}: the first document does not begin with BOS = {bos}"
                )
            pieces = np.split(chunk, starts)
            for i, piece in enumerate(pieces):
                if i and parts:
                    yield np.concatenate(parts)[1:]
                    parts = []
                if len(piece):
                    parts.append(piece)
    yield np.concatenate(parts)[1:]

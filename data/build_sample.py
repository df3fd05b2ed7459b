"""Turn the embedded public-domain text into training shards, so that a fresh checkout trains
without a download.

    python data/build_sample.py                      build data/datasets/sample_sp1024, once
    python data/build_sample.py --train-tokenizer    train the tokenizer again, compare it with ours
    python data/build_sample.py --measure-reference  measure data/sample/reference.json again

Inputs, in data/sample/: `sample.txt.xz` (documents separated by a blank line),
`sample_1024_bpe.model` and `reference.json`. Output: one shard per split in the competition's
format, a copy of the tokenizer, and `manifest.json`, which describes them.

The output folder is finished or absent, never half-built: everything is written and synced in a
hidden sibling folder, which is then renamed into place. Importing this module needs neither torch
nor a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

try:
    import fcntl
except (
    ImportError
):  # not a POSIX system: builds still never tear, two at once merely do the work twice
    fcntl = None

DATA = Path(__file__).resolve().parent
TEXT = DATA / "sample" / "sample.txt.xz"
TOKENIZER = DATA / "sample" / "sample_1024_bpe.model"
REFERENCE = DATA / "sample" / "reference.json"
OUT = DATA / "datasets" / "sample_sp1024"

# Raise it whenever the same inputs would give another output: existing folders are then rebuilt.
FORMAT = 1
SHARDS = {"train": "fineweb_train_000000.bin", "val": "fineweb_val_000000.bin"}
MANIFEST = "manifest.json"
SEPARATOR = "\n\n"  # one blank line
VAL_EVERY = 20  # every 20th document is validation
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
VOCAB_SIZE, PAD, BOS, EOS, UNK = 1024, 0, 1, 2, 3
SPACE = "\u2581"  # how SentencePiece spells a space

# Of the settings tried, these give the most bytes per token on the training documents (table in
# data/sample/README.md).
# The length limit is far above the longest document: the default of 4,192 bytes would silently skip
# most of them.
TRAINER = dict(
    model_type="bpe",
    vocab_size=VOCAB_SIZE,
    pad_id=PAD,
    bos_id=BOS,
    eos_id=EOS,
    unk_id=UNK,
    byte_fallback=True,
    character_coverage=0.999,
    split_by_unicode_script=False,
    split_digits=False,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    max_sentence_length=1 << 24,
    num_threads=1,
    minloglevel=2,
)

FORMULA = (
    "8 * (size(compress(train + blank line + val)) - size(compress(train))) / utf8_bytes(val), "
    "where train and val are the documents of the split joined by a blank line"
)


# ---- Text ----


def documents() -> list[str]:
    """Return every document of the embedded text, in file order, without the separators and without
    empty ones."""
    text = lzma.decompress(TEXT.read_bytes()).decode("utf-8")
    return [document for document in text.split(SEPARATOR) if document.strip()]


def split(docs: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, val): every 20th document is validation, the others are training.

    Raises RuntimeError when a document text would be on both sides.
    """
    train = [document for i, document in enumerate(docs) if i % VAL_EVERY != VAL_EVERY - 1]
    val = docs[VAL_EVERY - 1 :: VAL_EVERY]
    if shared := len(set(train) & set(val)):
        raise RuntimeError(
            f"{shared} document text(s) are in both the training and the validation split"
        )
    return train, val


def utf8_bytes(docs: list[str]) -> int:
    """Count the UTF-8 bytes of the document texts alone: no separators, no BOS."""
    return sum(len(document.encode("utf-8")) for document in docs)


# ---- Tokenizer ----


def train_tokenizer() -> bytes:
    """Train the 1,024-piece BPE tokenizer on the training documents and return the serialised
    model.

    One thread and no sampling: the same SentencePiece version gives the same bytes.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(split(documents())[0]), model_writer=model, **TRAINER
    )
    load_tokenizer(model.getvalue())
    return model.getvalue()


def load_tokenizer(model: bytes) -> spm.SentencePieceProcessor:
    """Load a serialised tokenizer after checking what byte accounting relies on.

    Raises RuntimeError for another vocabulary size, other control ids, no lone space piece, or a
    space inside a piece (a leading space counts one byte, so a later one would be miscounted as the
    three bytes of its spelling).
    """
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    pieces = [piece for piece, _ in piece_table(tokenizer)]
    if len(pieces) != VOCAB_SIZE or ids != (PAD, BOS, EOS, UNK):
        raise RuntimeError(
            f"tokenizer has {len(pieces)} pieces and pad, bos, eos, unk = {ids}; "
            f"expected {VOCAB_SIZE} and {(PAD, BOS, EOS, UNK)}"
        )
    if SPACE not in pieces or any(SPACE in piece[1:] for piece in pieces):
        raise RuntimeError(
            "tokenizer lacks a lone space piece or has a piece with a space after its first "
            "character"
        )
    return tokenizer


def piece_table(tokenizer: spm.SentencePieceProcessor) -> list[tuple[str, float]]:
    """Return (piece, score) by id: what makes two tokenizers encode alike."""
    return [
        (tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size())
    ]


def encode(tokenizer: spm.SentencePieceProcessor, docs: list[str]) -> np.ndarray:
    """Return the token stream of the documents, little-endian uint16, a BOS before each document.

    Raises RuntimeError when a document does not decode to itself.
    """
    ids = tokenizer.encode(docs)
    lossy = [
        i
        for i, (back, document) in enumerate(zip(tokenizer.decode(ids), docs, strict=True))
        if back != document
    ]
    if lossy:
        raise RuntimeError(
            f"{len(lossy)} document(s) do not survive the tokenizer, the first is number {lossy[0]}"
        )
    return np.concatenate([np.array([BOS, *document], dtype="<u2") for document in ids])


# ---- Reference compressors ----


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """Return the reference compressors at their strongest settings, each with a window that holds
    the whole text."""
    import brotli
    import zstandard

    zstd = zstandard.ZstdCompressionParameters.from_level(22, window_log=27)
    return {
        "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),  # 64 MiB dictionary
        "zstd": lambda text: zstandard.ZstdCompressor(compression_params=zstd).compress(text),
        "brotli": lambda text: brotli.compress(text, quality=11, lgwin=24),
    }


def reference_bpb() -> dict[str, float]:
    """Measure what general compressors reach on the validation text once they have seen the
    training text.

    In bits per byte; the exact formula is `FORMULA`. Takes about half a minute.
    """
    train, val = (SEPARATOR.join(docs).encode("utf-8") for docs in split(documents()))
    both = train + SEPARATOR.encode("utf-8") + val
    return {
        name: round(8 * (len(compress(both)) - len(compress(train))) / len(val), 6)
        for name, compress in compressors().items()
    }


def write_reference() -> dict[str, float]:
    """Measure the reference figures, store them in data/sample/reference.json and return them."""
    figures = reference_bpb()
    content = {
        "bpb": figures,
        "formula": FORMULA,
        "settings": {
            "xz": "preset 9 extreme, 64 MiB dictionary",
            "zstd": "level 22, window_log 27",
            "brotli": "quality 11, lgwin 24",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("zstandard", "brotli")},
        },
        "source_sha256": sha256_file(TEXT),
    }
    REFERENCE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return figures


# ---- Output folder ----


def build(out: Path = OUT) -> dict:
    """Make sure that `out` holds the finished dataset and return its manifest; do nothing when it
    already does.

    Safe when several processes call it at once and when it is killed at any moment. Raises
    ValueError when `out` holds files that are not ours, RuntimeError when the inputs in
    data/sample/ contradict each other.
    """
    out = Path(out).resolve()
    if manifest := complete(out):
        return manifest
    _refuse_foreign_files(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out) as alone:
        if manifest := complete(out):  # another process finished while this one waited
            return manifest
        if alone:
            _sweep(out)
        work = out.with_name(f"{_hidden_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}")
        work.mkdir()
        try:
            manifest = _fill(work)
            _publish(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def complete(out: Path = OUT) -> dict | None:
    """Return the manifest of a finished, undamaged dataset that matches the inputs of today; None
    for anything else."""
    inputs, out = _describe_inputs(), Path(out)
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        expected[manifest["tokenizer"]] = manifest["tokenizer_sha256"]
        intact = (
            inputs.items() <= manifest.items()
            and manifest["manifest_sha256"] == _digest(manifest)
            and expected.keys() == {*SHARDS.values(), TOKENIZER.name}
            and all(sha256_file(out / name) == sha256 for name, sha256 in expected.items())
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # missing, unreadable or not of our making
        return None
    return manifest if intact else None


def shard(tokens: np.ndarray) -> bytes:
    """Return a shard in the competition's format: a header of 256 int32, then uint16 tokens, all
    little-endian."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def _describe_inputs() -> dict:
    """Return the part of the manifest that follows from the committed files alone, without building
    anything."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    source = sha256_file(TEXT)
    if reference.get("source_sha256") != source:
        raise RuntimeError(
            f"{REFERENCE.name} was measured on another text than {TEXT.name}; run "
            "--measure-reference"
        )
    return {
        "name": "sample",
        "title": "Embedded sample: 8 MB of public-domain English",
        "comparable": False,
        "note": "Scores on this text cannot be compared with the leaderboard, which is measured "
        "on FineWeb.",
        "format": FORMAT,
        "source_sha256": source,
        "tokenizer": TOKENIZER.name,
        "tokenizer_sha256": sha256_file(TOKENIZER),
        "vocab_size": VOCAB_SIZE,
        "reference_bpb": reference["bpb"],
    }


def _fill(folder: Path) -> dict:
    """Write shards, tokenizer and manifest into `folder`, synced to disk, the manifest last; return
    the manifest."""
    model = TOKENIZER.read_bytes()
    tokenizer = load_tokenizer(model)
    manifest = _describe_inputs() | {"splits": {}, "files": {}}
    for name, docs in zip(SHARDS, split(documents()), strict=True):
        tokens = encode(tokenizer, docs)
        content = shard(tokens)
        save(folder / SHARDS[name], content)
        manifest["splits"][name] = {
            "documents": len(docs),
            "tokens": len(tokens),
            "bytes": utf8_bytes(docs),
        }
        manifest["files"][SHARDS[name]] = {
            "tokens": len(tokens),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    manifest["manifest_sha256"] = _digest(manifest)
    save(folder / TOKENIZER.name, model)
    save(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    sync(folder)
    return manifest


def _publish(work: Path, out: Path) -> None:
    """Rename the finished folder into place; a damaged one in the way is moved aside first, never
    repaired in place."""
    aside = work.with_name(f"{work.name}-old")
    if not complete(out):
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)
    try:
        os.rename(work, out)
    except OSError:  # where locks do not work, another process may have been faster
        if not complete(out):
            raise
    sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign_files(out: Path) -> None:
    """Raise ValueError when replacing `out` would delete something that this module did not
    write."""
    try:
        names = os.listdir(out)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ValueError(f"{out} is not a folder") from None
    if foreign := sorted({*names} - {*SHARDS.values(), TOKENIZER.name, MANIFEST}):
        raise ValueError(
            f"{out} is not replaced: it holds files that are not ours ({', '.join(foreign[:3])})"
        )


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[bool]:
    """Hold the build lock of `out`, which the system frees even after a kill; yield False where
    locks do not work."""
    with open(out.with_name(f".{out.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # a network disk without locks, or no fcntl
            yield False
        else:
            yield True


def _sweep(out: Path) -> None:
    """Delete what killed builds left behind; call it with the lock held, when no other build can be
    alive."""
    for path in out.parent.iterdir():
        if path.name.startswith(_hidden_prefix(out)):
            shutil.rmtree(path, ignore_errors=True)


def _hidden_prefix(out: Path) -> str:
    """Return how the names of the working folders beside `out` begin."""
    return f".{out.name}.build-"


def save(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict) -> str:
    """Return the SHA-256 of a manifest's content, its own digest left out."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


# ---- Command line ----


def compare_tokenizer() -> bool:
    """Train the tokenizer again and print whether it equals the committed one; create the file when
    there is none."""
    model = train_tokenizer()
    if not TOKENIZER.exists():
        TOKENIZER.write_bytes(model)
    committed = TOKENIZER.read_bytes()
    new, old = piece_table(load_tokenizer(model)), piece_table(load_tokenizer(committed))
    differ = sum(a != b for a, b in zip(new, old, strict=True))
    verdict = (
        f"{differ} of {VOCAB_SIZE} pieces differ"
        if differ
        else "all pieces and scores are identical"
    )
    print(
        f"{TOKENIZER.name}: {verdict}; the file is "
        f"{'identical' if model == committed else 'different'}"
    )
    return not differ


def report(manifest: dict) -> str:
    """Return one line per split and the reference figures, for the terminal."""
    lines = [
        f"{name:5s} {part['documents']:5,d} documents {part['tokens']:9,d} tokens "
        f"{part['bytes']:9,d} bytes  {part['bytes'] / part['tokens']:.3f} bytes/token"
        for name, part in manifest["splits"].items()
    ]
    figures = ", ".join(f"{name} {bpb:.3f}" for name, bpb in manifest["reference_bpb"].items())
    return "\n".join([*lines, f"reference, bits per byte on val: {figures}", manifest["note"]])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 after an error or when the tokenizer does not
    reproduce."""
    parser = argparse.ArgumentParser(
        description="Build the embedded public-domain sample as training shards."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="folder to build (default: data/datasets/sample_sp1024)",
    )
    parser.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="instead of building, train the tokenizer again and compare it with the committed one",
    )
    parser.add_argument(
        "--measure-reference",
        action="store_true",
        help="instead of building, measure data/sample/reference.json again",
    )
    options = parser.parse_args(argv)
    try:
        if options.train_tokenizer:
            return 0 if compare_tokenizer() else 1
        if options.measure_reference:
            print(", ".join(f"{name} {bpb:.4f}" for name, bpb in write_reference().items()))
            return 0
        print(f"{report(build(options.out))}\nready: {options.out}")
        return 0
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"build_sample: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""From raw documents to verified shards, for any vocabulary.

    python data/prepare.py train-tokenizer DOCS --vocab-size 4096 --out my_4096.model [--caseops]
    python data/prepare.py encode DOCS --tokenizer my_4096.model --out data/datasets/mine
    python data/prepare.py reencode data/datasets/mine --from old.model --tokenizer new.model \\
        --out data/datasets/new
    python data/prepare.py verify data/datasets/new --tokenizer new.model

DOCS are .jsonl (an object per line, its text in --field), .json (one array of them), .parquet or
text files (documents separated by one blank line). All but .parquet may be compressed (.gz, .bz2,
.xz, .zst), may begin with a byte-order mark (UTF-8 without one) and have any line ending, which
becomes \\n in text files. Blank documents are left out. The validation split is the first
--val-docs documents, 50,000 as in the competition, or the files given with --val; a document that
is in both splits is refused before anything is written.

Every step may be killed at any moment and run again: it goes on from the last whole shard, and does
nothing when all is done. The output folder is finished or absent. Exit codes: 0 done, 1 findings
(verify), 2 unusable input.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import caseops
    import documents as docs
    import numpy as np
    import sentencepiece as spm
    import textfiles
    import tqdm
    import verify
    from build_sample import SPACE, TRAINER, exclusive, save, sha256_file, shard, sync
    from documents import DataError, Tokenizer, load_tokenizer
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"error: {missing.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

VAL_DOCUMENTS = 50_000  # of the competition's split
SHARD_TOKENS = 100_000_000  # as in the competition's dataset
BATCH_BYTES, BATCH_DOCUMENTS = 400_000, 512  # one task of a worker
FORMAT = 2  # raise it whenever the same inputs would give another output
JOURNAL = "journal.json"
HELD_OUT = 50  # every 50th document is kept from the tokenizer's training to measure it


# ---- Where documents come from ----


class TextFiles(NamedTuple):
    """Documents of text files: the first `val_documents`, or those of `val_paths`, are
    validation."""

    paths: list[Path]
    val_paths: list[Path]
    val_documents: int
    field: str = "text"
    tokenizer: Tokenizer | None = None  # documents are text already

    def items(self) -> Iterator[tuple[str, str]]:
        """(split, text) of every document that is not blank, validation first."""
        train = textfiles.documents_of(self.paths, self.field)
        val = textfiles.documents_of(self.val_paths, self.field)
        for text in itertools.chain(val, itertools.islice(train, self.val_documents)):
            if text.strip():
                yield "val", text
        for text in train:
            if text.strip():
                yield "train", text

    def inputs(self) -> dict:
        """What identifies the documents. Raises DataError when docs_selected.jsonl is not what its
        manifest says."""
        files = {path.name: sha256_file(path) for path in (*self.val_paths, *self.paths)}
        for path in self.paths:
            told = docs.read_json(path.with_name(f"{path.stem}.source_manifest.json")) or {}
            if told.get("docs_sha256", files[path.name]) != files[path.name]:
                raise DataError(
                    f"{path.name}: its sha256 is {files[path.name]}, its source manifest says "
                    f"{told['docs_sha256']}; download it again"
                )
        return dict(
            documents=files,
            val=[path.name for path in self.val_paths],
            val_documents=self.val_documents,
        )


class Shards(NamedTuple):
    """Documents of a dataset folder in the tokens of its tokenizer; its splits stay as they are."""

    folder: Path
    tokenizer: Tokenizer

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """(split, tokens without BOS) of every document, validation first."""
        for split in ("val", "train"):
            stream = docs.stream_of(self.folder, split, len(self.tokenizer.pieces))
            yield from (
                (split, ids) for ids in docs.documents_of_shards(stream, self.tokenizer.bos)
            )

    def inputs(self) -> dict:
        """What identifies the documents."""
        files = [
            f for split in ("val", "train") for f in docs.stream_of(self.folder, split, 2**16).files
        ]
        return dict(
            shards={f.name: sha256_file(f) for f in files}, from_sha256=self.tokenizer.sha256
        )


class Survey(NamedTuple):
    """What a look at every document found before anything is written."""

    val: int
    train: int
    size: int  # characters or tokens, for the progress bar
    leaked: list[int]  # indexes of training documents that are validation documents too


def survey(source: TextFiles | Shards) -> Survey:
    """Count the documents and compare the fingerprints of both splits."""
    seen, counts, size, leaked = set(), collections.Counter(), 0, []
    for index, (split, item) in enumerate(
        tqdm.tqdm(source.items(), "survey", unit=" documents", disable=None)
    ):
        mark = docs.fingerprint(item if isinstance(item, str) else item.tobytes())
        if split == "val":
            seen.add(mark)
        elif mark in seen and len(item):  # nothing can be learnt from an empty document of shards
            leaked.append(index)
        counts[split] += 1
        size += len(item)
    return Survey(counts["val"], counts["train"], size, leaked)


def check_survey(found: Survey, drop: bool):
    """Raises DataError when a split is empty or the score would reward memory."""
    if not found.val or not found.train:
        raise DataError(
            f"{found.val:,} validation and {found.train:,} training documents: both are needed. "
            "The first --val-docs documents are validation, unless --val names other files; in a "
            "text file, one blank line separates two documents"
        )
    if found.leaked and not drop:
        raise DataError(
            f"{len(found.leaked):,} training document(s) are validation documents too (the first "
            f"is number {found.leaked[0] + 1:,}): the score would reward memory; --drop-leaked "
            "leaves them out"
        )


# ---- Encoding, in worker processes ----


class Encoded(NamedTuple):
    """Documents of one task, one after the other."""

    tokens: np.ndarray  # (N,) uint16, a BOS before each document
    lengths: list[int]  # tokens of each document
    sizes: list[int]  # bytes of original text that they stand for
    changed: list[
        int
    ]  # bytes of those documents that the tokenizer normalised, before it did; else -1
    counts: (
        np.ndarray | None
    )  # (N,) uint16 bytes of each token, for a tokenizer with case operators


def original(item, source: Tokenizer | None) -> str:
    """The text of a document. Raises DataError when its tokens spell no text; its end may be cut,
    as that of the last shard is."""
    if source is None:
        return item
    try:
        return source.text(item)
    except UnicodeDecodeError as error:
        spelt = source.spell(item)
        if error.reason != "unexpected end of data" or error.end < len(spelt):
            raise DataError(
                "a document of the shards does not spell text: they belong to another tokenizer "
                f"than {source.path.name}"
            ) from None
        spelt = spelt[: error.start].decode("utf-8")
        return caseops.decode(spelt) if source.operators else spelt


def encode_documents(
    items: list, tokenizer: Tokenizer, source: Tokenizer | None, with_counts: bool
) -> Encoded:
    """Encode documents and prove that nothing is lost. Raises DataError for an unknown piece."""
    texts = [original(item, source) for item in items]
    spelt = [caseops.encode(text) for text in texts] if tokenizer.operators else texts
    rows = tokenizer.encode(spelt)
    lengths = [len(row) + 1 for row in rows]
    bos = np.array([tokenizer.bos], np.int32)
    tokens = np.concatenate([part for row in rows for part in (bos, row)])
    if (tokens == tokenizer.processor.unk_id()).any():
        raise DataError(
            f"{tokenizer.path.name}: the tokenizer is lossy: it has no pieces for some "
            "characters; train it with byte fallback"
        )
    back, sizes, changed = tokenizer.spell(tokens), [], []
    ends = np.cumsum(
        np.add.reduceat(tokenizer.sizes[tokens], np.cumsum(lengths) - lengths)
    ).tolist()
    for text, start, end in zip(texts, [0, *ends], ends):
        raw, decoded = text.encode("utf-8"), back[start:end]
        if tokenizer.operators:
            decoded = caseops.decode(decoded.decode("utf-8")).encode("utf-8")
        sizes.append(len(decoded))
        changed.append(-1 if decoded == raw else len(raw))
    counts = (
        caseops.byte_counts(tokens, tokenizer.sizes, tokenizer.operators) if with_counts else None
    )
    if with_counts and int(counts.sum(dtype=np.int64)) != sum(sizes):
        raise RuntimeError("the bytes of the tokens are not those of the text")
    return Encoded(tokens.astype(np.uint16), lengths, sizes, changed, counts)


WORKER: dict[str, Tokenizer | None] = {}  # what a worker process encodes with


def start_worker(tokenizer: Path, source: Path | None):
    """Load the tokenizers in a new worker, which ends when its parent does, even by kill -9."""
    WORKER.update(tokenizer=load_tokenizer(tokenizer), source=source and load_tokenizer(source))
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(items: list, with_counts: bool) -> Encoded:
    """One task, in a worker."""
    return encode_documents(items, WORKER["tokenizer"], WORKER["source"], with_counts)


def batches(items: Iterable[tuple[str, object]]) -> Iterator[tuple[str, list]]:
    """(split, documents) of about BATCH_BYTES each, in order; a batch never mixes the splits."""
    for split, group in itertools.groupby(items, key=lambda pair: pair[0]):
        batch, size = [], 0
        for _, item in group:
            batch.append(item)
            size += len(item)
            if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
                yield split, batch
                batch, size = [], 0
        if batch:
            yield split, batch


def worker_pool(
    workers: int, tokenizer: Tokenizer, source: Tokenizer | None
) -> concurrent.futures.Executor:
    """Processes that encode, or one thread where processes cannot share memory (no /dev/shm)."""
    # A fork would copy locks that other threads may hold.
    fresh = multiprocessing.get_context("spawn")
    paths = (tokenizer.path, source and source.path)
    try:
        return concurrent.futures.ProcessPoolExecutor(workers, fresh, start_worker, paths)
    except (OSError, ImportError) as error:
        print(
            f"note: no shared memory here ({error}): one process encodes; mount /dev/shm for more",
            file=sys.stderr,
        )
    WORKER.update(tokenizer=tokenizer, source=source)
    return concurrent.futures.ThreadPoolExecutor(1)


def encoded(
    items: Iterable, tokenizer: Tokenizer, source: Tokenizer | None, workers: int
) -> Iterator[tuple[str, int, Encoded]]:
    """(split, size of the documents, their tokens) of each batch, in the order of the documents
    whatever the number of workers; with one, in this process."""
    sidecar = bool(tokenizer.operators)
    if workers == 1:
        for split, batch in batches(items):
            yield (
                split,
                sum(map(len, batch)),
                encode_documents(batch, tokenizer, source, sidecar and split == "val"),
            )
        return
    with worker_pool(workers, tokenizer, source) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for split, batch in batches(items):
                waiting.append(
                    (
                        split,
                        sum(map(len, batch)),
                        pool.submit(work, batch, sidecar and split == "val"),
                    )
                )
                if len(waiting) > 2 * workers:
                    split, size, future = waiting.popleft()
                    yield split, size, future.result()
            for split, size, future in waiting:
                yield split, size, future.result()
        finally:
            for _, _, future in waiting:
                future.cancel()


# ---- Shards ----


class ShardWriter:
    """Writes shards of exactly `limit` tokens, the last of a split shorter. The journal always says
    where the next shard begins, (document, tokens of it already written), with the sums before that
    document."""

    def __init__(self, folder: Path, limit: int, journal: dict):
        self.folder, self.limit, self.journal = folder, limit, journal
        self.sums = journal["splits"]
        self.document, self.skip = journal["cursor"]
        self.split, self.held, self.parts, self.counts = "", 0, [], []

    def add(self, split: str, batch: Encoded):
        """Append the documents of a batch."""
        if split != self.split:
            self.flush(self.document, 0)
            self.split = split
        ends = np.cumsum(batch.lengths)
        for end, length, size, changed in zip(ends, batch.lengths, batch.sizes, batch.changed):
            at, self.skip = end - length + self.skip, 0
            while end - at >= (room := self.limit - self.held):
                self.take(batch, at, at + room)
                at += room
                if at == end:
                    self.count(split, length, size, changed)
                self.flush(
                    *((self.document, 0) if at == end else (self.document, int(at - end + length)))
                )
            if at < end:
                self.take(batch, at, end)
                self.count(split, length, size, changed)

    def take(self, batch: Encoded, low: int, high: int):
        """Hold tokens of the shard that is being filled."""
        self.parts.append(batch.tokens[low:high])
        self.counts += [] if batch.counts is None else [batch.counts[low:high]]
        self.held += int(high - low)

    def count(self, split: str, length: int, size: int, changed: int):
        """Add one whole document to the sums."""
        sums = self.sums.setdefault(
            split, dict(documents=0, tokens=0, bytes=0, changed_documents=0, lost_bytes=0)
        )
        sums["documents"] += 1
        sums["tokens"] += int(length)
        sums["bytes"] += size
        sums["changed_documents"] += changed >= 0
        sums["lost_bytes"] += max(changed - size, 0) if changed >= 0 else 0
        self.document += 1

    def flush(self, document: int, skip: int):
        """Write what is held, if anything, as a shard and note where the next one begins."""
        if not self.held:
            return
        number = sum(name.startswith(f"fineweb_{self.split}_0") for name in self.journal["files"])
        self.write(f"fineweb_{self.split}_{number:06d}.bin", self.parts)
        if self.counts:
            self.write(f"fineweb_{self.split}_bytes_{number:06d}.bin", self.counts)
        self.held, self.parts, self.counts = 0, [], []
        self.journal["cursor"] = [document, skip]
        docs.write_json(self.folder / JOURNAL, self.journal)

    def write(self, name: str, parts: list[np.ndarray]):
        """One file in the competition's format, and its entry."""
        content = shard(np.concatenate(parts))
        docs.write_atomic(self.folder / name, content)
        self.journal["files"][name] = dict(
            tokens=self.held, sha256=hashlib.sha256(content).hexdigest()
        )


def finished(out: Path, inputs: dict) -> dict | None:
    """The manifest of a finished dataset made of these inputs; None when there is no folder. Raises
    DataError for a folder that holds anything else, which is never overwritten."""
    if not out.exists():
        return None
    manifest = docs.read_json(out / docs.MANIFEST) or {}
    if manifest.get("inputs") != inputs:
        raise DataError(f"{out} exists already and was not made of these inputs")
    for name, entry in manifest["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != 1024 + 2 * entry["tokens"]:
            raise DataError(
                f"{out / name} is missing or damaged; move the folder away and run this again"
            )
    return manifest


def build(
    source: TextFiles | Shards, tokenizer: Tokenizer, out: Path, asked: argparse.Namespace
) -> dict:
    """Write the dataset, or go on with it, and return its manifest. Raises DataError before
    anything is written."""
    if tokenizer.changes_text() and not asked.allow_normalisation:
        raise DataError(
            f"{tokenizer.path.name}: the tokenizer is lossy: it normalises text (white space or "
            "letters change); --allow-normalisation accepts that, as the competition does"
        )
    inputs = dict(
        format=FORMAT,
        tokenizer_sha256=tokenizer.sha256,
        shard_tokens=asked.shard_tokens,
        drop_leaked=asked.drop_leaked,
        **source.inputs(),
    )
    if manifest := finished(out, inputs):
        return manifest
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if manifest := finished(out, inputs):  # another process was faster
            return manifest
        folder = out.with_name(f".{out.name}.partial")
        journal = docs.read_json(folder / JOURNAL) or {}
        if journal.get("inputs") != inputs:
            shutil.rmtree(folder, ignore_errors=True)
            found = survey(source)
            check_survey(found, asked.drop_leaked)
            journal = dict(
                inputs=inputs, survey=found._asdict(), splits={}, files={}, cursor=[0, 0]
            )
            folder.mkdir()
            docs.write_json(folder / JOURNAL, journal)
        fill(folder, journal, source, tokenizer, asked)
        manifest = describe(out.name, tokenizer, journal)
        shutil.copyfile(tokenizer.path, folder / tokenizer.path.name)
        docs.write_json(folder / docs.MANIFEST, manifest)
        (folder / JOURNAL).unlink()
        os.rename(folder, out)
        sync(out.parent)
    return manifest


def fill(
    folder: Path,
    journal: dict,
    source: TextFiles | Shards,
    tokenizer: Tokenizer,
    asked: argparse.Namespace,
):
    """Write the shards that are still missing."""
    found, writer = Survey(**journal["survey"]), ShardWriter(folder, asked.shard_tokens, journal)
    dropped = set(found.leaked)
    items = (pair for i, pair in enumerate(source.items()) if i not in dropped)
    with tqdm.tqdm(
        total=found.size,
        desc="encode",
        unit_scale=True,
        disable=None,
        unit="B" if source.tokenizer is None else " tokens",
    ) as bar:
        done = itertools.islice(items, writer.document)
        bar.update(sum(len(item) for _, item in done))
        for split, size, batch in encoded(items, tokenizer, source.tokenizer, asked.workers):
            writer.add(split, batch)
            bar.update(size)
        writer.flush(writer.document, 0)


def describe(name: str, tokenizer: Tokenizer, journal: dict) -> dict:
    """The manifest of a finished dataset."""
    splits = journal["splits"]
    known = verify.known_split(splits["val"]["tokens"] - 1, splits["val"]["bytes"])
    note = (
        f"Validation split of the competition, {known}."
        if known
        else f"Scores on {name} cannot be compared with the leaderboard, which is measured on "
        "FineWeb."
    )
    versions = {
        package: importlib.metadata.version(package) for package in ("sentencepiece", "numpy")
    }
    return dict(
        name=name,
        comparable=bool(known),
        note=note,
        tokenizer=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=len(tokenizer.pieces),
        bos_id=tokenizer.bos,
        caseops=bool(tokenizer.operators),
        normalised=tokenizer.changes_text(),
        splits=splits,
        files=journal["files"],
        dropped_documents=len(journal["survey"]["leaked"]),
        versions=versions,
        inputs=journal["inputs"],
    )


# ---- Tokenizers ----


def training_texts(source: TextFiles | Shards, limit: int) -> tuple[list[str], list[str]]:
    """(documents to train on, held-out documents) of the training split, about `limit` bytes in
    all."""
    train, held, size = [], [], 0
    for number, (split, item) in enumerate(source.items()):
        if split == "val":
            continue
        text = original(item, source.tokenizer)
        (held if number % HELD_OUT == HELD_OUT - 1 else train).append(text)
        size += len(text.encode("utf-8"))
        if size >= limit:
            break
    if not train or not held:
        raise DataError(
            f"{len(train) + len(held)} training documents are too few: at least {HELD_OUT} are "
            "needed to train and to measure (see --val-docs)"
        )
    return train, held


def cut_text(text: str, longest: int = 1 << 22) -> list[str]:
    """A text in parts that the trainer does not skip for their length (16 MiB)."""
    return [text[at : at + longest] for at in range(0, len(text), longest)]


def train_model(texts: list[str], vocab_size: int, with_operators: bool) -> bytes:
    """Train a BPE tokenizer with byte fallback and a lone space piece. The same texts and version
    give the same bytes. Raises DataError when the text is too small for the vocabulary."""
    model = io.BytesIO()
    options = TRAINER | dict(vocab_size=vocab_size, required_chars=SPACE, minloglevel=2)
    if with_operators:
        texts = [caseops.encode(text) for text in texts]
        options["user_defined_symbols"] = list(caseops.OPERATORS)
    texts = [part for text in texts for part in cut_text(text)]
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    except RuntimeError as error:
        raise DataError(f"--vocab-size {vocab_size}: {str(error).splitlines()[-1]}") from None
    return model.getvalue()


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict:
    """Bytes per token on documents. Raises DataError when one of them does not survive, or the
    probe does not."""
    batch = encode_documents(texts, tokenizer, None, False)
    lossy = sum(changed >= 0 for changed in batch.changed)
    if lossy or tokenizer.changes_text():
        raise DataError(
            f"the tokenizer is lossy: {lossy} of {len(texts)} held-out documents do not survive it"
        )
    tokens = sum(batch.lengths) - len(texts)
    return dict(
        documents=len(texts),
        bytes=sum(batch.sizes),
        tokens=tokens,
        bytes_per_token=sum(batch.sizes) / tokens,
    )


def train_tokenizer(source: TextFiles | Shards, out: Path, asked: argparse.Namespace) -> dict:
    """Train a tokenizer and measure it on documents it has not seen; writes the model and, beside
    it, a report. Raises DataError and writes nothing when the tokenizer would be lossy."""
    report = out.with_suffix(".json")
    inputs = dict(
        format=FORMAT,
        vocab_size=asked.vocab_size,
        caseops=asked.caseops,
        train_mb=asked.train_mb,
        **source.inputs(),
    )
    if out.exists():
        told = docs.read_json(report) or {}
        if told.get("inputs") != inputs or told.get("sha256") != sha256_file(out):
            raise DataError(f"{out} exists already and was not made of these inputs")
        return told
    texts, held = training_texts(source, int(asked.train_mb * 1e6))
    print(f"training on {len(texts):,} documents, measuring on {len(held):,}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.part")
    try:
        save(work, train_model(texts, asked.vocab_size, asked.caseops))
        tokenizer = load_tokenizer(work)
        told = dict(sha256=tokenizer.sha256, held_out=measure(tokenizer, held), inputs=inputs)
        docs.write_json(report, told)
        os.replace(work, out)
    finally:
        work.unlink(missing_ok=True)
    return told


# ---- Command line ----


def source_of(asked: argparse.Namespace) -> TextFiles | Shards:
    """Where the documents come from: files, or a folder of shards and its tokenizer."""
    folders = [path for path in asked.documents if path.is_dir()]
    if not folders and not asked.source_tokenizer:
        val = getattr(asked, "val", None) or []
        return TextFiles(asked.documents, val, 0 if val else asked.val_docs, asked.field)
    if len(asked.documents) > 1 or not folders or not asked.source_tokenizer:
        raise DataError(
            f"{asked.documents[0]}: want files of documents, or one folder of shards and --from "
            "with their tokenizer"
        )
    return Shards(folders[0], load_tokenizer(asked.source_tokenizer))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument(
        "documents", type=Path, nargs="+", help="text files, or one folder of shards with --from"
    )
    texts.add_argument(
        "--from",
        dest="source_tokenizer",
        type=Path,
        metavar="MODEL",
        help="tokenizer of the shards",
    )
    texts.add_argument(
        "--val-docs",
        type=int,
        default=VAL_DOCUMENTS,
        metavar="N",
        help="the first N documents are validation (default %(default)s)",
    )
    texts.add_argument(
        "--field",
        default="text",
        help="where .jsonl and .parquet keep the text (default %(default)s)",
    )
    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="SentencePiece model to encode with; one with "
        "case operators makes a CaseOps dataset with byte sidecar",
    )
    shards.add_argument("--out", type=Path, required=True, help="folder to create")
    shards.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard"
    )
    shards.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        metavar="N",
        help="processes (default: all cores)",
    )
    shards.add_argument(
        "--drop-leaked",
        action="store_true",
        help="leave out training documents that are validation documents too, instead of refusing",
    )
    shards.add_argument(
        "--allow-normalisation",
        action="store_true",
        help="accept a tokenizer that changes text "
        "before cutting it; bytes are then those of the changed text",
    )
    train = commands.add_parser(
        "train-tokenizer", parents=[texts], help="train a lossless BPE tokenizer"
    )
    train.add_argument(
        "--vocab-size", type=int, required=True, metavar="V", help="pieces of the tokenizer"
    )
    train.add_argument("--out", type=Path, required=True, help="file to create, *.model")
    train.add_argument(
        "--caseops", action="store_true", help="capital letters become operators (see caseops.py)"
    )
    train.add_argument(
        "--train-mb",
        type=float,
        default=100,
        metavar="N",
        help="text to read (default %(default)s)",
    )
    encode = commands.add_parser("encode", parents=[texts, shards], help="documents to shards")
    encode.add_argument(
        "--val",
        type=Path,
        nargs="+",
        metavar="DOCS",
        help="validation documents, instead of the first --val-docs",
    )
    commands.add_parser(
        "reencode", parents=[texts, shards], help="shards of one tokenizer to shards of another"
    )
    check = commands.add_parser("verify", help="find what is wrong with a dataset")
    check.add_argument("folder", type=Path, help="folder of shards")
    check.add_argument("--tokenizer", type=Path, help="its tokenizer (default: the *.model in it)")
    check.add_argument("--json", action="store_true", help="print the whole report as JSON")
    return top


def check_numbers(asked: argparse.Namespace):
    """Raises DataError for a number that makes no sense."""
    for name, lowest in (
        ("val_docs", 0),
        ("shard_tokens", 1),
        ("workers", 1),
        ("vocab_size", 2),
        ("train_mb", 0.01),
    ):
        if getattr(asked, name, lowest) < lowest:
            raise DataError(
                f"--{name.replace('_', '-')} {getattr(asked, name)}: want at least {lowest}"
            )


def run(asked: argparse.Namespace) -> int:
    """One command; returns the exit code. Raises DataError."""
    check_numbers(asked)
    if asked.command == "verify":
        found = verify.verify(asked.folder, asked.tokenizer)
        print(json.dumps(found, indent=2) if asked.json else verify.report(found))
        return 1 if found["findings"] else 0
    source = source_of(asked)
    if asked.command == "train-tokenizer":
        held = train_tokenizer(source, asked.out, asked)["held_out"]
        print(
            f"{asked.out}: {held['bytes_per_token']:.4f} bytes per token on {held['documents']:,} "
            "held-out documents, all of which survive encoding and decoding"
        )
        return 0
    if (asked.command == "reencode") != isinstance(source, Shards):
        raise DataError(
            f"{asked.documents[0]}: `encode` takes text files, `reencode` a folder of shards and "
            "--from"
        )
    manifest = build(source, load_tokenizer(asked.tokenizer), asked.out, asked)
    for split, sums in manifest["splits"].items():
        print(
            f"{split:5s} {sums['documents']:,} documents, {sums['tokens']:,} tokens, "
            f"{sums['bytes']:,} bytes, {sums['bytes'] / sums['tokens']:.4f} bytes per token"
        )
        if sums["changed_documents"]:
            print(
                f"      {sums['changed_documents']:,} documents were changed: the tokenizer "
                f"normalises text, or reads {SPACE} as a space; {sums['lost_bytes']:,} bytes lost"
            )
    knobs = f"DATA_PATH={asked.out} VOCAB_SIZE={manifest['vocab_size']}"
    if manifest["bos_id"] != 1:
        knobs += f" BOS_ID={manifest['bos_id']}"
    if manifest["caseops"]:
        knobs += " CASEOPS=1"
    print(f"train with {knobs}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return docs.exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

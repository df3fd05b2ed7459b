#!/usr/bin/env python3
"""Turn your own text into shards that train_gpt.py reads.

    python data/encode_text.py --tokenizer M.model --train T.txt.xz --val V.txt --out data/datasets/mine

A text file is UTF-8, plain or .xz, its documents separated by one blank line. Each document is stored as BOS and its
tokens. The output folder, which must not exist yet, is finished or absent, never half-built; train with
DATA_PATH=<out> VOCAB_SIZE=<pieces of the tokenizer>.
"""
from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import sentencepiece as spm
import tqdm
from build_sample import SEPARATOR, SPACE, shard

SHARD_TOKENS = 100_000_000  # as in the competition's dataset
DOCUMENTS = 200  # encoded at a time, which bounds memory


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, without empty ones. Raises ValueError naming the file when it has none."""
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        found = [document for document in raw.decode("utf-8").split(SEPARATOR) if document.strip()]
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not found:
        raise ValueError(f"{path.name}: no document in it")
    return found


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """A tokenizer that has a BOS and a lone space piece and fits uint16. Raises ValueError naming the file."""
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path.name}: not a SentencePiece model ({type(error).__name__})") from None
    if tokenizer.bos_id() < 0 or tokenizer.piece_to_id(SPACE) == tokenizer.unk_id():
        raise ValueError(f"{path.name}: the tokenizer needs a BOS and a lone space piece")
    if tokenizer.vocab_size() > 2**16:
        raise ValueError(f"{path.name}: {tokenizer.vocab_size()} pieces do not fit 16 bits")
    return tokenizer


def encode(tokenizer: spm.SentencePieceProcessor, documents: list[str], label: str) -> np.ndarray:
    """The token stream of all documents, uint16; a bar with the time left on a terminal."""
    pieces = []
    for start in tqdm.trange(0, len(documents), DOCUMENTS, desc=label, disable=None):
        rows = tokenizer.encode(documents[start:start + DOCUMENTS])
        pieces += [np.array([tokenizer.bos_id(), *ids], dtype="<u2") for ids in rows]
    return np.concatenate(pieces)


def write_split(folder: Path, split: str, tokens: np.ndarray, limit: int) -> int:
    """Write numbered shards of at most `limit` tokens; returns how many tokens there are."""
    for number, start in enumerate(range(0, len(tokens), limit)):
        (folder / f"fineweb_{split}_{number:06d}.bin").write_bytes(shard(tokens[start:start + limit]))
    return len(tokens)


def build(tokenizer_path: Path, texts: dict[str, Path], out: Path, limit: int = SHARD_TOKENS) -> dict:
    """Write the dataset and return its manifest. Raises ValueError naming what is wrong, before writing anything."""
    if out.exists():
        raise ValueError(f"{out} exists already")
    tokenizer = load_tokenizer(tokenizer_path)
    documents = {split: read_documents(path) for split, path in texts.items()}
    if shared := len(set(documents["train"]) & set(documents["val"])):
        raise ValueError(f"{shared} document(s) are in both texts: the score would reward memory")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}")
    work.mkdir()
    try:
        splits = {split: dict(source=texts[split].name, documents=len(found),
                              tokens=write_split(work, split, encode(tokenizer, found, split), limit))
                  for split, found in documents.items()}
        note = f"Scores on {texts['val'].name} cannot be compared with the leaderboard, which is measured on FineWeb."
        manifest = dict(name=out.name, comparable=False, note=note, tokenizer=tokenizer_path.name,
                        vocab_size=tokenizer.vocab_size(), splits=splits)
        shutil.copyfile(tokenizer_path, work / tokenizer_path.name)
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("tokenizer", "SentencePiece model"), ("train", "training text"), ("val", "validation text"),
                       ("out", "folder to create")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    asked = parser.parse_args()
    try:
        manifest = build(asked.tokenizer, dict(train=asked.train, val=asked.val), asked.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, facts in manifest["splits"].items():
        print(f"{split:5s} {facts['documents']:,} documents, {facts['tokens']:,} tokens")
    print(f"train with DATA_PATH={asked.out} VOCAB_SIZE={manifest['vocab_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

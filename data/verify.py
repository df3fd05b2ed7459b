"""What is wrong with a dataset: checks whose findings all name the file or the split that they are
about."""

from __future__ import annotations

import collections
import time
from pathlib import Path
from typing import NamedTuple

import caseops
import documents as docs
import numpy as np
import tqdm
from build_sample import sha256_file
from documents import DataError, Tokenizer, load_tokenizer


class Known(NamedTuple):
    """Fingerprint of the competition's validation split under one tokenizer."""

    name: str
    targets: int  # after rounding down to a multiple of `rounded_to`, as published
    rounded_to: int


# Source: logs of accepted records. The same 50,000 documents stand for the same bytes whatever the
# tokenizer: decoded they are 151,073,604 to 151,080,891, depending on how a log counted, while the
# smallest real mistake was four percent.
KNOWN = [
    Known("SP1024", 62_021_845, 1),
    Known("SP4096", 45_508_608, 2048),
    Known("SP8192", 40_540_160, 2048),
    Known("SP8192 CaseOps", 47_853_343, 1),
]
KNOWN_DOCUMENTS, KNOWN_BYTES, TOLERANCE = 50_000, 151_080_891, 0.002
COMPETITION = "fineweb10B_"  # how its dataset folders are called
SAMPLE = 200  # documents of each split that are encoded again
FOREIGN = (
    0.05  # part of them that may differ: the competition's own tokens were not all made at once
)


def known_split(targets: int, size: int) -> str:
    """Which published validation split has so many targets and bytes; empty when none has."""
    names = [k.name for k in KNOWN if targets // k.rounded_to * k.rounded_to == k.targets]
    return names[0] if names and abs(size / KNOWN_BYTES - 1) <= TOLERANCE else ""


class Report:
    """Findings (something is wrong), notes (worth knowing) and figures."""

    def __init__(self):
        self.findings: list[dict] = []
        self.notes: list[str] = []
        self.splits: dict[str, dict] = {}

    def find(self, check: str, where: str, detail: str):
        """Record that something is wrong."""
        self.findings.append(dict(check=check, where=where, detail=detail))


def check_files(folder: Path, report: Report) -> dict:
    """Every shard has the size that its header promises and is what the manifest says; returns the
    manifest."""
    tool, manifest = docs.script(), docs.read_json(folder / docs.MANIFEST) or {}
    for path in sorted(folder.glob("fineweb_*.bin")):
        try:
            tool.open_shard(path)
        except tool.UserError as error:
            report.find("shard", path.name, str(error))
    told = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
    if not told:
        report.notes.append("no manifest: files cannot be compared with what was written")
    for name, sha256 in tqdm.tqdm(told.items(), "sha256", disable=None):
        if not (folder / name).is_file():
            report.find("manifest", name, "named by the manifest but missing")
        elif sha256_file(folder / name) != sha256:
            report.find("manifest", name, "differs from the sha256 that the manifest gives")
    for path in folder.glob("fineweb_*.bin") if told else ():
        if path.name not in told:
            report.find("manifest", path.name, "not named by the manifest")
    return manifest


def check_tokenizer(tokenizer: Tokenizer, manifest: dict, report: Report):
    """The tokenizer is the one that the manifest names, and loses nothing but what the manifest
    admits."""
    if manifest.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        report.find("tokenizer", tokenizer.path.name, "not the tokenizer that the manifest names")
    if tokenizer.changes_text():
        report.notes.append(
            f"{tokenizer.path.name} normalises text: bytes are those of the normalised text, as "
            "in the competition"
        )
    if manifest and not manifest.get("normalised", False) and tokenizer.changes_text():
        report.find(
            "lossy",
            tokenizer.path.name,
            "the tokenizer changes text although the manifest says it does not",
        )


class SplitSums(NamedTuple):
    """What one pass over a split found."""

    documents: int
    tokens: int
    bytes: int  # of the decoded text
    scored_bytes: int  # as train_gpt.py counts them
    unknown: int
    broken: int  # documents that spell no text
    miscounted: int  # documents whose scored bytes are not those of their text
    foreign: int  # of `sampled` documents, those that encode to other tokens
    sampled: int
    marks: set[bytes]  # fingerprints of the validation documents
    beginnings: set[bytes]  # and of their first 64 tokens, where they are longer
    leaked: list[int]  # training documents that are validation documents
    alike: int  # training documents that begin like one
    counts: np.ndarray | None  # bytes of each token, for a tokenizer with case operators


def sums_of(
    folder: Path, split: str, tokenizer: Tokenizer, every: int, val: SplitSums | None
) -> SplitSums:
    """Read every document of a split; decode and recount the validation split and every n-th
    training document, encode every n-th again, and compare training documents with those of
    `val`."""
    tool = docs.script()
    stream = docs.stream_of(folder, split, len(tokenizer.pieces))
    table, total = (
        tool.byte_table(tokenizer.processor, len(tokenizer.pieces)),
        collections.Counter(),
    )
    marks, beginnings, leaked, counts, number = set(), set(), [], [], -1
    bar = tqdm.tqdm(
        docs.documents_of_shards(stream, tokenizer.bos),
        f"read {split}",
        unit=" documents",
        disable=None,
    )
    for number, ids in enumerate(bar):
        mark, beginning = (
            docs.fingerprint(ids.tobytes()),
            len(ids) > 64 and docs.fingerprint(ids[:64].tobytes()),
        )
        if split == "val":
            marks.add(mark)
            beginnings |= {beginning} if beginning else set()
        elif val and len(ids):
            leaked += [number] if mark in val.marks else []
            total["alike"] += beginning in val.beginnings
        total.update(
            tokens=len(ids) + 1, unknown=int(np.count_nonzero(ids == tokenizer.processor.unk_id()))
        )
        last = stream.length == total["tokens"]
        if split == "val" or number % every == 0:
            whole = np.concatenate([[tokenizer.bos], ids])
            if tokenizer.operators and split == "val":
                counts.append(caseops.byte_counts(whole, tokenizer.sizes, tokenizer.operators))
            try:
                text = tokenizer.text(ids)
            except UnicodeDecodeError:
                total["broken"] += not last  # the last document of downloaded shards may be cut
                continue
            size, scored = (
                len(text.encode("utf-8")),
                int(table.target_bytes(whole).sum(dtype=np.int64)),
            )
            total.update(
                bytes=size,
                scored=scored,
                miscounted=not tokenizer.operators and scored != size - text.startswith(" "),
            )
            if number % every == 0 and not last:
                spelt = caseops.encode(text) if tokenizer.operators else text
                total.update(
                    sampled=1, foreign=tokenizer.encode([spelt])[0].tolist() != ids.tolist()
                )
    return SplitSums(
        number + 1,
        total["tokens"],
        total["bytes"],
        total["scored"],
        total["unknown"],
        total["broken"],
        total["miscounted"],
        total["foreign"],
        total["sampled"],
        marks,
        beginnings,
        leaked,
        total["alike"],
        np.concatenate(counts) if counts else None,
    )


def check_split(split: str, sums: SplitSums, manifest: dict, report: Report):
    """The tokens spell text, are those of this tokenizer, and are as many as the manifest says."""
    if sums.unknown:
        report.find(
            "lossy",
            split,
            f"{sums.unknown:,} unknown tokens: the tokenizer had no pieces for that text",
        )
    if sums.broken:
        report.find(
            "tokenizer",
            split,
            f"{sums.broken:,} documents spell no valid text: another tokenizer's shards?",
        )
    if sums.foreign > FOREIGN * max(sums.sampled, 1):
        report.find(
            "tokenizer",
            split,
            f"{sums.foreign:,} of {sums.sampled:,} sampled documents encode to other "
            "tokens: another tokenizer's shards?",
        )
    if sums.miscounted:
        report.find(
            "bytes",
            split,
            f"{sums.miscounted:,} documents whose scored bytes are not those of their text",
        )
    told = manifest.get("splits", {}).get(split, {})
    for name in ("documents", "tokens") + ("bytes",) * (split == "val"):
        if name in told and told[name] != getattr(sums, name):
            report.find(
                "count", split, f"{getattr(sums, name):,} {name}, the manifest says {told[name]:,}"
            )


def check_sidecar(
    folder: Path, tokenizer: Tokenizer, sums: SplitSums, manifest: dict, report: Report
):
    """A CaseOps validation split has one byte count per token, and they are those of the text."""
    files = list(folder.glob("fineweb_val_bytes_*.bin"))
    if not tokenizer.operators:
        if files:
            report.find(
                "sidecar",
                files[0].name,
                "byte counts of a tokenizer without case operators: not used",
            )
        return
    if not files:
        report.find(
            "sidecar",
            "val",
            "fineweb_val_bytes_*.bin is missing: CaseOps cannot be scored by the byte table",
        )
        return
    try:
        stream = docs.stream_of(folder, "val_bytes", 2**16)
    except DataError as error:
        return report.find("sidecar", "val", str(error))
    if len(stream) != sums.tokens:
        return report.find(
            "sidecar", "val", f"{len(stream):,} byte counts for {sums.tokens:,} tokens"
        )
    theirs = stream.read(0, len(stream))
    differ = int(np.count_nonzero(theirs != sums.counts))
    told, total = int(theirs.sum(dtype=np.int64)), int(sums.counts.sum(dtype=np.int64))
    ours = (
        "inputs" in manifest
    )  # others may share out the bytes of a character, or of removed space, differently
    shifted = int(
        np.count_nonzero(
            theirs[docs.stream_of(folder, "val", 2**16).read(0, len(stream)) == tokenizer.bos]
        )
    )
    if (ours and differ) or shifted or abs(told / max(total, 1) - 1) > TOLERANCE:
        report.find(
            "sidecar",
            "val",
            f"{differ:,} of {sums.tokens:,} byte counts are wrong ({shifted:,} of them at a "
            f"BOS); their sum is {told:,}, the text has {total:,} bytes",
        )


def check_overlap(train: SplitSums, val: SplitSums, report: Report):
    """No validation document is in the training text."""
    if train.leaked:
        report.find(
            "overlap",
            "train",
            f"{len(train.leaked):,} training documents are among the {val.documents:,} "
            f"validation documents, the first is number {train.leaked[0] + 1:,}",
        )
    if train.alike:
        report.notes.append(
            f"{train.alike:,} training documents begin as a validation document does, 64 tokens"
        )


def check_known(folder: Path, tokenizer: Tokenizer, val: SplitSums, report: Report):
    """A folder that is called like the competition's, or has as many validation documents, is its
    split."""
    name = known_split(val.tokens - 1, val.bytes)
    if name:
        report.notes.append(f"validation split of the competition, {name}")
    elif folder.name.startswith(COMPETITION) or val.documents == KNOWN_DOCUMENTS:
        expected = ", ".join(f"{k.name} {k.targets:,}" for k in KNOWN)
        report.find(
            "validation",
            "val",
            f"{val.documents:,} documents, {val.tokens - 1:,} targets, {val.bytes:,} bytes; the "
            f"competition's split has {KNOWN_DOCUMENTS:,} documents, {KNOWN_BYTES:,} bytes, and "
            f"targets by tokenizer: {expected}",
        )


def verify(folder: Path, tokenizer_path: Path | None = None) -> dict:
    """Check a dataset; returns the report. Raises DataError when there is nothing that could be
    checked."""
    begin, report = time.monotonic(), Report()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not list(folder.glob("fineweb_*.bin")):
        raise DataError(f"{folder}: no file matches fineweb_*.bin")
    own = sorted(folder.glob("*.model"))
    if tokenizer_path is None and len(own) != 1:
        raise DataError(
            f"{folder}: say with --tokenizer which model its tokens come from ({len(own)} are in "
            "it)"
        )
    tokenizer = load_tokenizer(tokenizer_path or own[0])
    manifest = check_files(folder, report)
    check_tokenizer(tokenizer, manifest, report)
    found = {}
    for split in (
        ("val", "train") if not any(f["check"] == "shard" for f in report.findings) else ()
    ):
        try:
            sums = sums_of(
                folder,
                split,
                tokenizer,
                max(
                    1,
                    manifest.get("splits", {}).get(split, {}).get("documents", 50 * SAMPLE)
                    // SAMPLE,
                ),
                found.get("val"),
            )
        except DataError as error:
            report.find("split", split, str(error))
            continue
        found[split] = sums
        check_split(split, sums, manifest, report)
        report.splits[split] = dict(documents=sums.documents, tokens=sums.tokens) | (
            dict(
                targets=sums.tokens - 1,
                bytes=sums.bytes,
                bytes_per_token=sums.bytes / (sums.tokens - 1),
            )
            if split == "val"
            else {}
        )
    if "val" in found:
        check_sidecar(folder, tokenizer, found["val"], manifest, report)
        check_known(folder, tokenizer, found["val"], report)
    if len(found) == 2:
        check_overlap(found["train"], found["val"], report)
    sha256 = sha256_file(folder / docs.MANIFEST) if manifest else None
    return dict(
        folder=folder.name,
        tokenizer=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        manifest_sha256=sha256,
        clean=not report.findings,
        findings=report.findings,
        notes=report.notes,
        splits=report.splits,
        seconds=round(time.monotonic() - begin, 1),
    )


def report(found: dict) -> str:
    """The report for people."""
    lines = [
        f"{split:5s} "
        + ", ".join(
            f"{value:,.4f} {name}" if isinstance(value, float) else f"{value:,} {name}"
            for name, value in sums.items()
        ).replace("_", " ")
        for split, sums in found["splits"].items()
    ]
    lines += [f"note: {note}" for note in found["notes"]]
    lines += [f"FINDING {f['check']}, {f['where']}: {f['detail']}" for f in found["findings"]]
    count = len(found["findings"])
    return "\n".join(
        [
            *lines,
            f"{found['folder']}: "
            + (f"{count} finding(s)" if count else "clean")
            + f", tokenizer {found['tokenizer']} sha256 {found['tokenizer_sha256'][:16]}",
        ]
    )

"""The embedded sample corpus: shard bytes, byte accounting, split, tokenizer, reference figures,
unbreakable build."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
SCRIPT = ROOT / "data" / "build_sample.py"
SPLITS = ("train", "val")
FEW = 40  # documents in the small corpus that the build tests use

spec = importlib.util.spec_from_file_location("build_sample", SCRIPT)
bs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bs)

# A build of the small corpus in another process: argv = folder, use locks (0/1), and the number of
# the fsync or rename
# call just before which the process kills itself (0: never).
CHILD = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import build_sample as bs
docs = bs.documents()[:{FEW}]
bs.documents = lambda: docs
out, locks, countdown = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if not locks:
    bs.fcntl = None
def deadly(real):
    def call(*args):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call
os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)
bs.build(out)
"""
MOMENTS = range(
    1, 9
)  # 4 files, their folder, the old folder moved aside, the new one renamed into place, their parent
PUBLISHED = 8  # from this call on the new folder is in place


def start_child(out: Path, locks: bool = True, die_at: int = 0) -> subprocess.Popen:
    """Start a build of the small corpus in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), str(int(locks)), str(die_at)],
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (inode, modification time in ns) by file name: unchanged means that nothing was
    written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def hidden_folders(folder: Path) -> list[str]:
    """Return the names of working folders that builds left in `folder`."""
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith(".")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A finished build of the whole corpus, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("data") / "sample"
    bs.build(out)
    return out


@pytest.fixture(scope="module")
def manifest(built: Path) -> dict:
    return json.loads((built / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """The documents of each split, read and divided without help from the module under test."""
    docs = (
        lzma.decompress((SAMPLE / "sample.txt.xz").read_bytes())
        .decode("utf-8")
        .rstrip("\n")
        .split("\n\n")
    )
    return {
        "train": [text for i, text in enumerate(docs) if i % 20 != 19],
        "val": [text for i, text in enumerate(docs) if i % 20 == 19],
    }


@pytest.fixture(scope="module")
def tokenizer(built: Path, manifest: dict) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(built / manifest["tokenizer"]))


@pytest.fixture
def few(monkeypatch) -> None:
    """Replace the corpus by its first documents, so that a build takes no time."""
    docs = bs.documents()[:FEW]
    monkeypatch.setattr(bs, "documents", lambda: docs)


def read_shard(path: Path) -> np.ndarray:
    """Return the tokens of a shard, its header checked int by int."""
    raw = path.read_bytes()
    magic, version, count, *rest = struct.unpack("<256i", raw[:1024])
    assert (magic, version, rest) == (20240520, 1, [0] * 253)
    assert len(raw) == 1024 + 2 * count
    return np.array(struct.unpack(f"<{count}H", raw[1024:]))


def token_documents(tokens: np.ndarray) -> list[list[int]]:
    """Cut a token stream before every BOS; the BOS stays the first token of its document."""
    assert tokens[0] == 1
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


# ---- Text and split ----


def test_text_is_the_documents_joined_by_blank_lines():
    text = lzma.decompress((SAMPLE / "sample.txt.xz").read_bytes()).decode("utf-8")
    assert "".join(document + "\n\n" for document in bs.documents()) == text


def test_split_is_every_twentieth_document_and_disjoint(texts):
    train, val = bs.split(bs.documents())
    assert (train, val) == (texts["train"], texts["val"])
    assert len(val) == len(bs.documents()) // 20 and not set(train) & set(val)


def test_split_refuses_a_document_on_both_sides():
    with pytest.raises(RuntimeError, match="1 document text"):
        bs.split([f"document {i}" for i in range(19)] + ["document 3"])


# ---- Shards and manifest ----


@pytest.mark.parametrize("name", SPLITS)
def test_shards_decode_to_the_documents(built, manifest, texts, tokenizer, name):
    tokens = read_shard(built / f"fineweb_{name}_000000.bin")
    parts = token_documents(tokens)
    assert [tokenizer.decode(part[1:]) for part in parts] == texts[name]
    assert manifest["splits"][name] == {
        "documents": len(parts),
        "tokens": len(tokens),
        "bytes": sum(len(text.encode("utf-8")) for text in texts[name]),
    }


@pytest.mark.parametrize("name", SPLITS)
def test_token_bytes_add_up_to_the_text_of_every_document(built, texts, tokenizer, name):
    """A piece counts its UTF-8 bytes; its leading space one byte, or none right after BOS; controls
    count nothing."""
    bare, space = np.zeros(1024, dtype=int), np.zeros(1024, dtype=int)
    for i in range(1024):
        piece = tokenizer.id_to_piece(i)
        if tokenizer.is_byte(i):
            bare[i] = 1
        elif not tokenizer.is_control(i) and not tokenizer.is_unknown(i):
            bare[i] = len(piece.removeprefix("▁").encode("utf-8"))
            space[i] = piece.startswith("▁")
    for part, text in zip(
        token_documents(read_shard(built / f"fineweb_{name}_000000.bin")), texts[name], strict=True
    ):
        ids = np.array(part)
        counted = bare[ids].sum() + space[ids[1:]][ids[:-1] != 1].sum()
        assert counted == len(text.encode("utf-8"))


def test_manifest_describes_the_folder(built, manifest):
    def sha256(name):
        return hashlib.sha256((built / name).read_bytes()).hexdigest()

    assert (
        manifest["name"] == "sample"
        and manifest["comparable"] is False
        and manifest["vocab_size"] == 1024
    )
    assert "cannot be compared" in manifest["note"]
    assert {path.name for path in built.iterdir()} == {
        *manifest["files"],
        manifest["tokenizer"],
        "manifest.json",
    }
    assert manifest["tokenizer_sha256"] == sha256(manifest["tokenizer"])
    assert list(manifest["files"]) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    for name, entry in manifest["files"].items():
        assert entry == {"tokens": len(read_shard(built / name)), "sha256": sha256(name)}
    assert manifest["reference_bpb"] == json.loads((SAMPLE / "reference.json").read_text())["bpb"]


# ---- Tokenizer ----


def test_tokenizer_pieces(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(set(pieces)) == 1024 and pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert sum(tokenizer.is_byte(i) for i in range(1024)) == 256
    assert "▁" in pieces and "\n" in pieces
    assert not [piece for piece in pieces if "▁" in piece[1:]]


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", " a", "a ", "a  b", "line\n\nline\n", "\t\0\x7f", "naïve 日本 🙂", "<s>"],
)
def test_tokenizer_is_lossless_on_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not {0, 1, 2, 3} & set(ids)


def test_tokenizer_reproduces(tokenizer):
    again = bs.load_tokenizer(bs.train_tokenizer())
    assert bs.piece_table(again) == bs.piece_table(tokenizer)


def test_tokenizer_without_a_lone_space_is_refused(monkeypatch):
    monkeypatch.setattr(bs, "piece_table", lambda _: [(f"piece{i}", 0.0) for i in range(1024)])
    with pytest.raises(RuntimeError, match="lone space"):
        bs.load_tokenizer(bs.TOKENIZER.read_bytes())


# ---- Build: no-op, damage, concurrency, kill ----


def test_second_build_does_nothing(built, manifest):
    before = snapshot(built)
    assert bs.build(built) == manifest == bs.complete(built)
    assert run_cli("--out", str(built)).returncode == 0
    assert snapshot(built) == before


@pytest.mark.parametrize(
    "damage",
    [
        "flipped bit",
        "short shard",
        "missing shard",
        "no manifest",
        "torn manifest",
        "changed count",
        "other tokenizer",
    ],
)
def test_damage_is_detected_and_repaired(few, tmp_path, damage):
    out = tmp_path / "sample"
    good = bs.build(out)
    shard, description = out / "fineweb_val_000000.bin", out / "manifest.json"
    raw, text = shard.read_bytes(), description.read_text()
    {
        "flipped bit": lambda: shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])),
        "short shard": lambda: shard.write_bytes(raw[:-2]),
        "missing shard": shard.unlink,
        "no manifest": description.unlink,
        "torn manifest": lambda: description.write_text(text[: len(text) // 2]),
        "changed count": lambda: description.write_text(
            text.replace('"documents": ', '"documents": 1', 1)
        ),
        "other tokenizer": lambda: (out / good["tokenizer"]).write_bytes(b""),
    }[damage]()
    assert bs.complete(out) is None
    assert bs.build(out) == good == bs.complete(out)
    assert shard.read_bytes() == raw and not hidden_folders(tmp_path)


def test_other_inputs_cause_a_rebuild(few, tmp_path, monkeypatch):
    old = bs.build(tmp_path / "sample")
    monkeypatch.setattr(bs, "FORMAT", bs.FORMAT + 1)
    assert bs.complete(tmp_path / "sample") is None
    assert bs.build(tmp_path / "sample")["format"] == old["format"] + 1


def test_files_of_others_are_never_replaced(few, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt"):
        bs.build(tmp_path)
    done = run_cli("--out", str(tmp_path / "thesis.txt"))
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "is not a folder" in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_concurrent_builds_all_succeed(few, tmp_path, locks, before):
    out = tmp_path / "sample"
    if before == "damaged":
        out.mkdir()
        (out / "manifest.json").write_text("{}")
    children = [start_child(out, locks) for _ in range(2)]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert bs.complete(out) and not hidden_folders(tmp_path)


def test_concurrent_builds_of_the_whole_corpus(tmp_path, manifest):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "sample")]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert bs.complete(tmp_path / "sample") == manifest


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_killed_build_leaves_nothing_that_looks_finished(few, tmp_path, moment, before):
    out = tmp_path / "sample"
    if before == "damaged":
        bs.build(out)
        os.truncate(out / "fineweb_train_000000.bin", 1024)
    child = start_child(out, die_at=moment)
    child.communicate()
    assert child.returncode == -9
    assert bool(bs.complete(out)) == (moment >= PUBLISHED)
    if before == "nothing":
        assert out.exists() == (moment >= PUBLISHED)
    manifest = bs.build(out)
    assert manifest == bs.complete(out)
    if moment < PUBLISHED:
        assert not hidden_folders(tmp_path)


def test_kill_moments_cover_the_whole_build(tmp_path):
    child = start_child(tmp_path / "sample", die_at=max(MOMENTS) + 1)
    assert child.communicate() == (None, "") and child.returncode == 0


# ---- Command line and imports ----


def test_import_needs_no_torch():
    code = "import sys, build_sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


@pytest.mark.slow
def test_command_line():
    text = run_cli("--help").stdout
    assert "--out" in text and "--train-tokenizer" in text
    assert "all pieces and scores are identical" in run_cli("--train-tokenizer").stdout
    assert bs.OUT == ROOT / "data" / "datasets" / "sample_sp1024"


# ---- Reference figures ----


def test_reference_formula(monkeypatch, texts):
    """A compressor that does nothing spends 8 bits on each validation byte and on the blank line
    before them."""
    monkeypatch.setattr(bs, "compressors", lambda: {"none": lambda text: text})
    size = len("\n\n".join(texts["val"]).encode("utf-8"))
    assert bs.reference_bpb()["none"] == pytest.approx(8 * (size + 2) / size, abs=1e-6)


def test_reference_of_another_text_is_refused(monkeypatch, tmp_path):
    content = json.loads(bs.REFERENCE.read_text()) | {"source_sha256": "0" * 64}
    monkeypatch.setattr(bs, "REFERENCE", tmp_path / "reference.json")
    bs.REFERENCE.write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="--measure-reference"):
        bs.build(tmp_path / "sample")


@pytest.mark.survey
def test_reference_figures_recompute():
    """Half a minute, for whoever changes the sample: the stored figures are what the compressors
    give today."""
    pytest.importorskip("zstandard")
    pytest.importorskip("brotli")
    stored = json.loads((SAMPLE / "reference.json").read_text())["bpb"]
    assert bs.reference_bpb() == pytest.approx(stored, rel=0.005)

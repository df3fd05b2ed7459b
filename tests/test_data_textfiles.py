"""Corpora as people have them: each file is read right, or a line says what it is."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile

import build_sample
import documents as docs
import numpy as np
import prepare
import pytest
import textfiles
import zstandard
from conftest import ROOT, clean_env
from hypothesis import given, settings
from hypothesis import strategies as st
from running import refused

TOOL = ROOT / "data" / "prepare.py"
TEXTS = [d[:3000] for d in build_sample.documents()[:8]]
MARK = build_sample.SPACE


def read(path, field: str = "text") -> list[str]:
    """Documents of one file that are not blank."""
    return [text for text in textfiles.documents_of([path], field) if text.strip()]


def lines(texts: list[str], ending: str = "\n") -> str:
    """JSON lines, half of them objects."""
    values = [text if i % 2 else dict(text=text) for i, text in enumerate(texts)]
    return ending.join(json.dumps(value, ensure_ascii=False) for value in values) + ending


PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    ".zst": zstandard.compress,
}
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
}


def test_any_line_ending_encoding_mark_and_compression_gives_the_same_documents(tmp_path):
    """Findings 5: CRLF text was one document, UTF-16 and .bz2 and .zst were refused or misread."""
    texts = [*TEXTS, "caf\u00e9 \u20ac \U0001f600\nsecond line", "x\ty"]
    wrong = []
    for ending in ("\n", "\r\n", "\r"):
        plain = ("\n\n".join(texts) + "\n\n\n\n").replace("\n", ending)
        array = json.dumps([dict(text=t) for t in texts], indent=1).replace("\n", ending)
        for kind, content in (
            (".txt", plain),
            (".jsonl", lines(texts, ending)),
            (".json", array),
        ):
            for coding, mark in MARKS.items():
                for suffix, pack in PACKED.items():
                    path = tmp_path / f"corpus{kind}{suffix}"
                    path.write_bytes(pack(mark + content.encode(coding)))
                    if read(path) != texts:
                        wrong.append((ending, kind, coding, suffix))
    assert not wrong


def test_the_compression_is_told_by_the_content_and_may_come_in_several_frames(tmp_path):
    both = zstandard.compress(b"one\n\ntw") + zstandard.compress(b"o\n\nthree")
    for name, content in (
        ("named.txt", gzip.compress(b"one\n\ntwo\n\nthree")),
        ("named.gz", b"one\n\ntwo\n\nthree"),
        ("parts.txt.zst", both),
        ("parts.txt.gz", gzip.compress(b"one\n\ntw") + gzip.compress(b"o\n\nthree")),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ["one", "two", "three"], name


def tar_of(name: str, content: bytes) -> bytes:
    """A tar archive of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    """A zip archive of one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


TEXT = "\n\n".join(TEXTS)
REFUSED = {
    "latin.txt": ("caf\u00e9".encode("latin-1"), "byte 3 is not valid UTF-8; convert it"),
    "unmarked.txt": (TEXT.encode("utf-16-le"), "UTF-16 or UTF-32 without a byte-order mark"),
    "cut.jsonl": (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le")[:3], "not valid UTF-16"),
    "cut.txt.zst": (zstandard.compress(TEXT.encode())[:-9], "before the end of its last frame"),
    "cut.txt.gz": (gzip.compress(TEXT.encode())[:-9], "ended before"),
    "cut.txt.bz2": (bz2.compress(TEXT.encode())[:-9], "ended before"),
    "flipped.txt.zst": (b"\x28\xb5\x2f\xfd" + b"\xff" * 80, "damaged .zst"),
    "zipped.txt": (zip_of("a.txt", TEXT.encode()), "this is a zip archive"),
    "a.tar.gz": (gzip.compress(tar_of("a.txt", TEXT.encode())), "an archive"),
    "tarred.gz": (gzip.compress(tar_of("a.txt", TEXT.encode())), "this is a tar archive"),
    "table.csv": (b"text\nhello\n", "a table; want .txt, .jsonl"),
    "tokens.bin": (b"\0" * 2000, "`reencode` takes a folder of shards"),
    "a.json": (b'{"data": ["text"]}', "no field 'text' (there are: data); see --field"),
    "pretty.json": (b'{\n "text": "a"\n}', "line 1: Expecting property name"),
    "open.json": (b'["a", "b"', "item 3: the array does not end"),
    "no_comma.json": (b'["a" "b"]', "item 2: no comma between two items"),
    "more.json": (b'["a"] "b"', "something follows the array"),
    "number.json": (b'["a", 5]', "item 2: 'text' is no text but int"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}', "line 2: 'text' is no text but NoneType"),
    "deep.jsonl": (b"[" * 100_000, "recursion"),
    "second.txt": (b"fine\n\nab\xffc", "byte 8 is not valid UTF-8"),
    "second.jsonl": (b'"a"\n"\xff"', "byte 5 is not valid UTF-8"),
    "half.jsonl": (b'{"text": "ok"}\n{"text": "o', "line 2: Unterminated string"),
    "cut.txt.xz": (lzma.compress(TEXT.encode())[:-20], "ended before"),
    "surrogate.jsonl": (b'"a"\n"\\ud800"', "document 2: a lone surrogate"),
}


def test_what_cannot_be_read_is_refused_by_name_place_and_remedy(tmp_path):
    """Findings 5: compressed and JSON corpora that people have."""
    wrong = {}
    for name, (content, said) in REFUSED.items():
        (tmp_path / name).write_bytes(content)
        try:
            wrong[name] = read(tmp_path / name)
        except docs.DataError as error:
            if not str(error).startswith(name) or said not in str(error):
                wrong[name] = str(error)
    assert not wrong


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    texts=st.lists(st.text(alphabet="ab\n\r\u20ac ", max_size=8), max_size=6),
    chunk=st.integers(1, 7),
)
def test_where_the_pieces_of_a_file_end_does_not_matter(tmp_path_factory, texts, chunk):
    folder = tmp_path_factory.mktemp("pieces")
    content = "\n\n".join(texts)
    (folder / "a.txt").write_bytes(content.encode())
    (folder / "a.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "a.jsonl").write_text(lines(texts), encoding="utf-8")
    whole = content.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "CHUNK", chunk)
        assert read(folder / "a.txt") == [text for text in whole if text.strip()]
        for name in ("a.json", "a.jsonl"):
            assert list(textfiles.documents_of([folder / name], "text")) == texts


def test_one_huge_document_is_read_in_linear_time(tmp_path):
    """Its pieces were joined anew at each read: quadratic."""
    text = ("0123456789abcdef" * 4096 + "\n") * 900  # 59 MB
    (tmp_path / "huge.txt").write_text(text)
    (tmp_path / "huge.json").write_text(json.dumps([text]))
    (tmp_path / "huge.jsonl").write_text(json.dumps(text))
    for name in ("huge.txt", "huge.json", "huge.jsonl"):
        (found,) = read(tmp_path / name)
        assert found == text


# ---- Through data/prepare.py ----


@pytest.fixture
def encode(tmp_path):
    """data/prepare.py encode as a process; returns what ran and the folder."""

    def run(path, *extra, env: dict | None = None):
        out = tmp_path / f"{path.name}.out"
        command = [sys.executable, str(TOOL), "encode", str(path), "--out", str(out)]
        command += ["--tokenizer", str(build_sample.TOKENIZER), *extra]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=clean_env(**env or {}), timeout=120
        )
        done.code, done.out, done.err = done.returncode, done.stdout, done.stderr
        return done, out

    return run


def spelt(folder, split: str) -> list[str]:
    """Documents of a split, as SentencePiece itself decodes their tokens."""
    tokenizer = docs.load_tokenizer(build_sample.TOKENIZER)
    stream = docs.stream_of(folder, split, 1024)
    found = docs.documents_of_shards(stream, 1)
    return [tokenizer.processor.decode(ids.tolist()) for ids in found]


def test_a_windows_file_is_encoded_document_by_document(encode, tmp_path):
    """Finding 5, CRLF: the file was one document and --val-docs was blamed."""
    path = tmp_path / "windows.txt"
    path.write_bytes(codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode())
    done, out = encode(path, "--val-docs=3", "--workers=1")
    assert done.code == 0, done.err
    assert (spelt(out, "val"), spelt(out, "train")) == (TEXTS[:3], TEXTS[3:])


def test_a_file_without_blank_lines_is_refused_with_how_documents_are_told_apart(encode, tmp_path):
    (tmp_path / "one.txt").write_text("no\nblank\nline", encoding="utf-8")
    done, _ = encode(tmp_path / "one.txt", "--val-docs=3")
    refused(done, "in a text file, one blank line separates two documents")


def test_blank_documents_are_left_out_and_are_no_leak(encode, tmp_path):
    """Finding 5: two empty documents were refused as a leak."""
    path = tmp_path / "blank.jsonl"
    path.write_text(lines(["", TEXTS[0], " \n", TEXTS[1], "", TEXTS[2], ""]), encoding="utf-8")
    done, out = encode(path, "--val-docs=2", "--workers=1")
    assert done.code == 0, done.err
    assert (spelt(out, "val"), spelt(out, "train")) == (TEXTS[:1], TEXTS[1:3])


def test_empty_documents_of_shards_are_no_leak(tmp_path, capsys):
    """Finding 5, the brother: a stranger's shards may have a BOS right after a BOS."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for split, tokens in (("val", [1, 1, 70, 71]), ("train", [1, 80, 81, 1, 1, 82])):
        (folder / f"fineweb_{split}_000000.bin").write_bytes(build_sample.shard(np.array(tokens)))
    tokenizer = str(build_sample.TOKENIZER)
    arguments = ["reencode", str(folder), "--from", tokenizer, "--tokenizer", tokenizer]
    assert prepare.main([*arguments, "--out", str(tmp_path / "out"), "--workers=1"]) == 0
    assert prepare.main(["verify", str(tmp_path / "out")]) == 0, capsys.readouterr().out


def test_the_mark_of_a_space_survives_as_itself(encode, tmp_path):
    """Finding 5: U+2581 in text became a space, which was called normalisation."""
    texts = [f"a{MARK}b {MARK}", f"{MARK}{MARK}", TEXTS[0], f"end {MARK}", TEXTS[1]]
    (tmp_path / "mark.jsonl").write_text(lines(texts), encoding="utf-8")
    done, out = encode(tmp_path / "mark.jsonl", "--val-docs=3", "--workers=1")
    assert done.code == 0 and "changed" not in done.stdout, done.stdout + done.err
    assert (spelt(out, "val"), spelt(out, "train")) == (texts[:3], texts[3:])
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["splits"]["val"]["bytes"] == sum(len(t.encode()) for t in texts[:3])
    assert prepare.main(["verify", str(out)]) == 0


NO_SEMAPHORES = """
import _multiprocessing, errno
class SemLock:
    SEM_VALUE_MAX = 1
    def __init__(self, *args):
        raise OSError(errno.EROFS, "Read-only file system")
    def __new__(cls, *args):
        raise OSError(errno.EROFS, "Read-only file system")
_multiprocessing.SemLock = SemLock
"""


def test_without_shared_memory_one_process_encodes(encode, tmp_path):
    """Finding 5: "error: : Read-only file system" and no remedy."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_SEMAPHORES, encoding="utf-8")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    env = dict(PYTHONPATH=tmp_path / "site")
    done, out = encode(tmp_path / "a.txt", "--val-docs=3", "--workers=2", env=env)
    assert done.code == 0, done.err
    assert "no shared memory here" in done.err and "/dev/shm" in done.err
    assert spelt(out, "train") == TEXTS[3:]


def test_everything_is_utf8_whatever_the_locale(encode, tmp_path):
    """Finding M17: data tools under LC_ALL=C."""
    (tmp_path / "caf\u00e9.jsonl").write_text(lines(["na\u00efve \u20ac", *TEXTS]), "utf-8")
    env = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done, out = encode(tmp_path / "caf\u00e9.jsonl", "--val-docs=1", "--workers=1", env=env)
    assert done.code == 0, done.err
    assert spelt(out, "val") == ["na\u00efve \u20ac"]


def test_a_long_document_does_not_hinder_the_training_of_a_tokenizer(tmp_path):
    """SentencePiece skips a text of more than 16 MiB without a word."""
    words = [f"w{i % 977}" for i in range(50)]
    texts = [" ".join(words)] * 2 + [" ".join(["long", *words] * 90_000)]
    assert len(texts[2]) > 1 << 24
    model = prepare.train_model(texts, 300, False)
    (tmp_path / "a.model").write_bytes(model)
    assert b"g" in docs.load_tokenizer(tmp_path / "a.model").pieces, "only the long text has a g"

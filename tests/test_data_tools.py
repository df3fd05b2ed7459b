"""Tools of data/ that prepare a user's own text."""
import lzma
import subprocess
import sys

import build_sample
import encode_text
import numpy as np
import pytest
import train_gpt
from conftest import ROOT, clean_env

TOOL = ROOT / "data" / "encode_text.py"


@pytest.fixture
def texts(tmp_path):
    """A training text, compressed, and a validation text, plain, of real documents."""
    documents = build_sample.documents()[:9]
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress("\n\n".join(documents[:7]).encode()))
    (tmp_path / "val.txt").write_text("\n\n".join(documents[7:]) + "\n\n\n\n", encoding="utf-8")
    return tmp_path, documents


def tool(folder, **given):
    """The tool as a process; returns exit code, output and errors."""
    knobs = dict(tokenizer=build_sample.TOKENIZER, train=folder / "train.txt.xz", val=folder / "val.txt",
                 out=folder / "out") | given
    return subprocess.run([sys.executable, str(TOOL), *(f"--{k}={v}" for k, v in knobs.items())], capture_output=True,
                          text=True, env=clean_env(), timeout=120)


def test_shards_hold_every_document_after_a_bos(texts, tokenizer):
    folder, documents = texts
    done = tool(folder)
    assert done.returncode == 0 and "VOCAB_SIZE=1024" in done.stdout, done.stderr
    for split, docs in (("train", documents[:7]), ("val", documents[7:])):
        stream = train_gpt.TokenStream(folder / "out", split, 1024)
        tokens = stream.read(0, len(stream)).tolist()
        assert tokens == [t for d in docs for t in [1, *tokenizer.encode(d.strip("\n"))]]
    cfg = train_gpt.load(dict(PRESET="baseline+tiny", DEVICE="cpu", DATA_PATH=str(folder / "out")))
    data = train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))
    assert data.val_bytes.sum() == sum(len(d.strip("\n").encode()) for d in documents[7:])
    assert data.manifest["comparable"] is False and "val.txt" in data.manifest["note"]


def test_long_text_becomes_several_shards_of_the_same_stream(texts, monkeypatch):
    folder, _ = texts
    monkeypatch.setattr(encode_text, "DOCUMENTS", 2)
    paths = dict(train=folder / "train.txt.xz", val=folder / "val.txt")
    whole, cut = (folder / name for name in ("whole", "cut"))
    encode_text.build(build_sample.TOKENIZER, paths, whole)
    encode_text.build(build_sample.TOKENIZER, paths, cut, limit=1000)
    one, many = (train_gpt.TokenStream(out, "train", 1024) for out in (whole, cut))
    assert len(many.files) == -(-len(one) // 1000) > 3 and all(len(s) == 1000 for s in many.shards[:-1])
    assert np.array_equal(one.read(0, len(one)), many.read(0, len(many)))


@pytest.mark.parametrize("case", ["no text", "empty text", "not utf-8", "broken xz", "no tokenizer", "same documents",
                                  "folder exists"])
def test_bad_input_is_one_line_and_leaves_nothing(texts, case):
    folder, _ = texts
    bad = folder / "bad.txt"
    given = {"no text": dict(train=folder / "absent.txt"), "empty text": dict(val=bad), "not utf-8": dict(val=bad),
             "broken xz": dict(train=folder / "bad.txt.xz"), "no tokenizer": dict(tokenizer=bad),
             "same documents": dict(train=folder / "val.txt"), "folder exists": dict(out=folder)}[case]
    bad.write_bytes(b"\xff\xfe\x81" if case == "not utf-8" else b"\n\n \n\n")
    (folder / "bad.txt.xz").write_bytes(b"no xz")
    before = sorted(folder.iterdir())
    done = tool(folder, **given)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr and sorted(folder.iterdir()) == before

"""Parts of data/: the case transform and its byte counts, readers of documents, the writer of
shards."""

import contextlib
import json
import os
import sys
import time

import build_sample
import caseops
import documents as docs
import numpy as np
import prepare
import pytest
import textfiles
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt

SETTINGS = settings(deadline=None, max_examples=200, derandomize=True)
TEXT = st.text() | st.text(
    "aAbBzZ \n\u2581\ue001\ue002\ue003\ue004\u00e9\u00c9\u0130\u00df\x00", max_size=24
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A small ordinary tokenizer and one with case operators."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for kind, with_operators in (("plain", False), ("caseops", True)):
        model = prepare.train_model(build_sample.documents()[:30], 400, with_operators)
        (folder / f"{kind}.model").write_bytes(model)
        found[kind] = docs.load_tokenizer(folder / f"{kind}.model")
    return found


# ---- CaseOps ----


@SETTINGS
@given(TEXT)
@example("\ue004\ue004\ue001A\ue002")
@example("aB\ue003cD")
def test_any_text_survives_the_case_transform(text):
    spelt = caseops.encode(text)
    assert caseops.decode(spelt) == text
    assert not any("A" <= c <= "Z" for c in spelt)


@pytest.mark.parametrize(
    "text, spelt",
    [
        ("the end", "the end"),
        ("The End", "\ue001the \ue001end"),
        ("NASA, US", "\ue002nasa, \ue002us"),
        ("A B", "\ue001a \ue001b"),
        ("iPhone", "i\ue003phone"),
        ("McDonald", "\ue001mc\ue003donald"),
        ("HTMLPage", "\ue001h\ue003t\ue003m\ue003l\ue003page"),
        ("\u00c9A", "\u00c9\ue001a"),
        ("x\ue001Y", "x\ue004\ue001\ue001y"),
    ],
)
def test_words_are_spelt_as_published(text, spelt):
    """The rules of the specification (PR 1729), word by word."""
    assert caseops.encode(text) == spelt


def test_operators_that_change_nothing_stand_for_nothing():
    assert caseops.decode("\ue001\u00e9\ue003 \ue002") == "\u00e9 "


def test_a_long_run_of_letters_takes_linear_time():
    begin = time.perf_counter()
    caseops.decode(caseops.encode("a" * 3_000_000 + "B" + "c" * 3_000_000))
    assert time.perf_counter() - begin < 20  # a quadratic search takes hours


@SETTINGS
@given(text=TEXT.filter(lambda t: "\u2581" not in t))
@example("\ue004 A\ue001")
def test_byte_counts_sum_to_the_bytes_of_the_original_text(tokenizers, text):
    batch = prepare.encode_documents([text], tokenizers["caseops"], None, True)
    assert batch.counts.sum() == len(text.encode()) == batch.sizes[0] and batch.changed == [-1]
    assert len(batch.counts) == len(batch.tokens) and batch.counts[0] == 0


def test_byte_counts_follow_the_decoded_text_token_by_token(tokenizers):
    """Two errors that cancel in a document do not cancel here."""
    tokenizer = tokenizers["caseops"]
    batch = prepare.encode_documents(
        ["The NASA iPhone na\u00efve Z. \ue002 x"], tokenizer, None, True
    )
    ids, running = batch.tokens[1:], np.cumsum(batch.counts[1:])
    for k in range(1, len(ids) + 1):
        spelt = tokenizer.spell(ids[:k])
        if ids[k - 1] not in tokenizer.operators and not spelt.decode("utf-8", "replace").endswith(
            "\ufffd"
        ):
            assert running[k - 1] == len(caseops.decode(spelt.decode()).encode()), k


def test_ordinary_byte_counts_are_those_of_the_scores(tokenizers):
    """Without operators it is train_gpt's table, but for a space after BOS, which that leaves
    out."""
    tokenizer, text = tokenizers["plain"], "Some text, na\u00efve \u20ac \x00 and all."
    tokens = prepare.encode_documents([text], tokenizer, None, False).tokens
    table = train_gpt.byte_table(tokenizer.processor, 400)
    assert (
        caseops.byte_counts(tokens, tokenizer.sizes, [])[1:].tolist()
        == table.target_bytes(tokens).tolist()
    )


# ---- Tokenizers ----


def test_a_trained_tokenizer_has_what_byte_counting_needs(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.processor.piece_to_id("\u2581") != tokenizer.processor.unk_id()
        assert (
            not tokenizer.changes_text()
            and sum(map(tokenizer.processor.is_byte, range(400))) == 256
        )
    assert [len(t.operators) for t in tokenizers.values()] == [0, 4]


def test_a_text_without_spaces_still_gives_a_lone_space_piece(tmp_path):
    (tmp_path / "m.model").write_bytes(
        prepare.train_model(["abcdefg" * 300, "gfabc\nd" * 300], 280, False)
    )
    assert docs.load_tokenizer(tmp_path / "m.model").text(np.array([5, 4 + 32])) == "\x01 "
    assert not docs.load_tokenizer(tmp_path / "m.model").changes_text()


@pytest.mark.parametrize(
    "options",
    [
        dict(byte_fallback=False),
        dict(normalization_rule_name="nmt_nfkc"),
        dict(remove_extra_whitespaces=True),
    ],
)
def test_a_lossy_tokenizer_is_not_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(prepare, "TRAINER", prepare.TRAINER | options)
    documents = [
        f"{d[:3000]}\u20ac  {i}\ufb01\u4e2d"[i:]
        for i, d in enumerate(build_sample.documents()[:120])
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(dict(text=d)) for d in documents))
    out = tmp_path / "lossy.model"
    assert (
        prepare.main(
            [
                "train-tokenizer",
                str(tmp_path / "d.jsonl"),
                "--val-docs=0",
                "--vocab-size=500",
                f"--out={out}",
            ]
        )
        == 2
    )
    assert "lossy" in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == [
        "d.jsonl"
    ]


# ---- Documents ----


def read(*paths, field="text"):
    return list(textfiles.documents_of(list(paths), field))


def test_parquet_gives_its_column_or_says_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(docs.DataError, match="d.parquet: .*pyarrow"):
        read(path)
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table(dict(text=["one", "two"], n=[1, 2])), path)
    assert read(path) == ["one", "two"]
    for field, said in (("body", "no column 'body'"), ("n", "a row without text")):
        with pytest.raises(docs.DataError, match=said):
            read(path, field=field)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(docs.DataError, match="d.parquet"):
        read(path)


def test_odd_documents_are_encoded_and_counted_exactly(tokenizers):
    """Empty, one byte, NULs, one very long line, every kind of space."""
    odd = [
        "",
        "x",
        "\x00",
        "\x00\x00a\x00",
        "word " * 200_000,
        "\u2028\u00a0\t \r\n ",
        " leading",
        "\ufeffmark",
    ]
    for tokenizer in tokenizers.values():
        batch = prepare.encode_documents(odd, tokenizer, None, bool(tokenizer.operators))
        assert batch.sizes == [len(d.encode()) for d in odd] and batch.changed == [-1] * len(odd)
        assert sum(batch.lengths) == len(batch.tokens) and batch.lengths[:2] == [1, 2]


def test_a_document_that_does_not_survive_is_counted_by_what_is_left(tokenizers):
    """Without byte pieces the space mark decodes to a space: one of three bytes is counted."""
    blind = tokenizers["plain"]._replace(space_mark=[])
    batch = prepare.encode_documents(["a\u2581b"], blind, None, False)
    assert batch.sizes == [3] and batch.changed == [5]


def test_the_mark_of_a_space_is_spelt_in_bytes_among_case_operators_too(tokenizers):
    texts = ["a\u2581B", "\u2581", "THE \u2581\u2581 End"]
    for tokenizer in tokenizers.values():
        batch = prepare.encode_documents(texts, tokenizer, None, bool(tokenizer.operators))
        assert batch.changed == [-1] * 3 and batch.sizes == [len(t.encode()) for t in texts]


# ---- Shards ----


class Dead(Exception):
    """Stands for a kill."""


def written(folder, limit, batches, journal, die_at=0):
    """Write batches of documents, whose tokens are their own numbers; ends by Dead after some
    files."""
    writer, left = prepare.ShardWriter(folder, limit, journal), die_at
    real = writer.write

    def write(name, parts):
        nonlocal left
        left -= 1
        if left == 0:
            raise Dead
        real(name, parts)

    writer.write = write
    first = writer.document
    for split, lengths, numbers in batches:
        keep = [i for i, n in enumerate(numbers) if n >= first]
        if keep:
            tokens = [np.arange(lengths[i]) + 1000 * numbers[i] for i in keep]
            writer.add(
                split,
                prepare.Encoded(
                    np.concatenate(tokens).astype(np.uint16),
                    [lengths[i] for i in keep],
                    [7] * len(keep),
                    [-1] * len(keep),
                    None,
                ),
            )
    writer.flush(writer.document, 0)
    return journal


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=30),
    limit=st.integers(5, 50),
    data=st.data(),
)
def test_shards_hold_the_stream_and_a_killed_writer_goes_on(tmp_path_factory, lengths, limit, data):
    val, deaths = (
        data.draw(st.integers(1, len(lengths) - 1)),
        data.draw(st.lists(st.integers(1, 5), max_size=4)),
    )
    folder, numbers = tmp_path_factory.mktemp("shards"), list(range(len(lengths)))
    batches = [
        (split, [lengths[i]], [i]) for i in numbers for split in ["val" if i < val else "train"]
    ]
    stored = folder / prepare.JOURNAL
    for die_at in [*deaths, 0]:
        journal = (
            json.loads(stored.read_text())
            if stored.exists()
            else dict(splits={}, files={}, cursor=[0, 0])
        )
        before = dict(journal["files"])
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Dead):
            patch.setattr(os, "fsync", lambda handle: None)
            written(folder, limit, batches, journal, die_at)
        after = json.loads(stored.read_text())["files"] if stored.exists() else {}
        assert before.items() <= after.items(), "what was finished stays"
    for split, want in (("val", numbers[:val]), ("train", numbers[val:])):
        stream = train_gpt.TokenStream(folder, split, 2**16)
        assert stream.read(0, len(stream)).tolist() == [
            t + 1000 * i for i in want for t in range(lengths[i])
        ]
        assert all(len(shard) == limit for shard in stream.shards[:-1])
        assert journal["splits"][split] == dict(
            documents=len(want),
            tokens=len(stream),
            bytes=7 * len(want),
            changed_documents=0,
            lost_bytes=0,
        )


def test_documents_are_read_back_from_shards_of_any_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "TEXT_CHUNK", 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, n).astype(np.uint16) for n in (0, 1, 30, 7, 0, 0, 12)]
    stream = np.concatenate([[1, *d] for d in documents])
    for number, part in enumerate(np.split(stream, [5, 6, 20, 41])):
        (tmp_path / f"fineweb_train_{number:06d}.bin").write_bytes(build_sample.shard(part))
    found = list(docs.documents_of_shards(docs.stream_of(tmp_path, "train", 99), 1))
    assert [d.tolist() for d in found] == [d.tolist() for d in documents]

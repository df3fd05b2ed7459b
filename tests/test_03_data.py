"""Shards, byte accounting and loaders, each against struct, SentencePiece itself or plain
arithmetic."""

import io
import json
import lzma
import re
import struct
import threading
from itertools import pairwise

import build_sample
import numpy as np
import prepare
import pytest
import sentencepiece
import torch
from conftest import ROOT, official, run_script, write_shard
from helpers import config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import refused

import train_gpt

CORPUS = ROOT.parent / "shared" / "corpus"  # real web text, present only beside some checkouts
SETTINGS = settings(deadline=None, max_examples=150, derandomize=True)


def write_shards(folder, shards) -> train_gpt.TokenStream:
    """Write each token list as one shard and open them all."""
    for i, tokens in enumerate(shards):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", tokens)
    return train_gpt.TokenStream(folder, "train", 2**16)


# ---- Shards ----


def test_a_shard_is_read_bit_for_bit(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 5000).tolist() + [0, 65535]
    write_shard(tmp_path / "shard.bin", tokens)
    read = train_gpt.open_shard(tmp_path / "shard.bin")
    raw = (tmp_path / "shard.bin").read_bytes()
    assert list(struct.unpack(f"<{len(tokens)}H", raw[1024:])) == read.tolist()


@SETTINGS
@given(
    shards=st.lists(
        st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_reading_across_shard_borders_equals_plain_concatenation(tmp_path_factory, shards, data):
    stream = write_shards(tmp_path_factory.mktemp("shards"), shards)
    plain = [token for shard in shards for token in shard]
    assert len(stream) == len(plain)
    start = data.draw(st.integers(0, len(plain) - 1))
    count = data.draw(st.integers(1, len(plain) - start))
    read = stream.read(start, count)
    assert read.dtype == np.uint16 and read.tolist() == plain[start : start + count]


def test_shards_follow_each_other_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 10, 1):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    stream = train_gpt.TokenStream(tmp_path, "train", 2**16)
    assert stream.read(0, 4).tolist() == [0, 1, 2, 10]


INTERESTING = st.sampled_from(
    [20240520, 1, 0, -1, 2, 3, 2**31 - 1, -(2**31), 20240521]
) | st.integers(-(2**31), 2**31 - 1)
HEADERS = st.tuples(st.just(20240520), st.just(1), st.integers(-2, 6)) | st.tuples(
    *[INTERESTING] * 3
)


@SETTINGS
@given(start=HEADERS, body=st.binary(max_size=12), cut=st.none() | st.integers(0, 1030))
@example(start=(20240520, 1, 2), body=b"\x01\x02\x03\x04", cut=None)
@example(start=(20240520, 1, 0), body=b"", cut=None)
@example(start=(20240520, 1, 2**31 - 1), body=b"\x01\x02", cut=None)
def test_any_shard_gives_its_tokens_or_a_user_error(tmp_path_factory, start, body, cut):
    path = tmp_path_factory.mktemp("fuzz") / "shard.bin"
    content = (struct.pack("<256i", *start, *[0] * 253) + body)[:cut]
    path.write_bytes(content)
    count = start[2]
    if start[:2] == (20240520, 1) and count > 0 and len(content) == 1024 + 2 * count:
        assert train_gpt.open_shard(path).tolist() == list(struct.unpack(f"<{count}H", body))
    else:
        with pytest.raises(train_gpt.UserError, match="shard.bin"):
            train_gpt.open_shard(path)


# ---- Bad input through the real entry point ----


def corrupt(folder, name, case):
    """Damage one file of a dataset folder in the named way."""
    path = folder / name
    good = path.read_bytes()
    (count,) = struct.unpack_from("<i", good, 8)
    header = {
        "wrong magic": (20240521, 1, count),
        "wrong version": (20240520, 2, count),
        "zero count": (20240520, 1, 0),
        "negative count": (20240520, 1, -count),
    }
    content = {
        "empty file": b"",
        "half a header": good[:500],
        "truncated": good[:-100],
        "odd-sized": good[:-1],
        "too long": good + b"\0\0",
    }
    path.write_bytes(
        struct.pack("<3i", *header[case]) + good[12:] if case in header else content[case]
    )


@pytest.fixture
def dataset(toy, tmp_path):
    """A private copy of the toy dataset, to be damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in toy.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def assert_refused(dataset, named, **knobs):
    """A run ends at once with exit code 2 and one line that names the culprit, before a model is
    built."""
    knobs = (
        dict(PRESET="baseline+tiny", DATA_PATH=dataset, RUNS_DIR=dataset.parent / "runs") | knobs
    )
    run = run_script(timeout=60, **knobs)
    refused(run, named)
    assert "model_params" not in run.out


DAMAGE = [
    "empty file",
    "half a header",
    "truncated",
    "odd-sized",
    "too long",
    "wrong magic",
    "wrong version",
    "zero count",
    "negative count",
]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_shard_is_refused_by_name(dataset, split):
    """Every damage as a function, one through the whole script."""
    name = max(dataset.glob(f"fineweb_{split}_*.bin")).name
    good = (dataset / name).read_bytes()
    cfg = config(DATA_PATH=dataset)
    for case in DAMAGE:
        (dataset / name).write_bytes(good)
        corrupt(dataset, name, case)
        with pytest.raises(train_gpt.UserError, match=name):
            train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))
    assert_refused(dataset, name)


def test_a_missing_folder_is_refused_by_name(dataset):
    assert_refused(dataset, "nowhere", DATA_PATH=dataset / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_shards_is_refused_by_pattern(dataset, split):
    for path in dataset.glob(f"fineweb_{split}_*.bin"):
        path.unlink()
    assert_refused(dataset, f"fineweb_{split}_*.bin")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_is_refused_by_shard(dataset, split):
    write_shard(dataset / f"fineweb_{split}_000002.bin", [5, 6] * 50 + [1024] + [7] * 50)
    assert_refused(dataset, f"fineweb_{split}_000002.bin")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_text_shorter_than_one_row_or_window_is_refused_by_shard(dataset, split):
    for path in dataset.glob(f"fineweb_{split}_*.bin"):
        path.unlink()
    write_shard(dataset / f"fineweb_{split}_000000.bin", [5] * 64)
    assert_refused(dataset, f"fineweb_{split}_000000.bin")


@pytest.mark.slow
def test_a_folder_named_like_a_shard_is_refused(dataset):
    (dataset / "fineweb_train_000009.bin").mkdir()
    knobs = dict(PRESET="baseline+tiny", DATA_PATH=dataset, RUNS_DIR=dataset.parent / "runs")
    run = run_script(timeout=60, **knobs)
    assert run.code == 2 and re.fullmatch("error: .*train_000009.bin: Is a directory\n", run.err)


@pytest.mark.slow
def test_two_tokenizers_in_one_folder_are_refused_by_name(dataset):
    (dataset / "a_second.model").write_bytes((dataset / "tokenizer.model").read_bytes())
    assert_refused(dataset, "a_second.model, tokenizer.model: say which with TOKENIZER_PATH")


def test_text_of_exactly_one_row_and_window_is_accepted(dataset):
    (dataset / "fineweb_train_000001.bin").unlink()
    write_shard(dataset / "fineweb_train_000000.bin", [5] * 65)
    write_shard(dataset / "fineweb_val_000000.bin", [5] * 65)
    cfg = config(DATA_PATH=dataset)
    data = train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))
    assert (len(data.train), len(data.val), len(data.val_bytes)) == (65, 65, 64)


def test_a_data_folder_may_have_brackets_in_its_name(dataset):
    cfg = config(DATA_PATH=dataset.rename(dataset.with_name("data[1]")))
    assert len(train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {})).val) > 64


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[1]",
        '{"comparable": false}',
        '{"files": 5}',
        '{"files": {"a": {}}}',
        '{"reference_bpb": {"xz": "best"}}',
    ],
)
def test_a_damaged_manifest_is_refused_by_name(dataset, manifest):
    (dataset / "manifest.json").write_text(manifest)
    cfg = config(DATA_PATH=dataset)
    with pytest.raises(train_gpt.UserError, match="manifest.json"):
        train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))


# ---- Tokenizers ----


def train_tokenizer(text: str, **options) -> bytes:
    """A small SentencePiece model of one document, with the options of the sample's tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]), model_writer=model, **build_sample.TRAINER | options
    )
    return model.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["missing", "random bytes", "another size", "no lone space"])
def test_an_unusable_tokenizer_is_refused_by_name(dataset, case):
    text = build_sample.documents()[0][:20_000]
    makers = {
        "missing": lambda: None,
        "random bytes": lambda: np.random.default_rng(0).bytes(5000),
        "another size": lambda: train_tokenizer(text, vocab_size=400),
        "no lone space": lambda: train_tokenizer(text.replace(" ", ""), vocab_size=400),
    }
    path = dataset / "other.model"
    if content := makers[case]():
        path.write_bytes(content)
    if case == "no lone space":
        assert "\u2581" not in [piece_of(path, i) for i in range(400)]
    assert_refused(
        dataset,
        "other.model",
        TOKENIZER_PATH=path,
        VOCAB_SIZE=400 if case == "no lone space" else 1024,
    )


def piece_of(path, i: int) -> str:
    """One piece of a SentencePiece model file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).id_to_piece(i)


@pytest.mark.parametrize(
    "options",
    [
        dict(split_by_whitespace=False),
        dict(allow_whitespace_only_pieces=True),
        dict(user_defined_symbols=["a\u2581b"]),
    ],
    ids=["words joined", "runs of spaces", "user-defined"],
)
def test_a_tokenizer_with_a_space_inside_a_piece_is_refused_or_counted_right(tmp_path, options):
    """The mark's spelling takes three bytes, the space it stands for one: counting the spelling
    flatters the score."""
    text = "of the  end of the\n    a b a b " * 200
    (tmp_path / "odd.model").write_bytes(
        train_tokenizer(text, vocab_size=300, hard_vocab_limit=False, **options)
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "odd.model")).vocab_size()
    assert any("\u2581" in piece_of(tmp_path / "odd.model", i)[1:] for i in range(size))
    try:
        tokenizer = train_gpt.read_tokenizer(tmp_path / "odd.model", config(VOCAB_SIZE=size))
    except train_gpt.UserError:
        return
    assert counted(tokenizer, tokenizer.encode(text)) == len(text.encode())


def test_the_begin_of_document_id_is_the_tokenizers_or_refused(dataset):
    """Finding M11: it was the constant 1 whatever the tokenizer."""
    text = build_sample.documents()[0][:20_000]
    path = dataset / "tokenizer.model"
    knobs = dict(VOCAB_SIZE=400, DATA_PATH=dataset)
    for ids, said in (
        (dict(bos_id=2, eos_id=1), "begins documents with id 2 but BOS_ID=1"),
        (dict(bos_id=-1, eos_id=1, unk_id=2), "no begin-of-document id"),
    ):
        path.write_bytes(train_tokenizer(text, vocab_size=400, **ids))
        with pytest.raises(train_gpt.UserError, match=said):
            train_gpt.read_tokenizer(path, config(**knobs))
    path.write_bytes(train_tokenizer(text, vocab_size=400, bos_id=2, eos_id=1))
    assert train_gpt.read_tokenizer(path, config(BOS_ID=2, **knobs)).bos_id() == 2


def test_the_begin_of_document_id_reaches_all_who_ask(tmp_path):
    """Finding M11: attention, gate, loader and borders find documents by the tokenizer's id."""
    cfg = config(BOS_ID=7, DOC_ATTENTION=1, SMEAR_GATE="D", TRAIN_SEQ_LEN=16, VOCAB_SIZE=64)
    ids = torch.tensor([[7, 9, 1, 9, 7, 9]])
    visible = train_gpt.visible_keys(ids, cfg.model)[0]
    assert visible[3, :4].all() and not visible[4, :4].any() and visible[5, 4]
    gate = train_gpt.SmearGateC(cfg.model, 0)
    gate.strength.data.fill_(1)
    x = torch.ones(1, 6, cfg.model.model_dim)
    moved = (gate(x, ids) != x).any(-1)[0].tolist()
    assert moved == [False, True, True, True, False, True]
    assert train_gpt.document_borders(ids[0].numpy(), 7).tolist() == [0, 4, 5]
    stream = write_shards(tmp_path, [[7, 8, 1, 9] * 200])
    packed = train_gpt.LOADERS["packed"](stream, cfg)
    packed.read(0, 1, 0, 1)
    starts = np.flatnonzero(packed.text == 7)
    assert set(np.diff(starts).tolist()) == {4}, "documents are moved as a whole"


@pytest.mark.slow
def test_a_run_with_another_begin_of_document_id_counts_its_documents(tmp_path):
    """Finding M11: doc_loss.npy had one row instead of 20, and old artifacts mean 1."""
    texts = [d[:400] for d in build_sample.documents()[:60]]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in texts), encoding="utf-8")
    model = tmp_path / "two.model"
    model.write_bytes(
        train_tokenizer("\n".join(texts), vocab_size=400, bos_id=2, eos_id=3, pad_id=1, unk_id=0)
    )
    out = tmp_path / "data"
    arguments = ["encode", path, "--val-docs=20", "--tokenizer", model, "--out", out]
    assert prepare.main([*map(str, arguments), "--workers=1"]) == 0
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["bos_id"] == 2
    knobs = dict(PRESET="baseline+tiny", DATA_PATH=out, VOCAB_SIZE=400, ITERATIONS=2, RUN_ID="r")
    knobs |= dict(RUNS_DIR=tmp_path, TRAIN_SEQ_LEN=64, EVAL="doc", LOADER="packed", THREADS=1)
    refused(run_script(**knobs), "begins documents with id 2 but BOS_ID=1")
    run = run_script(BOS_ID=2, **knobs)
    assert run.code == 0, run.err
    rows = np.load(tmp_path / "r" / "doc_loss.npy")
    assert len(rows) == 20
    assert rows[:, 1].tolist() == [len(t.encode()) - t.startswith(" ") for t in texts[:20]]
    again = run_script(
        RUN_MODE="eval", ARTIFACT=tmp_path / "r" / "model.golf", DATA_PATH=out, THREADS=1
    )
    assert again.code == 0, again.err
    assert official(again.out) == official(run.out)


def test_shards_of_another_family_are_named_with_a_remedy(dataset):
    """Finding 5: GPT-2 and byte ids ended in "fineweb_50304_bpe.model: no such file"."""
    rng = np.random.default_rng(0)
    for kind, tokens, vocab in (
        ("GPT-2 ids", [50256, *rng.integers(0, 50256, 500).tolist()], 50304),
        ("GPT-2 ids", [50256, *rng.integers(0, 50256, 500).tolist()], 1024),
        ("byte ids", [1, *rng.integers(4, 260, 500).tolist()], 260),
        ("byte ids", [1, *rng.integers(4, 260, 1 << 16).tolist()], 1024),
    ):
        write_shard(dataset / "fineweb_val_000000.bin", tokens)
        cfg = config(DATA_PATH=dataset, VOCAB_SIZE=vocab)
        with pytest.raises(train_gpt.UserError, match=f"holds {kind}.*data/prepare.py"):
            train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))


def test_shards_under_another_name_are_listed(dataset):
    for path in dataset.glob("fineweb_*.bin"):
        path.rename(path.with_name(path.name.replace("fineweb", "stories")))
    with pytest.raises(train_gpt.UserError, match="there are: stories_train_000000.bin"):
        train_gpt.TokenStream(dataset, "val", 1024)


def test_all_65536_ids_of_uint16_can_be_used(tmp_path):
    """Finding 5: prepare.py says "train with VOCAB_SIZE=65536", which was out of range."""
    symbols = [f"w{i}" for i in range(65_536 - 4 - 256 - 20)]
    text = " ".join(symbols[::97]) + " the end of a text"
    model = train_tokenizer(text, vocab_size=65_536, user_defined_symbols=symbols)
    (tmp_path / "big.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size() == 65_536
    ids = [1, 65_535, *tokenizer.encode(text)] * 3
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", ids)
    cfg = config(DATA_PATH=tmp_path, VOCAB_SIZE=65_536)
    data = train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))
    assert data.val[1] == 65_535 and len(data.val_bytes) == len(ids) - 1
    sizes = [len(tokenizer.decode([65_535]).encode()), len(text.encode())]
    assert data.val_bytes.sum() == 3 * sum(sizes)


# ---- Bytes ----


def counted(tokenizer, ids) -> int:
    """Bytes that the code under test counts for a document that starts after BOS."""
    table = train_gpt.byte_table(tokenizer, tokenizer.vocab_size())
    return int(table.target_bytes(np.array([tokenizer.bos_id(), *ids])).sum())


def decoded_bytes(tokenizer, ids) -> int:
    """UTF-8 length of the decoded text; a space right after BOS is an artefact of the spelling and
    does not count."""
    return len(tokenizer.decode(ids).removeprefix(" ").encode())


def test_every_document_of_the_sample_is_counted_as_its_utf8_length(tokenizer):
    documents = build_sample.documents()
    table = train_gpt.byte_table(tokenizer, 1024)
    for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
        assert table.target_bytes(np.array([1, *ids])).sum() == len(document.encode())


@pytest.mark.skipif(not CORPUS.exists(), reason="needs the corpus of real web text")
@pytest.mark.parametrize("vocab", [1024, 4096, 8192])
def test_real_web_documents_are_counted_as_their_utf8_length(vocab):
    model = CORPUS / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    documents = (
        lzma.decompress((CORPUS / "fineweb_val_a.txt.xz").read_bytes()).decode().split("\n\n")[:150]
    )
    table = train_gpt.byte_table(tokenizer, vocab)
    for ids in tokenizer.encode(documents):
        assert table.target_bytes(np.array([1, *ids])).sum() == len(tokenizer.decode(ids).encode())


@pytest.mark.slow
@settings(deadline=None, max_examples=500, derandomize=True)
@given(text=st.text() | st.text(alphabet="ab \u2581\n\u20ac\U0001f600\x00"))
@example(text="  two spaces before, two after  ")
def test_any_text_is_counted_as_its_decoded_utf8_length(tokenizer, text):
    ids = tokenizer.encode(text)
    assert counted(tokenizer, ids) == decoded_bytes(tokenizer, ids)


def test_the_count_follows_the_decoded_text_token_by_token(tokenizer):
    """Two errors that cancel in a document do not cancel here."""
    ids = tokenizer.encode(
        build_sample.documents()[5][:1500] + " \u20ac 5 \U0001f600, na\u00efve \x00 end"
    )
    assert sum(map(tokenizer.is_byte, ids)) > 7, "the text needs characters that are spelt in bytes"
    table = train_gpt.byte_table(tokenizer, 1024)
    running = np.cumsum(table.target_bytes(np.array([1, *ids])))
    whole = [
        k for k in range(1, len(ids)) if not tokenizer.is_byte(ids[k])
    ]  # never cut inside a character
    assert [running[k - 1] for k in whole] == [
        len(tokenizer.decode(ids[:k]).encode()) for k in whole
    ]


@pytest.mark.parametrize(
    "pieces, expected",
    [
        (
            ["<s>", "a", "\u2581the", "\u2581", "\u2581the"],
            [1, 4, 1, 4],
        ),  # a space counts once, not twice
        (["a", "<0xE2>", "<0x82>", "<0xAC>"], [1, 1, 1]),  # a byte is a byte, not the 3 of U+FFFD
        (
            ["a", "<s>", "\u2581the", "<s>", "\u2581", "\u2581the"],
            [0, 3, 0, 0, 4],
        ),  # no space is printed after BOS
        (
            ["a", "<unk>", "\u2581the", "<pad>", "\u2581the"],
            [0, 3, 0, 3],
        ),  # nor after other pieces without text
    ],
    ids=["leading space", "byte fallback", "after BOS", "after controls"],
)
def test_known_miscounts_are_trapped(tokenizer, pieces, expected):
    ids = [tokenizer.piece_to_id(piece) for piece in pieces]
    assert [tokenizer.id_to_piece(i) for i in ids] == pieces
    assert train_gpt.byte_table(tokenizer, 1024).target_bytes(np.array(ids)).tolist() == expected


def test_the_bytes_of_a_validation_set_are_those_of_its_text(toy, tokenizer):
    cfg = config(DATA_PATH=toy)
    data = train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))
    raw = (toy / "fineweb_val_000000.bin").read_bytes()[1024:]
    ids = struct.unpack(f"<{len(raw) // 2}H", raw)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert int(data.val_bytes.sum()) == len(tokenizer.decode(list(ids[1:])).encode())


# ---- Loaders ----

SEQ, TOKENS = 16, 1000  # 62 rows and a tail of 7 tokens


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """A stream in which every token is its own position, in three shards."""
    tokens = list(range(TOKENS))
    return write_shards(
        tmp_path_factory.mktemp("positions"), [tokens[:333], tokens[333:340], tokens[340:]]
    )


def loader(stream, kind: str, rows: int = 5, seed: int = 1):
    cfg = config(LOADER=kind, TRAIN_SEQ_LEN=SEQ, TRAIN_BATCH_TOKENS=rows * SEQ, SEED=seed)
    return train_gpt.LOADERS[kind](stream, cfg)


def deal(source, steps: int, world: int = 1) -> list[list[list[int]]]:
    """Rows of each step, in rank order; `source` makes one loader per rank."""
    ranks = [source() for _ in range(world)]
    return [
        [row.tolist() for rank, each in enumerate(ranks) for row in each.next(rank, world)]
        for _ in range(steps)
    ]


def rows_of(stream, kind: str, count: int, **options) -> list[list[int]]:
    """The first `count` rows that a loader deals to a single rank."""
    rows = options.pop("rows", 1)
    steps = deal(lambda: loader(stream, kind, rows, **options), -(-count // rows))
    return [row for step in steps for row in step][:count]


@pytest.mark.parametrize("kind", ["sequential", "coprime", "shuffled"])
def test_a_row_is_contiguous_text_of_one_token_more_than_the_context(positions, kind):
    for row in rows_of(positions, kind, 150):
        assert row == list(range(row[0], row[0] + SEQ + 1))


def test_the_sequential_loader_reads_the_stream_in_order_and_wraps(positions):
    rows = rows_of(positions, "sequential", 2 * 62)
    assert [token for row in rows[:62] for token in row[:-1]] == list(range(62 * SEQ))
    assert rows[62:] == rows[:62]


@pytest.mark.parametrize("kind", ["coprime", "shuffled"])
def test_every_row_is_visited_once_per_epoch_in_a_new_order(positions, kind):
    rows = rows_of(positions, kind, 3 * 62)
    epochs = [[row[0] for row in rows[62 * e : 62 * (e + 1)]] for e in range(3)]
    for starts in epochs:
        inside = sorted(starts)
        assert inside == list(range(inside[0], inside[0] + 62 * SEQ, SEQ)), (
            "each row once, none overlapping"
        )
        assert inside[0] < TOKENS - 62 * SEQ
    assert all(a != b for a, b in pairwise(epochs)) and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("kind", ["coprime", "shuffled"])
def test_the_phase_of_the_rows_differs_between_epochs(positions, kind):
    rows = rows_of(positions, kind, 20 * 62)
    phases = {min(row[0] for row in rows[62 * e : 62 * (e + 1)]) for e in range(20)}
    assert len(phases) > 3, "the tail must not always be the part that is left out"


@pytest.mark.parametrize("kind", ["coprime", "shuffled", "packed"])
def test_the_order_depends_on_the_seed_alone(documents, kind):
    first = rows_of(documents, kind, 150, seed=1)
    np.random.seed(99)
    train_gpt.torch.manual_seed(99)
    assert rows_of(documents, kind, 150, seed=1) == first
    assert rows_of(documents, kind, 150, seed=1, rows=7) == first, "nor on the batch size"
    assert rows_of(documents, kind, 150, seed=2) != first


def test_rows_of_one_step_are_far_apart_in_the_text_at_a_coprime_stride(positions):
    for seed in range(20):
        starts = [row[0] for row in rows_of(positions, "coprime", 62, seed=seed)]
        assert min(abs(a - b) for a, b in pairwise(starts)) > 62 * SEQ // 4


# Documents of 2 to 17 tokens, and one of 201, in rows of 16. A token tells its document and its
# place, so that a row
# can be checked against the text.
@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 17, 160).tolist() + [200, 3, 1]
    tokens = [
        t for d, n in enumerate(lengths) for t in [1, *range(300 * d + 300, 300 * d + 300 + n)]
    ]
    return write_shards(
        tmp_path_factory.mktemp("documents"), [tokens[:900], tokens[900:901], tokens[901:]]
    )


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(train_gpt.PackedLoader, "WINDOW", 32)


def test_packed_rows_predict_every_token_once_from_what_is_before_it(documents, small_windows):
    """Whatever the order of the documents, a target is the token that follows in its document, or
    the next BOS."""
    total = (len(documents) - 1) // SEQ
    text = documents.read(0, len(documents)).tolist()
    for epoch in range(2):
        rows = rows_of(documents, "packed", total * (epoch + 1))[total * epoch :]
        pairs = [pair for row in rows for pair in pairwise(row)]
        assert all(b in (a + 1, 1) if a != 1 else b > 1 and b % 300 == 0 for a, b in pairs)
        targets, phase = sorted(b for _, b in pairs), len(documents) - total * SEQ
        assert targets in [
            sorted(text[start + 1 : start + 1 + total * SEQ]) for start in range(phase)
        ]


def test_packing_cuts_few_documents(documents, small_windows):
    """A row that does not begin with a BOS continues a document of another row."""
    cuts = {
        kind: sum(row[0] != 1 for row in rows_of(documents, kind, (len(documents) - 1) // SEQ))
        for kind in ("sequential", "packed")
    }
    assert cuts["packed"] < 0.5 * cuts["sequential"], cuts


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    filled=st.integers(0, 40),
    row=st.integers(1, 16),
)
def test_best_fit_takes_the_longest_that_fits(lengths, filled, row):
    order, at, left = train_gpt.best_fit(lengths, filled, row), filled, sorted(lengths)
    assert sorted(order) == list(range(len(lengths)))
    for chosen in order:
        room = row - at % row
        assert lengths[chosen] == max([n for n in left if n <= room] or left)
        left.remove(lengths[chosen])
        at += lengths[chosen]


@pytest.mark.parametrize(
    "tokens", [17, 18, 100], ids=["one row", "one row and phase", "no document begins"]
)
def test_packing_bears_text_without_documents(tmp_path, tokens):
    stream = write_shards(tmp_path, [[7] * tokens])
    assert rows_of(stream, "packed", 5) == [[7] * 17] * 5


KINDS = ["sequential", "coprime", "shuffled", "packed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_any_number_of_ranks_shares_the_same_steps(documents, kind, world, small_windows):
    alone = deal(lambda: loader(documents, kind), 20)
    shared = deal(lambda: loader(documents, kind), 20, world)
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(kind=st.sampled_from(KINDS), before=st.integers(0, 40), rows=st.integers(1, 70))
@example(kind="shuffled", before=62, rows=1)
@example(kind="shuffled", before=61, rows=1)
@example(kind="packed", before=63, rows=1)
def test_a_restored_loader_continues_with_exactly_the_same_batches(positions, kind, before, rows):
    original = loader(positions, kind, rows)
    for _ in range(before):
        original.next(0, 1)
    restored = loader(positions, kind, rows)
    restored.dealt = original.dealt
    for _ in range(62 // rows + 2):  # past the next epoch border
        assert np.array_equal(restored.next(0, 1), original.next(0, 1))
    assert restored.dealt == original.dealt


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_another_size_than_expected_loses_and_repeats_no_row(
    positions, kind, small_windows
):
    ramp = loader(positions, kind, rows=10)
    found = [
        row.tolist()
        for share in (1, 0.3, 0.3, 1, 0.5, 0.1, 1, 1) * 4
        for row in ramp.next(0, 1, round(10 * share))
    ]
    assert found == rows_of(positions, kind, len(found)) and len(found) > 2 * 62


def test_rows_of_the_next_step_are_read_while_this_one_computes(positions, monkeypatch):
    read, reads = train_gpt.TokenStream.read, []
    monkeypatch.setattr(
        train_gpt.TokenStream,
        "read",
        lambda self, start, count: (
            reads.append((start // SEQ, threading.current_thread())),
            read(self, start, count),
        )[1],
    )
    source = loader(positions, "sequential", rows=5)
    source.next(0, 1)
    for step in range(1, 4):
        source.ahead[1].result(timeout=60)  # nobody asked for it yet
        assert [row for row, _ in reads] == list(range(5 * (step + 1)))
        assert source.next(0, 1)[:, 0].tolist() == [
            SEQ * row for row in range(5 * step, 5 * step + 5)
        ]
    assert threading.current_thread() not in {thread for _, thread in reads}


def test_a_damaged_row_stops_the_step_that_needs_it_and_none_before(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [7] * 20 * SEQ + [5000] + [7] * 20 * SEQ)
    source = loader(train_gpt.TokenStream(tmp_path, "train", 1024), "sequential", rows=5)
    for _ in range(3):
        assert (source.next(0, 1) == 7).all()
    with pytest.raises(train_gpt.OneRankFailed, match="token id 5000"):
        source.next(0, 1)


@pytest.fixture
def trainer(positions):
    """A trainer on the stream of positions: 7 rows per step in micro-batches of 2."""
    cfg = config(TRAIN_SEQ_LEN=SEQ, TRAIN_BATCH_TOKENS=7 * SEQ, MICRO_BATCH_TOKENS=2 * SEQ)
    data = train_gpt.Data(positions, np.zeros(0, np.uint16), np.zeros(0, np.int16), "", {})
    model = train_gpt.GPT(cfg.model, 1024, train_gpt.Numerics())
    return train_gpt.Trainer(cfg, train_gpt.Runtime(cfg, {}), data, model, train_gpt.Numerics())


def test_training_targets_are_the_inputs_shifted_by_one(trainer):
    rows = trainer.loader.next(0, 1)
    batches = list(trainer.micro_batches(rows))
    assert len({ids.shape for ids, _, _ in batches}) == 1, "one shape, so that one graph serves all"
    assert sum(real for _, _, real in batches) == 7
    ids, targets = (np.concatenate([b[i].numpy() for b in batches]) for i in (0, 1))
    assert np.array_equal(ids[:7], rows[:, :-1]) and np.array_equal(targets[:7], ids[:7] + 1)
    assert len(ids) == 8 and (targets[7:] == -100).all(), "padding rows must give no loss"


@pytest.mark.parametrize("place", [335, 1000])
def test_a_token_outside_the_vocabulary_that_the_first_look_missed_stops_training_by_shard(
    tmp_path, place
):
    """Only its reader sees it: another rank may be fine."""
    for i, shard in enumerate(([7] * 333, [7] * 900)):
        tokens = [1024 if i * 333 + j == place else token for j, token in enumerate(shard)]
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", tokens)
    stream = train_gpt.TokenStream(tmp_path, "train", 1024)
    assert stream.read(0, 335).max() == 7
    with pytest.raises(
        train_gpt.OneRankFailed, match="fineweb_train_000001.bin: token id 1024 .*VOCAB_SIZE=1024"
    ):
        stream.read(330, 800)

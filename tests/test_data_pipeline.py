"""From raw documents to a score: every step of data/prepare.py through its command line, killed,
repeated, broken."""

import contextlib
import json
import lzma
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import build_sample
import documents as docs
import numpy as np
import prepare
import pytest
import verify
from build_sample import sha256_file
from conftest import ROOT, clean_env, official, run_script, write_shard
from helpers import config
from running import refused

import train_gpt

TOOL = ROOT / "data" / "prepare.py"
CORPUS = ROOT.parent / "shared" / "corpus"  # real web text, present only beside some checkouts
VAL, SHARD = 5, 20_000
TEXTS = [d[:6000] for d in build_sample.documents()[:60]]


def prepared(*arguments) -> int:
    """The command line, in this process."""
    return prepare.main([str(a) for a in arguments])


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """(inode, modification time) by name: unchanged means that nothing was written."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write_documents(path: Path, texts: list[str]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents, two tokenizers, and datasets encoded and re-encoded with both."""
    folder = tmp_path_factory.mktemp("made")
    path = write_documents(folder / "documents.jsonl", TEXTS)
    for name, size, extra in (("plain", 512, ()), ("caseops", 600, ("--caseops",))):
        assert (
            prepared(
                "train-tokenizer",
                path,
                f"--val-docs={VAL}",
                "--vocab-size",
                size,
                "--out",
                folder / f"{name}.model",
                *extra,
            )
            == 0
        )
        assert (
            prepared(
                "encode",
                path,
                f"--val-docs={VAL}",
                "--tokenizer",
                folder / f"{name}.model",
                "--out",
                folder / name,
                f"--shard-tokens={SHARD}",
                "--workers=1",
            )
            == 0
        )
    for old, new in (("plain", "caseops"), ("caseops", "plain")):
        assert (
            prepared(
                "reencode",
                folder / old,
                "--from",
                folder / f"{old}.model",
                "--tokenizer",
                folder / f"{new}.model",
                "--out",
                folder / f"{old}_to_{new}",
                f"--shard-tokens={SHARD}",
                "--workers=2",
            )
            == 0
        )
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A private copy of a dataset, to be damaged."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def open_data(folder: Path, **knobs) -> train_gpt.Data:
    """The dataset as training opens it."""
    vocab = json.loads((folder / "manifest.json").read_text())["vocab_size"]
    cfg = config(data_path=folder, vocab_size=vocab, **knobs)
    return train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))


# ---- Exact at every stage ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "caseops", "plain_to_caseops", "caseops_to_plain"])
def test_the_bytes_of_every_stage_are_those_of_the_raw_text(made, name):
    data = open_data(made / name, caseops=int(name.endswith("caseops")))
    assert data.val_bytes.sum(dtype=np.int64) == sum(len(t.encode()) for t in TEXTS[:VAL])
    manifest = data.manifest
    assert [manifest["splits"][s]["documents"] for s in ("val", "train")] == [VAL, len(TEXTS) - VAL]
    assert manifest["splits"]["train"]["bytes"] == sum(len(t.encode()) for t in TEXTS[VAL:])
    assert manifest["splits"]["train"]["tokens"] == len(data.train)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "caseops"])
def test_shards_decode_to_the_raw_text(made, name):
    tokenizer = docs.load_tokenizer(made / f"{name}.model")
    stream = docs.stream_of(made / name, "train", len(tokenizer.pieces))
    assert [tokenizer.text(ids) for ids in docs.documents_of_shards(stream, 1)] == TEXTS[VAL:]
    assert len(stream.files) > 2 and all(len(s) == SHARD for s in stream.shards[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("old, new", [("plain", "caseops"), ("caseops", "plain")])
def test_reencoding_gives_the_shards_of_encoding(made, old, new):
    """Whatever the number of workers: the first was made by one, the second by two."""
    ours, theirs = contents(made / f"{old}_to_{new}"), contents(made / new)
    assert {n for n in ours if ours[n] != theirs.get(n)} == {"manifest.json"}, (
        "only the inputs differ"
    )


def test_own_texts_become_shards_with_a_bos_before_each_document(tmp_path, tokenizer):
    """Compressed training text, plain validation text, no number of documents to count."""
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress("\n\n".join(TEXTS[:7]).encode()))
    (tmp_path / "val.txt").write_text("\n\n".join(TEXTS[7:9]) + "\n\n\n\n", encoding="utf-8")
    assert (
        prepared(
            "encode",
            tmp_path / "train.txt.xz",
            "--val",
            tmp_path / "val.txt",
            "--workers=1",
            "--tokenizer",
            build_sample.TOKENIZER,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    for split, texts in (("train", TEXTS[:7]), ("val", TEXTS[7:9])):
        stream = train_gpt.TokenStream(tmp_path / "out", split, 1024)
        assert stream.read(0, len(stream)).tolist() == [
            t for d in texts for t in [1, *tokenizer.encode(d)]
        ]
    assert open_data(tmp_path / "out").manifest["comparable"] is False


@pytest.mark.slow
def test_a_tokenizer_can_be_trained_on_the_text_of_shards(made, tmp_path, capsys):
    """The same documents are read, without those of the validation split: so it is the same
    tokenizer."""
    assert (
        prepared(
            "train-tokenizer",
            made / "caseops",
            "--from",
            made / "caseops.model",
            "--vocab-size=512",
            "--out",
            tmp_path / "again.model",
        )
        == 0
    )
    assert (tmp_path / "again.model").read_bytes() == (made / "plain.model").read_bytes()
    told, held = (
        json.loads((tmp_path / "again.json").read_text())["held_out"],
        TEXTS[49],
    )  # every 50th of all
    tokens = len(docs.load_tokenizer(tmp_path / "again.model").processor.encode(held))
    assert told == dict(
        documents=1,
        bytes=len(held.encode()),
        tokens=tokens,
        bytes_per_token=len(held.encode()) / tokens,
    )
    assert "held-out documents, all of which" in capsys.readouterr().out


@pytest.mark.slow
def test_a_clean_dataset_has_no_findings(made):
    for name in ("plain", "caseops", "plain_to_caseops"):
        found = verify.verify(made / name)
        assert found["clean"] and found["findings"] == [], found
        assert found["splits"]["val"]["bytes"] == sum(len(t.encode()) for t in TEXTS[:VAL])


@pytest.mark.slow
def test_repeating_any_step_does_nothing(made, capsys):
    before = {d: snapshot(made / d) for d in ("", "plain", "plain_to_caseops")}
    path = made / "documents.jsonl"
    assert (
        prepared(
            "train-tokenizer",
            path,
            f"--val-docs={VAL}",
            "--vocab-size=512",
            "--out",
            made / "plain.model",
        )
        == 0
    )
    assert (
        prepared(
            "encode",
            path,
            f"--val-docs={VAL}",
            "--tokenizer",
            made / "plain.model",
            "--out",
            made / "plain",
            f"--shard-tokens={SHARD}",
        )
        == 0
    )
    assert (
        prepared(
            "reencode",
            made / "plain",
            "--from",
            made / "plain.model",
            "--tokenizer",
            made / "caseops.model",
            "--out",
            made / "plain_to_caseops",
            f"--shard-tokens={SHARD}",
        )
        == 0
    )
    assert {d: snapshot(made / d) for d in before} == before
    assert (
        prepared(
            "encode",
            path,
            "--val-docs=6",
            "--tokenizer",
            made / "plain.model",
            "--out",
            made / "plain",
            f"--shard-tokens={SHARD}",
        )
        == 2
    )
    assert "exists already and was not made of these inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_caseops_dataset_trains_and_is_scored_by_its_sidecar(made, tmp_path):
    knobs = dict(
        PRESET="baseline+tiny",
        DEVICE="cpu",
        THREADS=1,
        DATA_PATH=made / "caseops",
        VOCAB_SIZE=600,
        CASEOPS=1,
        LOADER="packed",
        ITERATIONS=3,
        NUMERICS="fp32",
        ATTENTION="sdpa",
        RUNS_DIR=tmp_path,
    )
    done = run_script(RUN_ID="a", **knobs)
    assert done.code == 0, done.err
    raw = sum(len(t.encode()) for t in TEXTS[:VAL])
    assert f" bytes:{raw}" in official(done.out)
    (quoted,) = re.findall(r"audit:data manifest_sha256:(\w+) .*val_bytes:" + str(raw), done.out)
    assert quoted == sha256_file(made / "caseops" / "manifest.json")
    assert quoted == verify.verify(made / "caseops")["manifest_sha256"]


# ---- Interrupted ----

CHILD = f"""
import os, signal, sys
sys.path.insert(0, {str(TOOL.parent)!r})
import documents, prepare
left, real = int(sys.argv[1]), documents.write_atomic
def deadly(path, content):
    global left
    left -= path.suffix == ".bin"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)
documents.write_atomic = deadly
sys.exit(prepare.main(sys.argv[2:]))
"""


def processes(mentioning: str) -> list[str]:
    """Numbers of the running processes whose environment has a text in it; none where there is no
    /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] * (mentioning.encode() in path.read_bytes())
    return found


@pytest.mark.slow
def test_a_killed_encoding_goes_on_from_the_last_whole_shard(made, tmp_path):
    arguments = [
        "encode",
        made / "documents.jsonl",
        f"--val-docs={VAL}",
        "--tokenizer",
        made / "caseops.model",
        "--out",
        tmp_path / "caseops",
        f"--shard-tokens={SHARD}",
        "--workers=2",
    ]
    died = subprocess.run(
        [sys.executable, "-c", CHILD, "4", *map(str, arguments)],
        timeout=120,
        env=clean_env(STARTED_BY=tmp_path),
    )
    partial = tmp_path / ".caseops.partial"
    assert died.returncode == -signal.SIGKILL and not (tmp_path / "caseops").exists()
    kept = snapshot(partial)
    assert sum(name.endswith(".bin") for name in kept) == 4
    deadline = time.monotonic() + 30
    while left := processes(f"STARTED_BY={tmp_path}"):
        assert time.monotonic() < deadline, f"the workers of a killed parent must end too: {left}"
        time.sleep(0.1)
    assert prepared(*arguments) == 0 and not partial.exists()
    after = snapshot(tmp_path / "caseops")
    assert all(after[n] == kept[n] for n in kept if n.endswith(".bin")), (
        "finished shards are not written again"
    )
    assert contents(tmp_path / "caseops") == contents(made / "caseops")


# ---- Refused before anything is written ----


def refusals(folder: Path) -> dict[str, tuple[list, str]]:
    """Arguments by case, each with what the error must say."""
    path, tokenizer = folder / "documents.jsonl", ["--tokenizer", folder / "plain.model"]
    leaked = write_documents(folder / "leaked.jsonl", [*TEXTS[:20], TEXTS[2]])
    wrong = write_documents(folder / "wrong.jsonl", TEXTS[:20])
    (folder / "wrong.source_manifest.json").write_text('{"docs_sha256": "00"}')
    return {
        "a leaked document": (
            ["encode", leaked, "--val-docs=5", *tokenizer],
            "1 training document(s) are validation",
        ),
        "too few documents": (
            ["encode", path, *tokenizer],
            "60 validation and 0 training documents",
        ),
        "no validation": (
            ["encode", path, "--val-docs=0", *tokenizer],
            "0 validation and 60 training documents",
        ),
        "the same file twice": (
            ["encode", path, "--val", path, *tokenizer],
            "60 training document(s) are validation",
        ),
        "other documents than promised": (
            ["encode", wrong, "--val-docs=2", *tokenizer],
            "its source manifest says 00",
        ),
        "no such file": (
            ["encode", folder / "absent.jsonl", *tokenizer],
            "absent.jsonl: No such file",
        ),
        "no such tokenizer": (
            ["encode", path, "--tokenizer", folder / "absent.model"],
            "absent.model",
        ),
        "not a tokenizer": (
            ["encode", path, "--tokenizer", path],
            "documents.jsonl: not a SentencePiece model",
        ),
        "text to reencode": (["reencode", path, *tokenizer], "`reencode` a folder of shards"),
        "shards without tokenizer": (
            ["reencode", folder / "plain", *tokenizer],
            "one folder of shards and --from with their tokenizer",
        ),
        "shards of another tokenizer": (
            ["reencode", folder / "caseops", "--from", folder / "plain.model", *tokenizer],
            "token id",
        ),
        "a negative number": (["encode", path, "--val-docs=-1", *tokenizer], "--val-docs -1"),
        "no workers": (["encode", path, "--workers=0", *tokenizer], "--workers 0"),
    }


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(made, tmp_path, capsys):
    for case, (arguments, said) in refusals(made).items():
        assert prepared(*arguments, "--out", tmp_path / "out") == 2, case
        error = capsys.readouterr().err.splitlines()
        assert [line for line in error if line.startswith("error: ") and said in line], (
            case,
            error,
        )
        assert not {p.name for p in tmp_path.iterdir()} - {".out.lock"}, case


@pytest.mark.slow
def test_leaked_documents_can_be_left_out(made, tmp_path):
    path = write_documents(tmp_path / "leaked.jsonl", [*TEXTS[:20], TEXTS[2], TEXTS[21]])
    assert (
        prepared(
            "encode",
            path,
            "--val-docs=5",
            "--drop-leaked",
            "--tokenizer",
            made / "plain.model",
            "--out",
            tmp_path / "out",
            "--workers=1",
        )
        == 0
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] == 16 and manifest["dropped_documents"] == 1
    assert verify.verify(tmp_path / "out")["clean"]


@pytest.mark.slow
def test_the_command_line_as_a_user_starts_it(made, copy):
    def tool(*arguments):
        done = subprocess.run(
            [sys.executable, str(TOOL), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=clean_env(),
            timeout=120,
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    bad = copy("plain")
    (bad / "fineweb_train_000000.bin").write_bytes(b"short")
    found = tool("verify", bad, "--json")
    assert (
        found.code == 1
        and json.loads(found.out)["findings"][0]["where"] == "fineweb_train_000000.bin"
    )
    refused(tool("verify", bad / "nowhere"), "nowhere: no such folder")
    assert "train-tokenizer" in tool("--help").out


# ---- Planted defects ----


def retoken(folder: Path, split: str, change):
    """Rewrite the first shard of a split with other tokens, without manifest, as a stranger's
    dataset is."""
    path = min(folder.glob(f"fineweb_{split}_*.bin"))
    tokens = np.fromfile(path, "<u2", offset=1024)
    path.write_bytes(build_sample.shard(change(tokens)))
    (folder / "manifest.json").unlink(missing_ok=True)


def first_document(folder: Path) -> np.ndarray:
    """The first validation document, with its BOS."""
    tokens = np.fromfile(folder / "fineweb_val_000000.bin", "<u2", offset=1024)
    return tokens[: np.flatnonzero(tokens == 1)[1]]


def leak(folder):
    retoken(folder, "train", lambda tokens: np.concatenate([first_document(folder), tokens]))


def wrong_val(folder):
    (folder / "manifest.json").unlink()
    folder.rename(folder.with_name("fineweb10B_sp512"))
    return folder.with_name("fineweb10B_sp512")


def other_tokenizer(folder):
    shutil.copyfile(folder / "plain.model", folder / "kept")
    model = prepare.train_model([t.upper() for t in TEXTS], 512, False)
    (folder / "plain.model").write_bytes(model)
    (folder / "manifest.json").unlink()


def unknown(folder):
    retoken(folder, "val", lambda tokens: np.where(np.arange(len(tokens)) == 50, 3, tokens))


def truncate(folder):
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(folder):
    path = folder / "fineweb_train_000001.bin"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)


def miscounted_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resum(folder: Path, name: str):
    """Make the manifest agree with a changed file, so that only its meaning is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = sha256_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sidecar_off_by_one(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    counts = np.fromfile(path, "<u2", offset=1024)
    counts[77] += 1
    path.write_bytes(build_sample.shard(counts))
    resum(folder, path.name)


def sidecar_shifted(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    path.write_bytes(build_sample.shard(np.roll(np.fromfile(path, "<u2", offset=1024), 1)))
    (folder / "manifest.json").unlink()


def no_sidecar(folder):
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    (folder / "manifest.json").unlink()


DEFECTS = {
    "leaked document": ("plain", leak, "overlap"),
    "truncated shard": ("plain", truncate, "shard"),
    "one bit": ("plain", one_bit, "manifest"),
    "wrong tokenizer": ("plain", other_tokenizer, "tokenizer"),
    "lossy tokenizer": ("plain", unknown, "lossy"),
    "wrong validation split": ("plain", wrong_val, "validation"),
    "wrong validation count": ("plain", miscounted_manifest, "count"),
    "sidecar off by one": ("caseops", sidecar_off_by_one, "sidecar"),
    "sidecar shifted": ("caseops", sidecar_shifted, "sidecar"),
    "no sidecar": ("caseops", no_sidecar, "sidecar"),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(copy, defect):
    name, plant, check = DEFECTS[defect]
    folder = copy(name)
    folder = plant(folder) or folder
    found = verify.verify(folder)
    assert check in {f["check"] for f in found["findings"]} and not found["clean"], found
    assert all(
        f["where"] and f["detail"] for f in found["findings"]
    ) and "FINDING" in verify.report(found)


def test_the_published_fingerprints_are_recognised_and_the_known_mistakes_are_not():
    """Targets and bytes from logs of accepted and of refuted runs (rules of the competition, case
    law)."""
    for targets, size in (
        (62_021_845, 151_080_891),
        (45_508_608, 151_080_891),
        (40_540_160, 151_080_891),
        (40_541_000, 151_073_604),
        (47_853_343, 151_074_309),
    ):
        assert verify.known_split(targets, size), (targets, size)
    for targets, size in (
        (62_021_845, 157_319_833),
        (40_540_160, 176_000_000),
        (47_853_343, 164_594_398),
        (49_999_872, 151_080_891),
        (9_662_464, 29_950_821),
    ):
        assert not verify.known_split(targets, size), (targets, size)


# ---- What training refuses ----

REFUSED_BY_TRAINING = {
    "CaseOps not asked for": (
        "caseops",
        lambda f: None,
        dict(CASEOPS=0),
        "has 4 case operators but CASEOPS=0",
    ),
    "no operators": (
        "plain",
        lambda f: None,
        dict(CASEOPS=1),
        "has 0 case operators but CASEOPS=1",
    ),
    "no sidecar": (
        "caseops",
        no_sidecar,
        dict(CASEOPS=1),
        "no file matches fineweb_val_bytes_*.bin",
    ),
    "sidecar shifted": ("caseops", sidecar_shifted, dict(CASEOPS=1), "the counts are shifted"),
    "another length": (
        "caseops",
        lambda f: (
            (f / "manifest.json").unlink() or write_shard(f / "fineweb_val_bytes_000001.bin", [1])
        ),
        dict(CASEOPS=1),
        "byte counts for",
    ),
    "a stranger's shard": (
        "plain",
        lambda f: write_shard(f / "fineweb_train_000009.bin", [1, 5]),
        {},
        "fineweb_train_000009.bin: not the shard that manifest.json names",
    ),
    "another validation text": (
        "plain",
        lambda f: retoken_in_place(f),
        {},
        "fineweb_val_000000.bin: not the shard",
    ),
    "another tokenizer": (
        "plain",
        lambda f: (f / "plain.model").write_bytes(prepare.train_model(TEXTS[:9], 512, False)),
        {},
        "not the tokenizer that manifest.json names",
    ),
}


def retoken_in_place(folder: Path):
    """Change one validation token, keeping length and manifest."""
    path = folder / "fineweb_val_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=1024)
    tokens[9] ^= 1
    path.write_bytes(build_sample.shard(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED_BY_TRAINING)
def test_training_refuses(copy, case):
    name, damage, knobs, said = REFUSED_BY_TRAINING[case]
    folder = copy(name)
    damage(folder)
    with pytest.raises(train_gpt.UserError, match=re.escape(said)):
        cfg = config(data_path=folder, vocab_size=600 if name == "caseops" else 512, **knobs)
        train_gpt.open_data(cfg, train_gpt.Runtime(cfg, {}))


def test_a_vocabulary_without_shards_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt, "SCRIPT", tmp_path / "train_gpt.py")
    cfg = config(vocab_size=8192, caseops=1)
    with pytest.raises(
        train_gpt.UserError, match="--variant sp8192_lossless_caps_caseops_v1_reserved or"
    ):
        train_gpt.locate_data(cfg, train_gpt.Runtime(cfg, {}))


# ---- Real web text, with the competition's own tokenizers ----


@pytest.mark.skipif(not CORPUS.exists(), reason="needs the corpus of real web text")
def test_real_web_text_through_the_competitions_tokenizers(tmp_path):
    raw = (
        lzma.decompress((CORPUS / "fineweb_val_a.txt.xz").read_bytes()).decode().split("\n\n")[:80]
    )
    path = write_documents(tmp_path / "web.jsonl", raw)
    models = {
        k: CORPUS / "tokenizers" / f"fineweb_{k}.model"
        for k in ("1024_bpe", "8192_bpe", "8192_bpe_lossless_caps_caseops_v1_reserved")
    }
    common = ["--val-docs=20", "--workers=1"]
    assert (
        prepared(
            "encode", path, *common, "--tokenizer", models["1024_bpe"], "--out", tmp_path / "no"
        )
        == 2
    )
    common.append("--allow-normalisation")
    assert (
        prepared(
            "encode", path, *common, "--tokenizer", models["1024_bpe"], "--out", tmp_path / "a"
        )
        == 0
    )
    for name, model in list(models.items())[1:]:
        assert (
            prepared(
                "reencode",
                tmp_path / "a",
                "--from",
                models["1024_bpe"],
                "--tokenizer",
                model,
                "--out",
                tmp_path / name,
                *common,
            )
            == 0
        )
        found, start = verify.verify(tmp_path / name), verify.verify(tmp_path / "a")
        assert found["clean"] and start["clean"], (found, start)
        assert found["splits"]["val"]["bytes"] == start["splits"]["val"]["bytes"]
    data = open_data(tmp_path / name, caseops=1)
    assert data.val_bytes.sum(dtype=np.int64) == sum(len(d.encode()) for d in raw[:20])

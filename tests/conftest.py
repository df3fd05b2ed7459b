"""Shared by all tests: the script as a module and as a process, and a small dataset of real text."""

import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import build_sample  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]


def clean_env(**knobs) -> dict[str, str]:
    """The process environment without any knob, plus the given ones."""
    env = {
        k: v for k, v in os.environ.items() if k.lower() not in train_gpt.KNOBS and k != "PRESET"
    }
    return env | {k: str(v) for k, v in knobs.items()}


def run_script(
    nproc: int = 0, timeout: float = 300, cwd: Path = ROOT, script: Path = SCRIPT, args=(), **knobs
):
    """Run train_gpt.py as a user would; nproc > 0 goes through torchrun. Returns code, out, err."""
    launcher = [sys.executable]
    if nproc:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    done = subprocess.run(
        launcher + [str(script), *args],
        env=clean_env(**knobs),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def official(text: str) -> str:
    """The one official line of a log."""
    lines = [line for line in text.splitlines() if line.startswith("final:official ")]
    assert len(lines) == 1, f"{len(lines)} official lines in:\n{text[-2000:]}"
    return lines[0]


def write_shard(
    path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None
):
    """A shard in the competition's format, written without the code under test."""
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens))


@pytest.fixture(scope="session")
def tokenizer():
    return build_sample.load_tokenizer(build_sample.TOKENIZER.read_bytes())


@pytest.fixture(scope="session")
def toy(tmp_path_factory, tokenizer):
    """A dataset folder of real text: two training shards of about 30,000 tokens, a validation shard of about 3,000."""
    folder = tmp_path_factory.mktemp("toy")
    documents = build_sample.documents()
    ids = [[1] + tokenizer.encode(d) for d in documents[:24]]
    for name, docs in (
        ("train_000000", ids[:11]),
        ("train_000001", ids[11:23]),
        ("val_000000", [ids[23][:3000]]),
    ):
        write_shard(folder / f"fineweb_{name}.bin", [t for d in docs for t in d])
    (folder / "tokenizer.model").write_bytes(build_sample.TOKENIZER.read_bytes())
    return folder

"""Shared by all tests: what is quick, the script as a module and as a process, small real text."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# A shell's background jobs ignore SIGINT, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import build_sample  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402

# ---- What is collected, what is quick, what it costs ----
QUICK_SECONDS = 4  # of processor time, on a loaded machine; alone a quick test takes under 1.5
NOT_QUICK = ("slow", "full_size", "survey", "gpu")
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
if "NULL_GPU" in os.environ:  # a device that computes nothing: tests/gpu/null
    collect_ignore = ["gpu/test_gpu.py"]


def pytest_addoption(parser):
    parser.addoption("--cpu", metavar="FILE", help="write the processor seconds of every test")


def pytest_collection_modifyitems(items):
    """What nobody called slow is quick: `-m quick` forgets no new test. The longest test comes
    first, so that nobody waits for it alone in the end."""
    items.sort(key=lambda item: item.name != "test_a_real_campaign_end_to_end")
    for item in items:
        if not any(item.get_closest_marker(name) for name in NOT_QUICK):
            item.add_marker("quick")


def cpu_seconds() -> float:
    """Processor seconds of this process and of all processes that it started and waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds to the report of each phase what the processors did since the report before it."""
    report = yield
    now = cpu_seconds()
    quick = item.get_closest_marker("quick") is not None
    report.user_properties.append(("cpu", report.when, now - cpu_seconds.last, quick))
    cpu_seconds.last = now
    return report


cpu_seconds.last = cpu_seconds()


def pytest_terminal_summary(terminalreporter, config):
    """Names the tests that should be marked slow, and writes what --cpu asks for."""
    rows = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for entry in getattr(report, "user_properties", []):
                if entry[0] == "cpu" and entry[1] == getattr(report, "when", None):
                    rows.append((entry[2], entry[1], entry[3], report.nodeid))
    rows.sort(reverse=True)
    late = [row for row in rows if row[2] and row[1] == "call" and row[0] > QUICK_SECONDS]
    if late:
        terminalreporter.section("not quick: mark them slow")
    for seconds, _, _, name in late:
        terminalreporter.line(f"{seconds:6.1f} s  {name}")
    if config.getoption("--cpu"):
        lines = [f"{seconds:8.2f} {when:8} {name}\n" for seconds, when, _, name in rows]
        Path(config.getoption("--cpu")).write_text("".join(lines), encoding="utf-8")


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
    """A dataset folder of real text: two training shards of about 30,000 tokens each, and 3,000
    tokens to score."""
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


@pytest.fixture(scope="session")
def brief(tmp_path_factory, toy):
    """The same with four documents of 250 tokens to score: for runs whose scoring learns."""
    folder = tmp_path_factory.mktemp("brief")
    for path in toy.iterdir():
        (folder / path.name).hardlink_to(path)
    shard = folder / "fineweb_val_000000.bin"
    tokens = list(struct.unpack("<1000H", shard.read_bytes()[1024:3024]))
    tokens[::250] = [1] * 4
    shard.unlink()
    write_shard(shard, tokens)
    return folder

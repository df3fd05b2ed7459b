"""audit --adapter: the evaluation of a script of another make, legal and not, in a process of its
own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
from toolkit import adapter as adapters  # noqa: E402
from toolkit import audit  # noqa: E402

TOOLS = [sys.executable, str(ROOT / "records" / "tools.py")]
SCRIPT = '''"""A bigram table that learns chunk by chunk, as somebody else would write it."""
import os
from pathlib import Path

import numpy as np

V, CHUNK = 6, 16
Path("executed").write_text(str(os.getpid()))
print("step:1/1 chatter of a script")


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


class Model:
    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=(V, V))

    def nll(self, x, first, last):
        """Losses of targets first..last."""
        guesses = log_softmax(self.table[x[first:last]])
        return -guesses[np.arange(last - first), x[first + 1 : last + 1]]

    def learn(self, x, first, last):
        slope = np.exp(log_softmax(self.table[x[first:last]]))
        slope[np.arange(last - first), x[first + 1:last + 1]] -= 1
        update = np.zeros_like(self.table)
        np.add.at(update, x[first:last], slope)
        self.table -= 2 * update / (last - first)


if __name__ == "__main__":
    raise SystemExit("a training run that nobody asked for")
'''
LEGAL = """import train_gpt
import numpy as np
VOCAB, LENGTH = train_gpt.V, 70


def losses(tokens):
    model, total, n = train_gpt.Model(), 0.0, len(tokens) - 1
    for first in range(0, n, train_gpt.CHUNK):
        last = min(first + train_gpt.CHUNK, n)
        found = model.nll(tokens, first, last)
        total += found.sum()
        yield first, found, [model.table]
        model.learn(tokens, first, last)
    return total / n
"""
SCORE, YIELD = "found = model.nll(tokens, first, last)\n", "yield first, found, [model.table]"
ALL = {
    "no_network",
    "repeatable",
    "suffix_swap",
    "state_digest",
    "target_swap",
    "score_once",
    "reported_mean",
}


def folder(tmp_path: Path, script: str = SCRIPT) -> Path:
    place = tmp_path / "2026-05-01_Somebody"
    place.mkdir()
    (place / "train_gpt.py").write_text(script)
    return place


def audited(tmp_path: Path, adapter: str, script: str = SCRIPT) -> dict[str, str]:
    """{audit: status}"""
    (tmp_path / "adapter.py").write_text(adapter)
    found = adapters.audit_foreign(folder(tmp_path, script), f"{tmp_path / 'adapter.py'}:losses")
    return {a["id"]: a["status"] for a in found} | {
        "details": "; ".join(a["detail"] for a in found)
    }


@pytest.mark.slow
def test_a_legal_evaluation_passes_and_nothing_of_it_runs_here(tmp_path):
    """The script writes a file when it is imported: only the copy has it. What it prints is no
    answer."""
    (tmp_path / "adapter.py").write_text(LEGAL)
    place = folder(tmp_path)
    done = subprocess.run(
        [*TOOLS, "audit", str(place), "--adapter", f"{tmp_path / 'adapter.py'}:losses", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    status = {a["id"]: a["status"] for a in json.loads(done.stdout)}
    assert set(status) == ALL and set(status.values()) <= {"pass", "unknown"}
    assert all(v == "pass" for k, v in status.items() if k != "no_network"), status
    assert (
        sorted(p.name for p in place.iterdir()) == ["train_gpt.py"]
        and not (tmp_path / "executed").exists()
    )


PLANTED = {  # with the audit that must fail
    "learns before it scores": (
        LEGAL.replace(SCORE, "model.learn(tokens, first, last); " + SCORE),
        "suffix_swap",
    ),
    "two passes": (
        LEGAL.replace("    for first", "    model.learn(tokens, 0, n)\n    for first"),
        "suffix_swap",
    ),
    "state of what is scored later": (
        LEGAL.replace(YIELD, "yield first, found, [model.table, tokens]"),
        "state_digest",
    ),
    "gate that reads the target": (
        LEGAL.replace(
            SCORE, SCORE + "        found = found - 0.1 * (tokens[first + 1:last + 1] % 2)\n"
        ),
        "target_swap",
    ),
    "gate that reads the next": (
        LEGAL.replace(
            SCORE,
            SCORE
            + "        found = found - 0.1 * (np.append(tokens, 0)[first + 2:last + 2] % 2)\n",
        ),
        "target_swap",
    ),
    "doubled tail": (
        LEGAL.replace("    return", "    yield n - 2, found[-2:], [model.table]\n    return"),
        "score_once",
    ),
    "dropped tail": (
        LEGAL.replace(
            "last = min(first + train_gpt.CHUNK, n)",
            "last = first + train_gpt.CHUNK\n        if last > n:\n            continue",
        ),
        "score_once",
    ),
    "a mean of something else": (
        LEGAL.replace("return total / n", "return 0.9 * total / n"),
        "reported_mean",
    ),
    "noise": (
        LEGAL.replace(SCORE, SCORE + "        found = found + np.random.default_rng().random()\n"),
        "repeatable",
    ),
    "remembers the text before": (
        LEGAL.replace("import numpy as np\n", "MODEL = train_gpt.Model()\n").replace(
            "= train_gpt.Model(), 0.0", "= MODEL, 0.0"
        ),
        "repeatable",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_found(name, tmp_path):
    adapter, failed = PLANTED[name]
    assert adapter != LEGAL and ast.parse(adapter)
    status = audited(tmp_path, adapter)
    assert status[failed] == "fail", status


def test_losses_without_pieces_are_probed_and_the_rest_is_unknown(tmp_path):
    plain = "def losses(tokens):\n    return train_gpt.Model().nll(tokens, 0, len(tokens) - 1)\n"
    status = audited(tmp_path, "import train_gpt\nVOCAB = 6\n" + plain)
    assert {k for k, v in status.items() if v == "pass"} >= {
        "repeatable",
        "suffix_swap",
        "target_swap",
    }
    assert status["score_once"] == status["state_digest"] == status["reported_mean"] == "unknown"


BROKEN = {  # what the last line must say
    "import train_gpt\nVOCAB = 6\nimport package_that_is_not_there\n"
    "def losses(tokens): pass": "ModuleNotFoundError: No module named 'package_that_is_not_there'",
    "VOCAB = 6\ndef losses(tokens):\n"
    "    return [0.0] * 3": "3 losses from target 0 of a text with 179 targets",
    "VOCAB = 6\ndef losses(tokens):\n    raise KeyError('x')": "KeyError: 'x'",
    "VOCAB = 6\ndef losses(tokens):\n    import os\n    os._exit(3)": "ended with exit code 3",
    "VOCAB = 6\ndef losses(tokens):\n    yield from ()": "yielded no losses",
    "import urllib.request\nVOCAB = 6\ndef losses(tokens):\n"
    "    return urllib.request.urlopen('http://192.0.2.1/', timeout=3)": "URLError",
    "VOCAB = 6\ndef losses(tokens):\n    while True: pass": "took more than 2 s",
    "import os\nVOCAB = 6\ndef losses(tokens):\n    os.closerange(3, 99)": "Bad file descriptor",
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", BROKEN, ids=lambda a: BROKEN[a][:24])
def test_an_evaluation_that_breaks_down_fails(adapter, tmp_path, monkeypatch):
    """An import that is missing, too few losses, an error, an exit, nothing, a network, no end, a
    lost channel."""
    monkeypatch.setattr(adapters, "SECONDS", 2 if "while" in adapter else 60)
    status = audited(tmp_path, adapter)
    assert status["evaluates"] == "fail" and BROKEN[adapter] in status["details"], status


@pytest.mark.parametrize(
    "adapter, named, message",
    [
        ("VOCAB = 6\ndef other(tokens): pass\n", "{}:losses", "no function 'losses'; it has other"),
        ("VOCAB = 6\n", "{}", "want FILE.py:function"),
        ("VOCAB = 6\n", "{}.not:losses", "no such Python file"),
        ("def losses(:", "{}:losses", "does not parse"),
        (
            "def losses(tokens): pass\n",
            "{}:losses",
            "VOCAB=None: want a whole number from 4 to 65,536",
        ),
        ("VOCAB = 6\nLENGTH = 3\ndef losses(tokens): pass\n", "{}:losses", "LENGTH=3: want"),
    ],
)
def test_a_wrong_adapter_is_one_clear_error(adapter, named, message, tmp_path):
    (tmp_path / "adapter.py").write_text(adapter)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        adapters.audit_foreign(folder(tmp_path), named.format(tmp_path / "adapter.py"))


def test_the_command_refuses_what_does_not_go_with_an_adapter(tmp_path):
    done = subprocess.run(
        [*TOOLS, "audit", str(folder(tmp_path)), "--adapter", "x.py:losses", "--write"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --adapter does not go with")


def test_a_copy_holds_no_links_and_no_pipes(tmp_path):
    place = folder(tmp_path)
    (place / "up").symlink_to("/etc/passwd")
    subprocess.run(["mkfifo", str(place / "pipe.log")], check=True)
    (tmp_path / "top").mkdir()
    copy = audit.Place(audit.read_folder(place), tmp_path / "top")
    assert [p.name for p in copy.folder.iterdir()] == ["train_gpt.py"]


def test_what_a_process_started_ends_with_it(tmp_path, monkeypatch):
    """A command that leaves a child behind, which holds its pipes open, is over when its time
    is."""
    monkeypatch.setattr(audit, "SECONDS", 1)
    done = audit.execute(
        ["bash", "-c", "sleep 60 & sleep 60"], tmp_path, tmp_path, audit.namespace()
    )
    assert done.returncode == 124 and "took more than 1 s" in audit.said(done)

"""Do the tests notice? Plants one fault at a time in a copy of the repository and runs quick tests.

    python tests/mutations.py                 # each fault against the test files that its row names
    python tests/mutations.py --all           # each fault against the whole quick set
    python tests/mutations.py --only xsa ema  # faults whose name begins so

Prints one line a fault: caught, by which test, or missed. --unplanted first runs the same files
without a fault: a test that fails then would count as catching everything. Exit code 1 when a fault
is missed, 2 when the text that a row replaces does not stand in the script exactly once.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")


class Fault(NamedTuple):
    """One fault, and where a test of it should be."""

    name: str
    breaks: str
    old: str
    new: str
    tests: str  # files without `test_` and `.py`


FAULTS = (
    Fault(
        "xsa factor",
        "XSA leaves two hundredths of the part along the own value",
        "(y - along).view(",
        "(y - 0.98 * along).view(",
        "05_model",
    ),
    Fault(
        "smear offset",
        "every look at the token before reads the token two before",
        "return F.pad(x, pad)[:, : x.size(1)]",
        "return F.pad(F.pad(x, pad), pad)[:, : x.size(1)]",
        "05_model 05_techniques",
    ),
    Fault(
        "rotation sign",
        "half of each rotated pair turns the wrong way",
        "(b * cos - a * sin)",
        "(b * cos + a * sin)",
        "05_model",
    ),
    Fault(
        "ema share",
        "the moving average forgets a tenth more slowly",
        "self.take(1 - self.cfg.ema_decay)",
        "self.take(0.9 * (1 - self.cfg.ema_decay))",
        "06_optim",
    ),
    Fault(
        "mark inside",
        "a space mark inside a piece counts as three bytes",
        'piece.removeprefix(SPACE).replace(SPACE, " ")',
        "piece.removeprefix(SPACE)",
        "03_data",
    ),
    Fault(
        "nesterov",
        "Nesterov's momentum does not look ahead",
        "return u + hp.momentum * heavy_ball(u, state, hp)",
        "return heavy_ball(u, state, hp)",
        "06_optim",
    ),
    Fault(
        "qat threshold",
        "fake quantisation begins in the middle of its ramp",
        "torch.where(self.on > 0,",
        "torch.where(self.on > 0.5,",
        "07_quant 06_optim",
    ),
    Fault(
        "weight decay",
        "matrices shrink a tenth too much",
        "w.mul_(1 - lr * wd).sub_(u, alpha=lr)",
        "w.mul_(1 - 1.1 * lr * wd).sub_(u, alpha=lr)",
        "06_optim",
    ),
    Fault(
        "windows late",
        "sliding windows after the first see one token less before what they score",
        "starts = np.concatenate([np.zeros_like(first), later])",
        "starts = np.concatenate([np.zeros_like(first), later + 1])",
        "09_eval",
    ),
    Fault(
        "adapter scale",
        "adapters of a document act two hundredths too strongly",
        "inner = self.scale * (x @",
        "inner = 1.02 * self.scale * (x @",
        "09_ttt",
    ),
    Fault(
        "score twice",
        "a loss that is scored twice counts twice and nobody complains",
        "np.add.at(self.times, into, 1)",
        "self.times[into] = 1",
        "09_eval",
    ),
    Fault(
        "read before banked",
        "a strategy may learn from text that is not scored yet",
        "if not self._rt.all_reduce(torch.from_numpy(times)).all():",
        "if False:",
        "09_eval",
    ),
    Fault(
        "padding banked",
        "the loss of a padding row lands on the target after the window",
        "into = np.where(offset < batch.items[:, 2:], batch.items[:, 1:2] + offset, -1)",
        "into = np.minimum(batch.items[:, 1:2] + offset, len(self.times) - 1)",
        "09_eval",
    ),
    Fault(
        "gptq feedback",
        "GPTQ does not make up for the errors of earlier columns in a block",
        "rest[:, j:] -= errors[:, None] * upper[j, j:]",
        "rest[:, j:] -= 0 * errors[:, None] * upper[j, j:]",
        "07_quant",
    ),
    Fault(
        "gptq blocks",
        "GPTQ carries no error from one block of columns to the next",
        "rest[:, done.stop :] -= errors @ upper[done, done.stop :]",
        "rest[:, done.stop :] -= 0 * errors @ upper[done, done.stop :]",
        "07_quant",
    ),
    Fault(
        "codec",
        "the entropy coder returns every symbol one too high",
        "grid.T.ravel()[:count] + np.uint8(least)",
        "grid.T.ravel()[:count] + np.uint8(least + 1)",
        "08_artifact",
    ),
    Fault(
        "warmdown",
        "the learning rate falls as if the run were a hundredth further",
        '"warmdown_frac": lambda p, c: part_of(c.warmdown_frac, 1 - p.frac)',
        '"warmdown_frac": lambda p, c: part_of(c.warmdown_frac, 0.99 - p.frac)',
        "06_optim",
    ),
    Fault(
        "loader position",
        "a resumed run begins the text again",
        'self.loader.dealt = int(state["loader"])',
        "self.loader.dealt = 0",
        "06_optim",
    ),
    Fault(
        "loop plan",
        "the looped blocks run once too little",
        "for i in range(loops):",
        "for i in range(loops - 1):",
        "05_model 05_techniques",
    ),
    Fault(
        "mup",
        "logits are scaled by the root of what they should be",
        "self.scale = cfg.mup_base_width / cfg.model_dim",
        "self.scale = (cfg.mup_base_width / cfg.model_dim) ** 0.5",
        "05_model 05_techniques",
    ),
    Fault(
        "clip one rank",
        "each rank clips by the norm of its own share",
        "norm = (self.rt.all_reduce(shares) + self.rest",
        "norm = (shares + self.rest",
        "06_optim",
    ),
    Fault(
        "rows shared",
        "all ranks train on the same rows",
        "range(dealt + rank, dealt + rows, world)",
        "range(dealt, dealt + rows, world)",
        "03_data",
    ),
    Fault(
        "adam bias",
        "Adam's second moment is not corrected for its start",
        "(square / (1 - beta2**t)).sqrt()",
        "square.sqrt()",
        "06_optim",
    ),
    Fault(
        "momentum warm-up",
        "momentum is warm one step early",
        "part_of(cfg.muon_momentum_warmup_steps, p.step)",
        "part_of(cfg.muon_momentum_warmup_steps, p.step + 1)",
        "06_optim",
    ),
)


def planted(fault: Fault, text: str) -> str:
    """The script with the fault in it. Raises ValueError when the row is out of date."""
    if text.count(fault.old) != 1:
        found = text.count(fault.old)
        raise ValueError(f"{fault.name}: stands {found} times in train_gpt.py: {fault.old}")
    return text.replace(fault.old, fault.new)


def first_failure(copy: Path, files: list[str]) -> str:
    """The first quick test that fails in a copy of the repository, or nothing."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-m", "quick", *files]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="run the whole quick set")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="these faults")
    parser.add_argument(
        "--unplanted", action="store_true", help="run the tests without a fault too"
    )
    options = parser.parse_args()
    chosen = [f for f in FAULTS if f.name.startswith(tuple(options.only))]
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    try:
        scripts = {fault: planted(fault, text) for fault in chosen}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
        if options.unplanted:
            files = sorted({name for f in chosen for name in f.tests.split()})
            broken = first_failure(copy, [f"tests/test_{name}.py" for name in files])
            print(f"without a fault: {broken or 'all pass'}", flush=True)
            missed += bool(broken)
        for fault, script in scripts.items():
            (copy / "train_gpt.py").write_text(script, encoding="utf-8")
            files = [] if options.all else [f"tests/test_{name}.py" for name in fault.tests.split()]
            begun = time.monotonic()
            by = first_failure(copy, files)
            missed += not by
            took = time.monotonic() - begun
            verdict = f"caught by {by}" if by else f"MISSED: {fault.breaks}"
            print(f"{fault.name:20} {took:5.0f} s  {verdict}", flush=True)
    print(f"{len(chosen)} faults, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

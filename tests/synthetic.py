"""Record folders made up for tests: a clean one in either dialect of logs, to plant one defect at a
time in."""

import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

TEXT_BYTES, TOKENS = 151_080_891, 40_540_160
SCRIPT = """import os

import numpy as np
import torch


class Hyperparameters:
    seed = int(os.environ.get("SEED", 42))
    vocab_size = 8192
    train_shards = 80
    matrix_lr = 0.022
    iterations = 20000
    val_tokens = 0


if __name__ == "__main__":
    print(np.__version__, torch.__version__)
"""


@dataclass(frozen=True)
class Run:
    """One seed: what its log is to say."""

    seed: int
    bpb: float
    dialect: str = "spaced"
    tokens: int = TOKENS
    ratio: float = TEXT_BYTES / TOKENS  # bytes per token that the score stands for
    train: float = 598.0
    hessian: float | None = 1.5
    evaluation: float = 480.0
    other_evaluation: float = 0.0
    model: int = 15_883_000
    before: float = 1.0873
    knobs: dict = field(default_factory=dict)
    count_shown: bool = True
    script: str = SCRIPT
    code: int | None = None
    extra: str = ""

    @property
    def loss(self) -> float:
        return self.bpb * math.log(2) * self.ratio

    def log(self) -> str:
        code = self.code or len(self.script.encode())
        before = f"val_loss:{self.before * math.log(2) * self.ratio:.4f} val_bpb:{self.before:.4f}"
        end = [f"GPTQ:collected 67 Hessians in {self.hessian:.1f}s"] if self.hessian else []
        end += [
            f"Code size: {code} bytes",
            f"Serialized model int6+brotli: {self.model} bytes",
            f"Total submission size int6+brotli: {self.model + code} bytes",
        ]
        if self.other_evaluation:
            end.append(
                "final_int6_roundtrip val_loss:2.9 val_bpb:1.1 "
                f"eval_time:{self.other_evaluation * 1e3:.0f}ms"
            )
        end += [
            f"final_int6_sliding_window_exact val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} "
            f"eval_time:{self.evaluation * 1e3:.0f}ms"
        ]
        if self.dialect == "assigned":
            knobs = dict(seed=self.seed, vocab_size=8192, matrix_lr=0.022, iterations=20000)
            knobs |= {f"option_{i}": i for i in range(8)} | self.knobs
            head = [" ".join(f"{k}={v}" for k, v in knobs.items()), "params:35944536 L:10 d:768"]
            middle = [f"step:4900/20000 {before} train_time:{self.train * 1e3:.0f}ms zero_frac:0.3"]
        elif self.dialect == "spaced":
            knobs = (
                dict(seed=self.seed, vocab_size=8192, train_shards=80, matrix_lr=0.022) | self.knobs
            )
            head = ["Hyperparameters:", *(f"  {k}: {v}" for k, v in knobs.items())]
            head += [f"val_tokens: {self.tokens}"] if self.count_shown else []
            head += ["model_params: 35944536"]
            middle = [
                f"4900/20000 {before.replace(':', ': ')}",
                f"stopping_early: wallclock_cap train_time: {self.train * 1e3:.0f}ms "
                "step: 4900/20000",
            ]
            end = [
                line.replace("val_loss:", "val_loss: ").replace("val_bpb:", "val_bpb: ")
                for line in end
            ]
        else:
            knobs = (
                dict(train_batch_tokens=786432, train_seq_len=2048, iterations=20000) | self.knobs
            )
            head = [
                " ".join(f"{k}:{v}" for k, v in knobs.items()),
                f"seed:{self.seed}",
                "model_params:35944536",
            ]
            head += (
                [f"val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{self.tokens}"]
                if self.count_shown
                else []
            )
            middle = [
                f"step:4900/20000 {before} train_time:{self.train * 1e3:.0f}ms step_avg:122.04ms",
                f"stopping_early: wallclock_cap train_time:{self.train * 1e3:.0f}ms "
                "step:4900/20000",
            ]
        return "\n".join([*head, *middle, *end, self.extra]) + "\n"


RUNS = (Run(42, 1.0806), Run(314, 1.0812), Run(1234, 1.0815))


def changed(**what) -> tuple[Run, ...]:
    """The three runs, each changed."""
    return tuple(replace(run, **what) for run in RUNS)


def last_changed(**what) -> tuple[Run, ...]:
    """The three runs, the last one changed."""
    return (*RUNS[:2], replace(RUNS[2], **what))


@dataclass
class Record:
    """A folder in the making."""

    runs: tuple[Run, ...] = RUNS
    script: str = SCRIPT
    submission: dict = field(
        default_factory=dict
    )  # on top of what the runs say; None removes a key
    files: dict = field(default_factory=dict)  # {name: text, bytes, or None to leave it out}
    name: str = "2026-05-02_Clean_Record"
    track: str = "track_10min_16mb"

    def write(self, top: Path) -> Path:
        folder = top / self.track / self.name
        folder.mkdir(parents=True)
        code = len(self.script.encode())
        scores = [r.bpb for r in self.runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        submission = dict(
            author="A. Uthor",
            github_id="author",
            name="Clean record",
            date="2026-05-02",
            track=self.track[6:],
            val_bpb=round(statistics.mean(scores), 6),
            val_loss=round(statistics.mean(r.loss for r in self.runs), 6),
            val_bpb_std=spread and round(spread, 6),
            seeds=[r.seed for r in self.runs],
            bytes_total=max((r.model for r in self.runs), default=0) + code,
            bytes_code=code,
        )
        submission = {k: v for k, v in (submission | self.submission).items() if v is not ...}
        content = {
            "README.md": "# A record\n",
            "submission.json": json.dumps(submission),
            "train_gpt.py": self.script,
        }
        content |= {f"train_seed{r.seed}.log": r.log() for r in self.runs} | self.files
        for name, text in content.items():
            if text is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder


def own_log(
    seed: int, bpb: float, script: bytes, val_bytes: int = 384_909, tokens: int = 149_421, **odd
) -> str:
    """A log in this repository's own dialect."""
    said = (
        dict(
            code=hashlib.sha256(script).hexdigest(),
            data_tokens=tokens,
            once=1,
            ratio=val_bytes / tokens,
        )
        | odd
    )
    loss = bpb * math.log(2) * said["ratio"]
    score = f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} tokens:{tokens} bytes:{val_bytes}"
    return "\n".join(
        [
            f"audit:code sha256:{said['code']} wrapped:0 bytes:{len(script)}",
            "audit:env python:3.11.7 torch:2.13.0+cpu cuda:None gpu:none "
            "host_hash:0123456789ab world_size:1 threads:1",
            "preset:baseline+tiny",
            "config:MATRIX_LR=0.04 (default)",
            f"config:SEED={seed} (environment)",
            f"seed:{seed}",
            "audit:data manifest:4549c55466fab974 train_shards:1 "
            f"val_tokens:{said['data_tokens']} val_bytes:{val_bytes} "
            f"tokenizer_sha256:{'8' * 64}",
            "model_params:152390",
            f"step:8/8 val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:425ms step_avg:53.10ms",
            f"Code size: {len(script)} bytes",
            f"Total submission size: {len(script) + 97_430} bytes",
            "Serialized model int8+zlib: 97430 bytes",
            f"audit:artifact sha256:{'7' * 64} bytes:97430",
            f"score:chunked {score} scored_once:{said['once']} coverage:0f58454e08afdb75",
            "phase:eval start_ms:11530 end_ms:17313",
            f"final:official variant:chunked {score}",
            "",
        ]
    )

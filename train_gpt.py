#!/usr/bin/env python3
"""Train, export, reload and score a small language model whose artifact (code + weights) fits 16,000,000 bytes.

One command, nothing to configure:   python train_gpt.py
On a node with eight GPUs:           torchrun --standalone --nproc_per_node=8 train_gpt.py
Every knob is an environment variable: python train_gpt.py --help
Predict size and cost, then stop:    RUN_MODE=plan python train_gpt.py
Score a finished artifact:           RUN_MODE=eval ARTIFACT=runs/<id>/model.golf python train_gpt.py

Sections: 0 imports · 1 Config · 2 Runtime · 3 Data and bytes · 4 Kernels · 5 Model · 6 Optimisation · 7 Quantisation ·
8 Artifact · 9 Evaluation · 10 Training · 11 main.   Find one with: grep -n "^# ---- " train_gpt.py

Shapes: B batch rows, T tokens of a row, C model width, H query heads, G key/value heads, D head width, V vocabulary,
K stacked matrices of one shape. A *block* owns weights, a *slot* is one application of a block, a *step* is one
optimiser update, a *micro-step* one forward/backward pass of it. Losses are in nats, scores in bits per byte of text.
"""

# ---- 0 Imports ------------------------------------------------------------------------------------------------------
import bisect
import contextlib
import copy
import difflib
import hashlib
import importlib.util
import io
import json
import lzma
import math
import operator
import os
import platform
import resource
import signal
import socket
import statistics
import struct
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch: spinning threads starve each other on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def optional_import(name: str):
    """The module, or None when it is not installed; whoever needs it says so by name (see CODECS, Runtime.progress)."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


brotli, tqdm, zstandard = optional_import("brotli"), optional_import("tqdm"), optional_import("zstandard")


SCRIPT = Path(__file__).resolve()


class UserError(ValueError):
    """A mistake in the input, one message each: printed as one line each, exit code 2, never a traceback."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class OneRankFailed(UserError):
    """A mistake that only one rank can see, which therefore prints it itself."""


class RunFailed(RuntimeError):
    """A run that cannot go on: printed with what to try, exit code 1, never a traceback."""


# ---- 1 Config: one field = one environment variable = one line of --help = one range check --------------------------
def knob(default, doc: str, lo=None, hi=None, choices=(), unit: str = "", source: str = "", needs: str = ""):
    """Declare a configuration field. `needs` is "<field> <op> <value>": setting the knob without it has no effect."""
    meta = dict(doc=doc, lo=lo, hi=hi, choices=tuple(choices), unit=unit, source=source, needs=needs)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class RunConfig:
    run_mode: str = knob("train", "train, export and score; or only predict size and cost; or only score an artifact",
                         choices=("train", "plan", "eval"))
    run_id: str = knob("auto", "name of the folder under RUNS_DIR; auto = date, time and seed")
    runs_dir: str = knob("runs", "folder that receives one folder per run")
    seed: int = knob(1337, "seed of initialisation and data order", 0, 2**31 - 1)
    device: str = knob("auto", "where to run; auto = CUDA when present", choices=("auto", "cpu", "cuda"))
    resume: str = knob("none", "auto = continue from the run folder's checkpoint if there is one",
                       choices=("none", "auto"))
    artifact: str = knob("", "artifact file to score", needs="run_mode == eval")
    checkpoint_every: float = knob(60.0, "time between checkpoints, 0 = none", 0, 86400, unit="seconds")
    train_log_every: int = knob(200, "steps between two log lines", 1, 10**6, unit="steps")
    val_loss_every: int = knob(1000, "steps between two chunked validations, 0 = only the last", 0, 10**7, unit="steps")
    strict_env: bool = knob(False, "turn warnings about unknown or ineffective variables into errors")


@dataclass(frozen=True)
class DataConfig:
    data_path: str = knob("auto", "folder with fineweb_train_*.bin and fineweb_val_*.bin; auto = FineWeb shards if "
                          "present and CUDA is used, else the embedded sample")
    tokenizer_path: str = knob("auto", "SentencePiece model; auto = the one that belongs to the data folder")
    vocab_size: int = knob(1024, "tokenizer size V", 2, 65535, unit="tokens")
    train_seq_len: int = knob(1024, "training context T", 8, 65536, unit="tokens")
    train_batch_tokens: int = knob(524_288, "tokens of one step over all ranks", 8, 2**24, unit="tokens")
    loader: str = knob("sequential", "order of training text: one contiguous stream, or rows shuffled anew each epoch",
                       choices=("sequential", "shuffled"))


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = knob(9, "blocks stored in the artifact", 1, 64)
    model_dim: int = knob(512, "residual width C", 16, 4096)
    num_heads: int = knob(8, "query heads H", 1, 64)
    num_kv_heads: int = knob(4, "key/value heads G; must divide NUM_HEADS", 1, 64)
    mlp: str = knob("relu2", "MLP activation", choices=("relu2", "leaky_relu2"))
    mlp_mult: float = knob(2.0, "MLP hidden width as a multiple of MODEL_DIM", 0.25, 16)
    leaky_slope: float = knob(0.5, "slope below zero, before squaring", 0, 1, source="PR 493",
                              needs="mlp == leaky_relu2")
    rope_dims: int = knob(0, "leading dims of each head that rotate; 0 = all", 0, 512, source="PR 315")
    rope_base: float = knob(10000.0, "rotary base", 10, 1e7)
    qk_gain_init: float = knob(1.5, "initial per-head inverse temperature of attention", 0.1, 20, source="PR 1125")
    xsa_last_n: int = knob(0, "blocks, counted from the top, whose heads drop the part along their own value", 0, 64,
                           source="arXiv 2603.09078, PR 265")
    smear_gate: bool = knob(False, "mix each normalised embedding with the previous token's (variant B)",
                            source="PR 162")
    bigram_buckets: int = knob(0, "rows of the hashed bigram embedding; 0 = off", 0, 2**20, source="PR 162")
    bigram_dim: int = knob(128, "width of the hashed bigram embedding", 1, 4096, needs="bigram_buckets > 0")
    skips: str = knob("unet", "connections from the first to the second half of the slots", choices=("none", "unet"))
    logit_softcap: float = knob(30.0, "logits are bounded by this through tanh", 1, 1000, unit="nats")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial token embedding", 1e-5, 1)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def rotary_dims(self) -> int:
        return self.rope_dims or self.head_dim


@dataclass(frozen=True)
class OptimConfig:
    iterations: int = knob(20_000, "upper bound of steps", 1, 10**8, unit="steps")
    max_wallclock_seconds: float = knob(600.0, "training time; 0 = stop by ITERATIONS alone", 0, 10**7, unit="seconds")
    reserve_seconds: float = knob(0.0, "part of the training time kept for what must happen inside it", 0, 600,
                                  unit="seconds", needs="max_wallclock_seconds > 0")
    warmup_steps: int = knob(20, "steps on synthetic tokens that prewarm kernels and are then undone", 0, 1000,
                             unit="steps")
    lr_schedule: str = knob("warmdown_iters", "shape of the learning rate: constant, then linear over WARMDOWN_ITERS "
                            "steps or WARMDOWN_FRAC of the run", choices=("warmdown_iters", "warmdown_frac"))
    warmdown_iters: int = knob(1200, "steps of the final decay", 0, 10**7, unit="steps",
                               needs="lr_schedule == warmdown_iters")
    warmdown_frac: float = knob(0.6, "part of the run spent in the final decay", 0, 1,
                                needs="lr_schedule == warmdown_frac")
    min_lr: float = knob(0.0, "floor of the learning-rate multiplier", 0, 1)
    muon: str = knob("muon", "optimiser of the matrices, a named list of stages",
                     choices=("muon", "muon_polar", "muoneq_r"))
    matrix_lr: float = knob(0.04, "Muon learning rate", 0, 1)
    muon_momentum: float = knob(0.95, "Muon momentum", 0, 0.9999)
    muon_momentum_warmup_start: float = knob(0.85, "momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps: int = knob(500, "steps until MUON_MOMENTUM is reached", 0, 10**6, unit="steps")
    muon_wd: float = knob(0.0, "decoupled weight decay of the matrices", 0, 10)
    tied_embed_lr: float = knob(0.05, "AdamW learning rate of the tied embedding", 0, 10)
    table_lr: float = knob(0.05, "AdamW learning rate of hashed tables", 0, 10, needs="bigram_buckets > 0")
    scalar_lr: float = knob(0.04, "AdamW learning rate of gains, scales, mixes and gates", 0, 10)
    adam_wd: float = knob(0.0, "decoupled weight decay of the AdamW groups", 0, 10)
    beta1: float = knob(0.9, "AdamW beta1", 0, 0.9999)
    beta2: float = knob(0.95, "AdamW beta2", 0, 0.99999)
    adam_eps: float = knob(1e-8, "AdamW epsilon", 1e-12, 1e-2)
    grad_clip_norm: float = knob(0.0, "bound of the norm of the reduced gradient; 0 = off", 0, 1e6)
    averaging: str = knob("none", "weights that are exported: the last ones or their moving average",
                          choices=("none", "ema"))
    ema_decay: float = knob(0.997, "decay of the moving average per step", 0, 0.99999, needs="averaging == ema",
                            source="PR 287")


BIT_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class QuantConfig:
    matrix_bits: int = knob(8, "bits of block matrices; 16 = fp16", 2, 16, choices=BIT_WIDTHS, unit="bits")
    embed_bits: int = knob(8, "bits of embeddings and tables; 16 = fp16", 2, 16, choices=BIT_WIDTHS, unit="bits")
    qat: str = knob("none", "train the block matrices through the export grid by straight-through gradients",
                    choices=("none", "ste"), needs="matrix_bits < 16", source="PR 66")
    qat_start_frac: float = knob(0.0, "part of the run after which the grid is switched on", 0, 1, needs="qat != none")
    clip_quantile: float = knob(0.9999984, "quantile of |w| of a row that becomes the largest level", 0.5, 1)
    scale_floor: float = knob(0.0, "smallest clip of a row; 1.0 reproduces the floor of the published int8 exports",
                              0, 1)
    codec: str = knob("zlib", "byte compressor of the artifact", choices=("zlib", "lzma", "zstd", "brotli"))
    artifact_budget_bytes: int = knob(16_000_000, "largest code + model", 1, 2**40, unit="bytes")


@dataclass(frozen=True)
class EvalConfig:
    eval: str = knob("chunked", "how the official score is taken: disjoint chunks of TRAIN_SEQ_LEN, or windows of "
                     "EVAL_SEQ_LEN that advance by EVAL_STRIDE", choices=("chunked", "sliding"))
    eval_seq_len: int = knob(1024, "window of the sliding evaluation", 2, 65536, unit="tokens",
                             needs="eval == sliding")
    eval_stride: int = knob(64, "tokens scored per window", 1, 65536, unit="tokens", needs="eval == sliding")
    eval_batch_tokens: int = knob(131_072, "tokens of one evaluation batch on a rank", 1, 2**24, unit="tokens")


@dataclass(frozen=True)
class SystemConfig:
    numerics: str = knob("auto", "arithmetic of matrix products: fp32, fp32 by the fastest route (medium), or bf16; "
                         "auto = bf16 on CUDA, the fastest accurate one on CPU",
                         choices=("auto", "fp32", "medium", "bf16"))
    attention: str = knob("auto", "causal attention kernel; auto = the faster one on this machine",
                          choices=("auto", "sdpa", "blocked"))
    compile: str = knob("auto", "torch.compile; auto = always on CUDA, on CPU when the run is long enough to repay it",
                        choices=("auto", "off", "on"))
    micro_batch_tokens: int = knob(65_536, "most tokens of one forward/backward pass on a rank", 8, 2**24,
                                   unit="tokens")
    threads: int = knob(0, "CPU threads of each rank; 0 = the cores this process may use", 0, 1024)


def environment() -> dict[str, str]:
    """The process environment; the only place that reads it."""
    return dict(os.environ)


GROUPS = dict(run=RunConfig, data=DataConfig, model=ModelConfig, optim=OptimConfig, quant=QuantConfig,
              eval=EvalConfig, system=SystemConfig)
KNOBS = {f.name: (group, f) for group, cls in GROUPS.items() for f in fields(cls)}
OPERATORS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Config:
    """Everything the user decided. Each value remembers where it came from; `notes` are the warnings to print."""
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    quant: QuantConfig
    eval: EvalConfig
    system: SystemConfig
    preset: str
    origins: dict[str, str]
    notes: tuple[str, ...]

    def values(self, *groups: str) -> dict[str, Any]:
        """Flat {field: value} of the named groups, or of all."""
        return {k: v for g in groups or GROUPS for k, v in asdict(getattr(self, g)).items()}

    def shown(self) -> dict[str, Any]:
        """All values as people and logs may see them: paths without the layout of this machine."""
        return {k: relative(v) if type(v) is str and os.sep in v else v for k, v in self.values().items()}


# Presets are overrides of the defaults, which are the naive baseline. A callable receives the values so far.
PRESETS: dict[str, dict[str, Any]] = {
    # 9 layers, int8 + zlib: the published starting point (1.2244). 17,059,912 parameters.
    "baseline": dict(scale_floor=1.0),
    # PR 66, 1.1632: MLP 3x, 4096-token rows, int6 straight-through from step 0 on the export grid, sliding window.
    # 21,778,504 parameters. The published export used max/31; ours is the training grid itself.
    "mlp3x_seq4096": dict(
        mlp_mult=3.0, train_seq_len=4096, train_batch_tokens=393_216, tied_embed_lr=0.03, matrix_lr=0.02,
        scalar_lr=0.02, muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
        warmdown_iters=3000, matrix_bits=6, embed_bits=16, qat="ste", codec="zstd", eval="sliding", eval_seq_len=4096,
        eval_stride=64),
    # Overlay: what two CPU cores train in two minutes.
    "cpu": dict(
        num_layers=4, model_dim=256, num_heads=4, num_kv_heads=2, train_seq_len=512, train_batch_tokens=8192,
        micro_batch_tokens=8192, eval_batch_tokens=16_384, eval_seq_len=512, eval_stride=64,
        max_wallclock_seconds=120.0, loader="shuffled", lr_schedule="warmdown_frac", warmdown_frac=0.6,
        muon_momentum_warmup_steps=50, warmup_steps=2, train_log_every=20, val_loss_every=0, checkpoint_every=30.0,
        rope_dims=lambda v: min(v["rope_dims"], 64), xsa_last_n=lambda v: min(v["xsa_last_n"], 4)),
    # Overlay: what a test runs in seconds.
    "tiny": dict(
        num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=512,
        micro_batch_tokens=512, eval_batch_tokens=8192, eval_seq_len=64, eval_stride=32, iterations=8,
        max_wallclock_seconds=0.0, loader="shuffled", lr_schedule="warmdown_frac", muon_momentum_warmup_steps=4,
        warmup_steps=1, train_log_every=1, val_loss_every=0, compile="off", bigram_dim=16,
        bigram_buckets=lambda v: min(v["bigram_buckets"], 512),
        rope_dims=lambda v: min(v["rope_dims"], 16), xsa_last_n=lambda v: min(v["xsa_last_n"], 2)),
}
DEFAULT_PRESET = {"cuda": "mlp3x_seq4096", "cpu": "mlp3x_seq4096+cpu"}

# Cross-field rules: (broken when, message). All broken ones are reported together.
RULES: list[tuple[Callable[[dict], bool], Callable[[dict], str]]] = [
    (lambda v: v["model_dim"] % v["num_heads"], lambda v:
     f"MODEL_DIM={v['model_dim']} is not divisible by NUM_HEADS={v['num_heads']}"),
    (lambda v: v["num_heads"] % v["num_kv_heads"], lambda v:
     f"NUM_HEADS={v['num_heads']} is not divisible by NUM_KV_HEADS={v['num_kv_heads']}"),
    (lambda v: v["model_dim"] % v["num_heads"] == 0 and v["model_dim"] // v["num_heads"] % 2, lambda v:
     f"MODEL_DIM/NUM_HEADS={v['model_dim'] // v['num_heads']} must be even for rotary positions"),
    (lambda v: v["rope_dims"] % 2 or v["rope_dims"] > v["model_dim"] // v["num_heads"], lambda v:
     f"ROPE_DIMS={v['rope_dims']} must be even and at most MODEL_DIM/NUM_HEADS={v['model_dim'] // v['num_heads']}"),
    (lambda v: v["run_mode"] != "eval" and v["train_batch_tokens"] % v["train_seq_len"], lambda v:
     f"TRAIN_BATCH_TOKENS={v['train_batch_tokens']} is not a multiple of TRAIN_SEQ_LEN={v['train_seq_len']}"),
    (lambda v: v["eval"] == "sliding" and v["eval_stride"] > v["eval_seq_len"], lambda v:
     f"EVAL_STRIDE={v['eval_stride']} is larger than EVAL_SEQ_LEN={v['eval_seq_len']}"),
    (lambda v: v["bigram_buckets"] == 1, lambda v: "BIGRAM_BUCKETS=1: want 0 (off) or at least 2"),
    (lambda v: v["codec"] not in available_codecs(), lambda v:
     f"CODEC={v['codec']} needs a package that is not installed; available: {', '.join(available_codecs())}"),
    (lambda v: v["max_wallclock_seconds"] and v["reserve_seconds"] >= v["max_wallclock_seconds"], lambda v:
     f"RESERVE_SECONDS={v['reserve_seconds']} must be less than MAX_WALLCLOCK_SECONDS={v['max_wallclock_seconds']}"),
    (lambda v: v["device"] == "cuda" and not torch.cuda.is_available(), lambda v:
     "DEVICE=cuda but this machine has no usable CUDA device; set DEVICE=cpu or auto"),
    (lambda v: any(c in v["run_id"] for c in "/\\\0") or v["run_id"] in ("", ".", ".."), lambda v:
     f"RUN_ID={v['run_id']!r} must be a plain folder name"),
]
SPECIAL_ENV = ("PRESET",)  # read by load() itself, not a field
ALIASES = {  # names that people type out of habit
    "LR": "MATRIX_LR", "LEARNING_RATE": "MATRIX_LR", "BATCH_SIZE": "TRAIN_BATCH_TOKENS", "SEQ_LEN": "TRAIN_SEQ_LEN",
    "N_LAYER": "NUM_LAYERS", "N_LAYERS": "NUM_LAYERS", "N_HEAD": "NUM_HEADS", "N_EMBD": "MODEL_DIM",
    "STEPS": "ITERATIONS", "MAX_STEPS": "ITERATIONS", "WEIGHT_DECAY": "MUON_WD", "EMBED_LR": "TIED_EMBED_LR",
    "STRIDE": "EVAL_STRIDE", "GRAD_CLIP": "GRAD_CLIP_NORM", "WARMDOWN_STEPS": "WARMDOWN_ITERS"}


def pick_device(env: dict[str, str]) -> str:
    """"cuda" or "cpu": what DEVICE asks for, or what the machine has."""
    asked = env.get("DEVICE", "auto")
    return asked if asked in ("cpu", "cuda") else "cuda" if torch.cuda.is_available() else "cpu"


def parse_knob(name: str, text: str) -> Any:
    """The value of an environment string, checked against type, range and choices. Raises UserError with a reason."""
    f = KNOBS[name][1]
    kind, meta = type(f.default), f.metadata
    if kind is str and f.default and not text:
        raise UserError(f"{name.upper()}='': want {allowed(f)} ({meta['doc']})")
    try:
        if kind is bool:
            value = {"0": False, "false": False, "1": True, "true": True}[text.lower()]
        else:
            value = kind(text)
    except (ValueError, KeyError):
        want = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{name.upper()}={text!r}: want {want} ({meta['doc']})") from None
    bad_range = kind in (int, float) and meta["lo"] is not None and not meta["lo"] <= value <= meta["hi"]
    if (meta["choices"] and value not in meta["choices"]) or bad_range:
        raise UserError(f"{name.upper()}={text}: want {allowed(f)} ({meta['doc']})")
    return value


def allowed(f) -> str:
    """What a knob accepts, in words."""
    if f.metadata["choices"]:
        return "one of " + ", ".join(map(str, f.metadata["choices"]))
    if type(f.default) is bool:
        return "0 or 1"
    if f.metadata["lo"] is None:
        return "text"
    return f"{f.metadata['lo']:,} to {f.metadata['hi']:,}".replace(",", " ")


def load(env: dict[str, str], stored: dict[str, Any] | None = None) -> Config:
    """Resolve default < preset < stored (an artifact's own values) < environment; what made its score is final.

    Raises UserError that lists every bad knob, rule and, under STRICT_ENV=1, every warning at once. Before an
    artifact is read (RUN_MODE=eval, nothing stored) the rules wait for its values.
    """
    preset = env.get("PRESET") or DEFAULT_PRESET[pick_device(env)]
    values = {name: f.default for name, (_, f) in KNOBS.items()}
    origins, errors, wrong = dict.fromkeys(values, "default"), [], []
    for part in preset.split("+"):
        if part not in PRESETS:
            errors.append(f"PRESET={preset}: unknown preset {part!r}; want one of {', '.join(PRESETS)}, joined by +")
        for name, value in PRESETS.get(part, {}).items():
            values[name], origins[name] = value(values) if callable(value) else value, part
    for name, value in (stored or {}).items():
        values[name], origins[name] = parse_knob(name, str(value)), "artifact"
    final = final_knobs(stored)
    for name in values:
        if (text := env.get(name.upper())) is not None and name not in final:
            try:
                values[name], origins[name] = parse_knob(name, text), "environment"
            except ValueError as error:
                errors.append(str(error))
                wrong.append(f"{name.upper()}=")
    if values["run_mode"] == "eval" and not values["artifact"]:
        errors.append("RUN_MODE=eval needs ARTIFACT=<path of a .golf file>")
    if values["run_mode"] != "eval" or stored:
        broken_rules = [message(values) for broken, message in RULES if broken(values)]
        errors += [message for message in broken_rules if not any(name in message for name in wrong)]
    notes = misspelt(env) + ineffective(values, origins)
    notes += [f"{name.upper()} has no effect: the artifact's own {name.upper()}={values[name]} is scored"
              for name in values if values["run_mode"] == "eval" and name in final and name.upper() in env]
    if values["strict_env"]:
        errors += notes
    if errors:
        raise UserError(*errors)
    parts = {g: cls(**{f.name: values[f.name] for f in fields(cls)}) for g, cls in GROUPS.items()}
    return Config(**parts, preset=preset, origins=origins, notes=tuple(notes))


def final_knobs(stored: dict[str, Any] | None) -> set[str]:
    """What the environment cannot change of an artifact: all that it stores but the way of scoring and the budget."""
    return {name for name in stored or {} if KNOBS[name][0] != "eval"} - {"artifact_budget_bytes"}


def misspelt(env: dict[str, str]) -> list[str]:
    """A warning for each environment variable that looks like a knob but is none."""
    known = [n.upper() for n in KNOBS] + list(SPECIAL_ENV)
    torchrun = {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "LOCAL_RANK", "RANK"}
    notes = []
    for name in sorted(set(env) - set(known) - torchrun):
        near = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name.upper(), known, 1, 0.84)
        family = name.startswith(("MUON_", "EVAL_", "QAT_", "TRAIN_", "BIGRAM_", "EMA_", "ADAM_", "WARMDOWN_", "TTT_"))
        if near or family:
            hint = f"; did you mean {near[0]}?" if near else "; see --help"
            notes.append(f"{name} is not a knob and was ignored{hint}")
    return notes


def ineffective(values: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """A warning for each knob of the environment that the rest of the configuration makes meaningless."""
    notes = []
    for name, (_, f) in KNOBS.items():
        if f.metadata["needs"] and origins[name] == "environment":
            other, op, want = f.metadata["needs"].split()
            if not OPERATORS[op](values[other], parse_knob(other, want)):
                notes.append(f"{name.upper()} has no effect unless {other.upper()} {op} {want}")
    return notes


def help_text(markdown: bool) -> str:
    """Every knob with default, range and meaning, grouped; as text or as the README's table."""
    lines = [] if markdown else [__doc__.strip(), "", "Presets (join with +): " + ", ".join(PRESETS), ""]
    if markdown:
        lines += ["| knob | default | allowed | meaning |", "|---|---|---|---|"]
    for group, cls in GROUPS.items():
        if not markdown:
            lines.append(f"{group}:")
        for f in fields(cls):
            m = f.metadata
            default = int(f.default) if type(f.default) is bool else f.default
            extra = "".join([f" [{m['unit']}]" if m["unit"] else "", f"; needs {m['needs'].upper()}" if m["needs"]
                             else "", f"; source: {m['source']}" if m["source"] else ""])
            if markdown:
                lines.append(f"| `{f.name.upper()}` | `{default}` | {allowed(f)} | {m['doc']}{extra} |".replace("|w|",
                             "abs(w)"))
            else:
                lines.append(f"  {f.name.upper()}={default}  ({allowed(f)})\n      {m['doc']}{extra}")
    return "\n".join(lines)


# ---- 2 Runtime: device, ranks, clock, log, files --------------------------------------------------------------------
def cpu_cores() -> int:
    """Cores this process may really use: affinity mask, bounded by the cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(int(quota) / int(period))))
    return cores


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def relative(path: Path | str) -> str:
    """A path for people and logs: never the absolute layout of a machine."""
    rel = os.path.relpath(path)
    return Path(path).name if rel.startswith("..") else rel


def write_atomic(path: Path, write: Callable[[Any], None]):
    """Create or replace `path` so that a crash at any moment leaves the old file or the new one, never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class Runtime:
    """Device, process group, log and phase ledger of one process; identical calls on every rank stay in step."""

    def __init__(self, cfg: Config, env: dict[str, str]):
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", self.world))
        kind = pick_device({"DEVICE": cfg.run.device})
        if kind == "cuda" and local >= torch.cuda.device_count():
            raise UserError(f"rank {self.rank} has no GPU: {torch.cuda.device_count()} present, {local_world} wanted")
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_num_threads(cfg.system.threads or max(1, cpu_cores() // local_world))
        if "RANK" in env:
            importlib.import_module("torch._dynamo")  # imported after gloo's threads exist, it can abort at exit
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        self.start, self.phases, self.log_file, self.metrics_file, self.folder = time.monotonic(), [], None, None, None
        self.interrupted = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def close(self):
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # Collectives: no-ops on one rank.
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone; every rank returns its picklable result or raises its error."""
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = work()
            except (UserError, RunFailed, OSError) as error:
                box[1] = error
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1]:
            raise box[1]
        return box[0]

    def numbers_from_main(self, *values: float) -> list[float]:
        """Rank 0's numbers on every rank; cheap enough for every step."""
        x = torch.tensor(values, dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(x, src=0)
        return x.tolist()

    def synchronize(self):
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Output.
    def open_run(self, cfg: Config) -> bool:
        """Create runs/<RUN_ID>/ and start the log. Returns False when the run is already complete."""
        auto = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-seed{cfg.run.seed}"
        name = self.on_main(lambda: auto if cfg.run.run_id == "auto" else cfg.run.run_id)
        self.folder = Path(cfg.run.runs_dir) / name
        return self.on_main(lambda: self.claim_folder(cfg))

    def claim_folder(self, cfg: Config) -> bool:
        """Rank 0's part of open_run."""
        log = self.folder / "log.txt"
        try:
            if log.exists():
                if cfg.run.resume == "none":
                    raise UserError(f"RUN_ID={cfg.run.run_id}: {relative(self.folder)} already holds a run; "
                                    "set RESUME=auto to continue it or choose another RUN_ID")
                if "\nfinal:official " in log.read_text():
                    return False
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_crash in self.folder.glob("*.tmp"):
                left_by_a_crash.unlink()
            self.log_file = open(log, "a", buffering=1)
            self.metrics_file = open(self.folder / "metrics.jsonl", "a", buffering=1)
        except OSError as error:
            raise UserError(f"RUNS_DIR={relative(cfg.run.runs_dir)}: cannot write {relative(self.folder)} "
                            f"({error.strerror})") from None
        known = {k: dict(value=v, origin=cfg.origins[k]) for k, v in cfg.shown().items()}
        text = json.dumps(dict(preset=cfg.preset, knobs=known), indent=1).encode()
        write_atomic(self.folder / "config.json", lambda f: f.write(text))
        return True

    def log(self, text: str, echo: bool = True):
        """One line to the log file and, unless echo is off, to the terminal; rank 0 only."""
        if self.main:
            if self.log_file:
                self.log_file.write(text + "\n")
            if echo:
                tqdm.tqdm.write(text, file=sys.stdout) if tqdm else print(text)
                sys.stdout.flush()

    def metric(self, event: str, **values):
        """One JSON line to metrics.jsonl; rank 0 only."""
        if self.metrics_file:
            self.metrics_file.write(json.dumps(dict(event=event, t=round(time.monotonic() - self.start, 3), **values))
                                    + "\n")

    @contextlib.contextmanager
    def catch_signals(self):
        """SIGINT and SIGTERM set `interrupted`, so that the loop ends at a step boundary; a second one kills."""
        def note(number, frame):
            self.interrupted = True
            signal.signal(number, signal.SIG_DFL)
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def phase(self, name: str):
        """Account the enclosed time under `name` in the ledger, on a monotonic clock."""
        self.synchronize()
        begin = time.monotonic() - self.start
        yield
        self.synchronize()
        end = time.monotonic() - self.start
        self.phases.append((name, begin, end))
        self.log(f"phase:{name} start_ms:{begin * 1e3:.0f} end_ms:{end * 1e3:.0f}")
        self.metric("phase", name=name, start=begin, end=end)

    def progress(self, total: float, label: str):
        """A bar on a terminal, silence elsewhere (the log lines carry the time left)."""
        if not (tqdm and self.main and sys.stderr.isatty()):
            return contextlib.nullcontext()
        return tqdm.tqdm(
            total=total, desc=label, leave=False, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")


def log_header(cfg: Config, rt: Runtime):
    """The first lines of a log: what code, which configuration, on what."""
    source = SCRIPT.read_bytes()
    rt.log(f"audit:code sha256:{hashlib.sha256(source).hexdigest()} wrapped:0 bytes:{len(source)}")
    gpu = torch.cuda.get_device_name() if rt.device.type == "cuda" else "none"
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
    rt.log(f"audit:env python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
           f"gpu:{gpu} host_hash:{host} world_size:{rt.world} threads:{torch.get_num_threads()}")
    rt.log(f"preset:{cfg.preset}")
    for name, value in cfg.shown().items():
        rt.log(f"config:{name.upper()}={value} ({cfg.origins[name]})",
               echo=cfg.run.run_mode == "plan" or cfg.origins[name] == "environment")
    for note in cfg.notes:
        rt.log(f"warning: {note}")
    rt.log(f"seed:{cfg.run.seed}")


# ---- 3 Data and bytes -----------------------------------------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: Path) -> np.ndarray:
    """Memory-map one shard: 256 little-endian int32 (magic, version, count), then `count` uint16 tokens.

    Raises UserError naming the file when it is missing, empty, truncated, too long or of another format.
    """
    name, size = relative(path), path.stat().st_size if path.is_file() else -1
    if size < 0:
        raise UserError(f"{name}: not a file")
    if size < SHARD_HEADER_BYTES:
        raise UserError(f"{name}: {size} bytes is shorter than a shard header ({SHARD_HEADER_BYTES} bytes)")
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{name}: magic {magic} version {version}, want {SHARD_MAGIC} and {SHARD_VERSION}: not a shard")
    if count <= 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise UserError(f"{name}: the header promises {count} tokens = {SHARD_HEADER_BYTES + 2 * count} bytes, the "
                        f"file has {size}; download or build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """The shards of one split ("train" or "val") of a folder as one long sequence of tokens, memory-mapped."""

    def __init__(self, folder: Path, split: str, vocab: int):
        self.files, self.vocab = sorted(folder.glob(f"fineweb_{split}_*.bin")), vocab
        if not self.files:
            raise UserError(f"DATA_PATH={relative(folder)}: no file matches fineweb_{split}_*.bin")
        self.shards = [open_shard(f) for f in self.files]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as uint16, across shard borders."""
        parts, shard = [], bisect.bisect_right(self.starts, start) - 1
        while count > 0:
            offset = start - self.starts[shard]
            part = self.shards[shard][offset:offset + count]
            if int(part.max()) >= self.vocab:
                raise OneRankFailed(self.out_of_range(shard, int(part.max())))
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def check_ids(self, sample: int):
        """Raise UserError naming the first shard with an id >= V among its first and last `sample` tokens."""
        for i, shard in enumerate(self.shards):
            top = max(int(shard[:sample].max()), int(shard[-sample:].max()))
            if top >= self.vocab:
                raise UserError(self.out_of_range(i, top))

    def out_of_range(self, shard: int, token: int) -> str:
        """What to say of a shard with an impossible token."""
        return f"{relative(self.files[shard])}: token id {token} is out of range for VOCAB_SIZE={self.vocab}"


class ByteTable(NamedTuple):
    """Bytes that a token adds to the text: base[id], plus one for a leading space unless a border comes before it."""
    base: np.ndarray    # (V,) int16, UTF-8 bytes without the leading space
    lead: np.ndarray    # (V,) bool, the piece starts with the space mark
    border: np.ndarray  # (V,) bool, control, unknown or unused: no space is printed after it

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) ids -> (N - 1,) int16: bytes of each target tokens[1:] given the token before it."""
        previous, target = tokens[:-1], tokens[1:]
        return self.base[target] + (self.lead[target] & ~self.border[previous])


def byte_table(tokenizer, vocab: int) -> ByteTable:
    """Byte accounting of a SentencePiece tokenizer, piece by piece. Source: the competition's evaluation rules."""
    base, lead, border = np.zeros(vocab, np.int16), np.zeros(vocab, bool), np.ones(vocab, bool)
    for i in range(tokenizer.vocab_size()):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            continue
        border[i] = False
        if tokenizer.is_byte(i):
            base[i] = 1
            continue
        piece = tokenizer.id_to_piece(i)
        lead[i] = piece.startswith("\u2581")
        base[i] = len(piece.removeprefix("\u2581").replace("\u2581", " ").encode())  # a mark inside stands for one byte
    return ByteTable(base, lead, border)


class Data(NamedTuple):
    """An opened dataset: training stream, validation tokens and the bytes each validation target stands for."""
    train: TokenStream | None  # None when only scoring
    val: np.ndarray           # (N,) uint16
    val_bytes: np.ndarray     # (N - 1,) int16
    tokenizer_sha256: str
    manifest: dict[str, Any]  # empty when the folder has none


def locate_data(cfg: Config, rt: Runtime) -> tuple[Path, Path]:
    """Folder of the shards and path of the tokenizer; builds the embedded sample when nothing else is asked for."""
    vocab, folder = cfg.data.vocab_size, Path(cfg.data.data_path)
    if cfg.data.data_path == "auto":
        folder = SCRIPT.parent / "data" / "datasets" / f"fineweb10B_sp{vocab}"
        if rt.device.type != "cuda" or not any(folder.glob("fineweb_train_*.bin")):
            folder = build_sample(rt)
    if not folder.is_dir():
        raise UserError(f"DATA_PATH={relative(folder)}: no such folder")
    if cfg.data.tokenizer_path != "auto":
        return folder, Path(cfg.data.tokenizer_path)
    own = sorted(folder.glob("*.model"))
    if len(own) > 1:
        raise UserError(f"DATA_PATH={relative(folder)} holds {len(own)} tokenizers ({', '.join(p.name for p in own)}); "
                        "say which with TOKENIZER_PATH")
    return folder, own[0] if own else SCRIPT.parent / "data" / "tokenizers" / f"fineweb_{vocab}_bpe.model"


def build_sample(rt: Runtime) -> Path:
    """Shards of the embedded sample corpus, built on first use by data/build_sample.py and cached."""
    builder, folder = SCRIPT.parent / "data" / "build_sample.py", SCRIPT.parent / "data" / "datasets" / "sample_sp1024"
    if not builder.exists():
        raise UserError(f"DATA_PATH=auto: {relative(builder)} is missing; set DATA_PATH to a folder of shards")
    spec = importlib.util.spec_from_file_location("build_sample", builder)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build():
        try:
            module.build(folder)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"DATA_PATH=auto: {error}") from None
    rt.on_main(build)
    return folder


def read_tokenizer(path: Path, vocab: int):
    """Load a SentencePiece model and refuse one that cannot count bytes. Raises UserError."""
    import sentencepiece
    if not path.is_file():
        raise UserError(f"TOKENIZER_PATH={relative(path)}: no such file")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise UserError(f"TOKENIZER_PATH={relative(path)}: not a SentencePiece model "
                        f"({type(error).__name__})") from None
    if tokenizer.vocab_size() != vocab:
        raise UserError(f"TOKENIZER_PATH={relative(path)} has {tokenizer.vocab_size()} pieces but VOCAB_SIZE={vocab}")
    if tokenizer.piece_to_id("\u2581") == tokenizer.unk_id():
        raise UserError(f"TOKENIZER_PATH={relative(path)}: no lone '\u2581' piece, so spaces would be counted as "
                        "three bytes; train it with a lone space mark")
    return tokenizer


def read_manifest(path: Path) -> dict[str, Any]:
    """What a dataset says about itself, {} when it says nothing. Raises UserError for a damaged one."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("reference_bpb", {}), dict):
            raise ValueError("not what a dataset builder writes")
        if not found.get("comparable", True) and not isinstance(found.get("note"), str):
            raise ValueError("`comparable` is false but there is no `note` that says why")
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(f"{relative(path)}: damaged manifest ({error}); build the dataset again") from None


def open_train(folder: Path, cfg: Config, rt: Runtime) -> TokenStream:
    """The training stream, checked. Raises UserError."""
    train, row = TokenStream(folder, "train", cfg.data.vocab_size), cfg.data.train_seq_len
    train.check_ids(1 << 20)
    if len(train) <= row:
        raise UserError(f"{relative(train.files[0])}: {len(train)} training tokens are fewer than one row of "
                        f"TRAIN_SEQ_LEN={row} + 1")
    rt.log(f"train_loader:shards pattern={relative(folder)}/fineweb_train_*.bin files:{len(train.files)} "
           f"tokens:{len(train)} order:{cfg.data.loader}")
    return train


def open_data(cfg: Config, rt: Runtime) -> Data:
    """Open and verify everything that this run will read. Raises UserError before any long work."""
    folder, tokenizer_path = locate_data(cfg, rt)
    tokenizer = read_tokenizer(tokenizer_path, cfg.data.vocab_size)
    train = open_train(folder, cfg, rt) if cfg.run.run_mode == "train" else None
    stream = TokenStream(folder, "val", cfg.data.vocab_size)
    stream.check_ids(len(stream))
    val = np.ascontiguousarray(stream.read(0, len(stream)))
    window = cfg.eval.eval_seq_len if cfg.eval.eval == "sliding" else cfg.data.train_seq_len
    if len(val) <= window:
        raise UserError(f"{relative(stream.files[0])}: {len(val)} validation tokens are fewer than one window of "
                        f"{window} + 1")
    val_bytes = byte_table(tokenizer, cfg.data.vocab_size).target_bytes(val)
    manifest, digest = read_manifest(folder / "manifest.json"), sha256_file(tokenizer_path)
    rt.log(f"val_loader:shards pattern={relative(folder)}/fineweb_val_*.bin tokens:{len(val) - 1}")
    rt.log(f"audit:data manifest:{sha256_file(folder / 'manifest.json')[:16] if manifest else 'none'} "
           f"train_shards:{len(train.files) if train else 0} val_tokens:{len(val) - 1} "
           f"val_bytes:{int(val_bytes.sum(dtype=np.int64))} tokenizer_sha256:{digest}")
    return Data(train, val, val_bytes, digest, manifest)


class Loader:
    """Deals rows of T + 1 tokens to the ranks. Which rows form a step depends on neither rank nor world size."""

    def __init__(self, stream: TokenStream, cfg: Config):
        self.stream, self.seq, self.seed = stream, cfg.data.train_seq_len, cfg.run.seed
        self.rows, self.vocab = cfg.data.train_batch_tokens // self.seq, cfg.data.vocab_size
        self.epoch, self.index = 0, 0  # pass over the text, next row of it

    def state_dict(self) -> dict[str, int]:
        return dict(epoch=self.epoch, index=self.index)

    def load_state_dict(self, state: dict[str, int]):
        self.epoch, self.index = state["epoch"], state["index"]
        self.begin_epoch()

    def begin_epoch(self):
        """Prepare the order of the current epoch."""

    def row_start(self, index: int) -> int:
        """Stream offset of row `index` of this epoch."""
        return index * self.seq

    def rows_in_epoch(self) -> int:
        return (len(self.stream) - 1) // self.seq

    def next(self, rank: int, world: int) -> np.ndarray:
        """Rows rank, rank + world, ... of the next step as (rows of this rank, T + 1) uint16."""
        mine = []
        for row in range(self.rows):
            if self.index >= self.rows_in_epoch():
                self.epoch, self.index = self.epoch + 1, 0
                self.begin_epoch()
            if row % world == rank:
                mine.append(self.stream.read(self.row_start(self.index), self.seq + 1))
            self.index += 1
        return np.stack(mine) if mine else np.zeros((0, self.seq + 1), np.uint16)


class ShuffledLoader(Loader):
    """Rows in a new random order and from a new random phase each epoch, decided by SEED alone."""

    def __init__(self, stream: TokenStream, cfg: Config):
        super().__init__(stream, cfg)
        self.begin_epoch()

    def begin_epoch(self):
        """Draw phase and order from (SEED, epoch)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        spare = len(self.stream) - 1 - super().rows_in_epoch() * self.seq
        self.phase = int(rng.integers(spare + 1))
        self.order = rng.permutation(super().rows_in_epoch())

    def row_start(self, index: int) -> int:
        return self.phase + int(self.order[index]) * self.seq


LOADERS = {"sequential": Loader, "shuffled": ShuffledLoader}


# ---- 4 Kernels: fast paths, each beside its reference ---------------------------------------------------------------
class Numerics(NamedTuple):
    """How numbers are computed on this machine; stored with checkpoint and artifact so that a score repeats."""
    mode: str = "fp32"       # fp32 | medium | bf16
    attention: str = "sdpa"  # sdpa | blocked
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mode == "bf16" else torch.float32


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the stock kernel. q (B,T,H,D), k and v (B,T,G,D) -> (B,T,H,D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact causal attention in row blocks, softmax in fp32; faster than the stock CPU kernel. Shapes as above.

    The g = H/G query heads of one key/value head are folded into rows, so keys and values are never repeated.
    """
    (B, T, H, D), G = q.shape, k.size(2)
    g, size = H // G, max(128, -(-T // 8))
    q = (q * D**-0.5).transpose(1, 2).reshape(B * G, g, T, D)
    k, v = (t.transpose(1, 2).reshape(B * G, T, D) for t in (k, v))
    future = torch.ones(min(size, T), min(size, T), dtype=torch.bool, device=q.device).triu(1)
    out = []
    for lo in range(0, T, size):
        hi = min(lo + size, T)
        n = hi - lo
        scores = torch.bmm(q[:, :, lo:hi].reshape(B * G, g * n, D), k[:, :hi].transpose(1, 2)).float()
        hidden = F.pad(future[:n, :n], (lo, 0))  # keys before this block are all visible
        weights = scores.view(B * G, g, n, hi).masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
        out.append(torch.bmm(weights.view(B * G, g * n, hi), v[:, :hi]).view(B * G, g, n, D))
    return torch.cat(out, 2).view(B, H, T, D).transpose(1, 2)


ATTENTION = {"sdpa": sdpa_attention, "blocked": blocked_attention}


def softcapped_cross_entropy(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Loss of logits cap * tanh(z / cap) in nats. z (..., V), targets (...) -> (...) fp32; target -100 gives 0."""
    logits = cap * torch.tanh(z.float() / cap)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none")
    return loss.view(targets.shape)


def best_time(run: Callable[[], Any], repeats: int = 3) -> float:
    """Shortest of `repeats` timings in seconds, after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def fastest_cpu_mode(log: Callable[[str], None]) -> str:
    """Time three GEMM shapes in fp32, "medium" and bf16; the fastest whose error against float64 is tolerable."""
    tolerance = {"fp32": 1e-5, "medium": 1e-5, "bf16": 1e-2}
    generator, total, error = torch.Generator().manual_seed(0), {}, {}
    shapes = [(2048, 256, 1024), (2048, 256, 256), (2048, 1024, 256)]
    pairs = [(torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)) for m, k, n in shapes]
    before = torch.get_float32_matmul_precision()
    for mode in tolerance:
        torch.set_float32_matmul_precision("medium" if mode == "medium" else "highest")
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        cast = [(a.to(dtype), b.to(dtype)) for a, b in pairs]
        total[mode] = sum(best_time(lambda a=a, b=b: F.linear(a, b)) for a, b in cast)
        (a, b), (x, y) = pairs[0], cast[0]
        exact = a[:256].double() @ b.double().T
        error[mode] = float((F.linear(x[:256], y).double() - exact).norm() / exact.norm())
    torch.set_float32_matmul_precision(before)
    best = min((m for m in tolerance if error[m] <= tolerance[m]), key=total.get, default="fp32")
    log("numerics:gemm " + " ".join(f"{m}:{total[m] * 1e3:.1f}ms(err {error[m]:.1e})" for m in total) + f" -> {best}")
    return best


def fastest_cpu_attention(model: ModelConfig, seq: int, dtype: torch.dtype, log: Callable[[str], None]) -> str:
    """Time forward and backward of both attention kernels at the run's own shape."""
    seq, rows = min(seq, 1024), max(1, 2048 // min(seq, 1024))
    shape = [(rows, seq, heads, model.head_dim) for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
    qkv = [torch.randn(s).to(dtype).requires_grad_() for s in shape]
    total = {name: best_time(lambda kernel=kernel: kernel(*qkv).sum().backward(), 2)
             for name, kernel in ATTENTION.items()}
    best = min(total, key=total.get)
    log("numerics:attention " + " ".join(f"{n}:{t * 1e3:.1f}ms" for n, t in total.items()) + f" -> {best}")
    return best


def choose_numerics(cfg: Config, rt: Runtime) -> Numerics:
    """Resolve NUMERICS, ATTENTION and COMPILE for this device. Called on rank 0, which measures; every rank follows."""
    s, cuda = cfg.system, rt.device.type == "cuda"
    planned = cfg.optim.max_wallclock_seconds or cfg.optim.iterations / 10
    compile_it = s.compile == "on" or s.compile == "auto" and (cuda or planned >= 60 and can_compile())
    mode = s.numerics if s.numerics != "auto" else "bf16" if cuda else fastest_cpu_mode(rt.log)
    if s.attention != "auto" or cuda:
        kernel = "sdpa" if s.attention == "auto" else s.attention
    elif compile_it and mode == "bf16":
        kernel = "blocked"  # compiled, its softmax fuses with the casts; timing it eagerly would mislead
    else:
        kernel = fastest_cpu_attention(cfg.model, cfg.data.train_seq_len, Numerics(mode).dtype, rt.log)
    return Numerics(mode, kernel, compile_it)


def can_compile() -> bool:
    """Whether torch.compile works here: it needs a C++ compiler on a CPU, Triton on a GPU."""
    try:
        return float(torch.compile(lambda x: x + 1)(torch.zeros(8)).sum()) == 8
    except Exception:  # whatever the compiler stack raises, the answer is no
        return False


def apply_numerics(numerics: Numerics, rt: Runtime):
    """Set the process-wide matmul switches that belong to a Numerics."""
    torch.set_float32_matmul_precision({"fp32": "highest", "medium": "medium", "bf16": "high"}[numerics.mode])
    rt.log(f"numerics:{numerics.mode} attention:{numerics.attention} compile:{int(numerics.compile)} "
           f"threads:{torch.get_num_threads()}")


def compiled(function: Callable, numerics: Numerics) -> Callable:
    """torch.compile with static shapes and no graph breaks, or the function itself."""
    return torch.compile(function, dynamic=False, fullgraph=True) if numerics.compile else function


# ---- 5 Model: a technique is a module at a named site; switched off, it is absent -----------------------------------
def param(shape: tuple[int, ...], init: Callable[[Tensor], Any], opt: str, quant: str) -> nn.Parameter:
    """A parameter born with its two tags: `opt` names its optimiser group, `quant` its quantiser (see QUANTISERS)."""
    p = nn.Parameter(torch.empty(shape))
    with torch.no_grad():
        init(p)
    p.opt, p.quant = opt, quant
    return p


def constant(value: float) -> Callable[[Tensor], Any]:
    return lambda t: t.fill_(value)


def normal(std: float) -> Callable[[Tensor], Any]:
    return lambda t: t.normal_(0, std)


def uniform(t: Tensor):
    """The framework's default for linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return t.uniform_(-t.size(1)**-0.5, t.size(1)**-0.5)


def norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last axis, no gain. The fp32 epsilon is explicit: old torch used a bf16 one."""
    return F.rms_norm(x, (x.size(-1),), eps=1.1920929e-07)


class Linear(nn.Module):
    """x (..., n_in) -> (..., n_out), no bias; fp32 weight cast to the dtype of x.

    `weight_sites` is where fake quantisation attaches (filled before compile, empty when off).
    """

    def __init__(self, n_in: int, n_out: int, init: Callable = uniform, opt: str = "matrix", quant: str = "matrix"):
        super().__init__()
        self.weight = param((n_out, n_in), init, opt, quant)
        self.weight_sites = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        for site in self.weight_sites:
            w = site(w)
        return F.linear(x, w.to(x.dtype))


class Context(NamedTuple):
    """What a site may look at besides its own input."""
    ids: Tensor  # (B,T) int64
    x0: Tensor   # (B,T,C) normalised embedding


class Site(nn.Module):
    """A technique that plugs into block `layer`; built from the configuration whether or not it has parameters."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()


# embed sites: (x (B,T,C), ids (B,T)) -> (B,T,C)
class BigramHash(Site):
    """Add a learned vector for the hashed pair (previous token, token). Zero table, so the identity at start.

    Source: PR 162. Knobs: BIGRAM_BUCKETS, BIGRAM_DIM.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.table = param((cfg.bigram_buckets, cfg.bigram_dim), constant(0.0), "table", "embed")
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = param((1,), constant(0.05), "scalar", "keep")

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        last, ids = self.table.size(0) - 1, ids.int()  # int32 products wrap, as published
        pair = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
        rows = F.pad(pair, (1, 0), value=last).long()  # the first position has no pair: reserved last bucket
        return x + self.scale.to(x.dtype) * self.proj(F.embedding(rows, self.table).to(x.dtype))


class EmbedNorm(Site):
    """Normalise the embedding; sites before it in the registry see the raw one, sites after it the normalised one."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return norm(x)


class SmearGate(Site):
    """Blend each position with the one before it by a learned per-channel gate, half and half at start (variant B).

    Source: PR 162. Knob: SMEAR_GATE.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.gate = param((cfg.model_dim,), constant(0.0), "scalar", "keep")

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        return (1 - g) * x + g * F.pad(x[:, :-1], (0, 0, 1, 0))


# qkv sites: (q (B,T,H,D), k (B,T,G,D), v (B,T,G,D), context) -> (q, k, v)
class QKNorm(Site):
    """Normalise queries and keys per head, which bounds attention logits by gain * sqrt(D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context):
        return norm(q), norm(k), v


class Rotary(Site):
    """Rotate the first R dims of queries and keys by position, pairing dim i with i + R/2; the rest passes through.

    Source: PR 315 (partial). Knobs: ROPE_DIMS, ROPE_BASE.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.dims = cfg.rotary_dims
        frequency = cfg.rope_base ** (-torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context):
        angle = torch.arange(q.size(1), device=q.device, dtype=torch.float32)[:, None] * self.frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (T,1,R/2), fp32
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B,T,*,D) with its first R dims rotated in fp32."""
        half = self.dims // 2
        a, b, rest = x[..., :half], x[..., half:self.dims], x[..., self.dims:]
        return torch.cat([(a * cos + b * sin).to(x.dtype), (b * cos - a * sin).to(x.dtype), rest], -1)


class QKGain(Site):
    """Scale each query head by a learned inverse temperature. Knob: QK_GAIN_INIT. Source: PR 1125."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.gain = param((cfg.num_heads,), constant(cfg.qk_gain_init), "scalar", "keep")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context):
        return q * self.gain.to(q.dtype)[:, None], k, v


# attn_out sites: (y (B,T,H,D), v (B,T,G,D), context) -> (B,T,H,D)
class XSA(Site):
    """Exclusive self-attention: remove from each head's output the part along the token's own value.

    No parameters; grouped, so values are never repeated. Source: arXiv 2603.09078, PR 265. Knob: XSA_LAST_N.
    """

    def forward(self, y: Tensor, v: Tensor, context: Context) -> Tensor:
        B, T, H, D = y.shape
        y = y.view(B, T, v.size(2), -1, D)
        direction = F.normalize(v.float(), dim=-1, eps=1e-12).to(y.dtype).unsqueeze(3)
        return (y - (y * direction).sum(-1, keepdim=True) * direction).view(B, T, H, D)


# residual sites: (x (B,T,C), x0 (B,T,C)) -> (B,T,C)
class X0Mix(Site):
    """Learned per-channel blend of the residual stream with the embedding, the identity at start."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.mix = param((2, cfg.model_dim), lambda t: t.copy_(torch.tensor([[1.0], [0.0]])), "scalar", "keep")

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0


# mlp: (B,T,C) -> (B,T,C)
class ReluSquaredMLP(nn.Module):
    """Up-projection, max(0, u)^2, down-projection that starts at zero."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.up = Linear(cfg.model_dim, cfg.mlp_dim)
        self.down = Linear(cfg.mlp_dim, cfg.model_dim, constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


class LeakyReluSquaredMLP(ReluSquaredMLP):
    """As above with leaky relu, then square: positive on both sides. Source: PR 493. Knob: LEAKY_SLOPE."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.slope = cfg.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope).square())


MLPS = {"relu2": ReluSquaredMLP, "leaky_relu2": LeakyReluSquaredMLP}
# site -> techniques in order of application, each with the condition under which block `i` has it
SITES: dict[str, list[tuple[type, Callable[[ModelConfig, int], bool]]]] = {
    "embed": [(BigramHash, lambda c, i: c.bigram_buckets > 0), (EmbedNorm, lambda c, i: True),
              (SmearGate, lambda c, i: c.smear_gate)],
    "qkv": [(QKNorm, lambda c, i: True), (Rotary, lambda c, i: True), (QKGain, lambda c, i: True)],
    "attn_out": [(XSA, lambda c, i: i >= c.num_layers - c.xsa_last_n)],
    "residual": [(X0Mix, lambda c, i: True)],
}


def sites(name: str, cfg: ModelConfig, layer: int = 0) -> nn.ModuleList:
    """The techniques that a configuration puts at one site of one block; empty when all are off."""
    return nn.ModuleList(cls(cfg, layer) for cls, wanted in SITES[name] if wanted(cfg, layer))


class Attention(nn.Module):
    """Causal grouped-query attention. x (B,T,C) normalised -> (B,T,C)."""

    def __init__(self, cfg: ModelConfig, layer: int, kernel: Callable):
        super().__init__()
        self.cfg, self.kernel = cfg, kernel
        self.q = Linear(cfg.model_dim, cfg.model_dim)
        self.k = Linear(cfg.model_dim, cfg.kv_dim)
        self.v = Linear(cfg.model_dim, cfg.kv_dim)
        self.proj = Linear(cfg.model_dim, cfg.model_dim, constant(0.0))
        self.qkv_sites, self.out_sites = sites("qkv", cfg, layer), sites("attn_out", cfg, layer)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.cfg.head_dim)) for f in (self.q, self.k, self.v))
        for site in self.qkv_sites:
            q, k, v = site(q, k, v, context)
        y = self.kernel(q, k, v)
        for site in self.out_sites:
            y = site(y, v, context)
        return self.proj(y.flatten(2))


class Block(nn.Module):
    """One stored layer: residual sites, attention, MLP, each branch scaled per channel. x (B,T,C) -> (B,T,C)."""

    def __init__(self, cfg: ModelConfig, layer: int, kernel: Callable):
        super().__init__()
        self.residual_sites = sites("residual", cfg, layer)
        self.attn, self.mlp = Attention(cfg, layer, kernel), MLPS[cfg.mlp](cfg)
        self.attn_scale = param((cfg.model_dim,), constant(1.0), "scalar", "keep")
        self.mlp_scale = param((cfg.model_dim,), constant(1.0), "scalar", "keep")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for site in self.residual_sites:
            x = site(x, context.x0)
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x), context)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))


class Slot(NamedTuple):
    """One application of a block: which block, and which (skip weight, earlier slot) pairs are added before it."""
    block: int
    skips: tuple[tuple[int, int], ...] = ()


Plan = tuple[Slot, ...]


def schedule(cfg: ModelConfig) -> Plan:
    """The order of block applications and the skips between them, decided once, as data.

    "unet": the first half pushes its outputs, the second half pops them (last in, first out).
    """
    slots, half = [Slot(i) for i in range(cfg.num_layers)], cfg.num_layers // 2
    if cfg.skips == "unet":
        for j in range(half):
            slots[half + j] = slots[half + j]._replace(skips=((j, half - 1 - j),))
    return tuple(slots)


class GPT(nn.Module):
    """Tied-embedding transformer that walks a plan. Weights fp32; arithmetic in the dtype of `numerics`."""

    def __init__(self, cfg: ModelConfig, vocab: int, numerics: Numerics):
        super().__init__()
        self.cfg, self.dtype = cfg, numerics.dtype
        self.embed = param((vocab, cfg.model_dim), normal(cfg.tied_embed_init_std), "embed", "embed")
        self.embed_sites = sites("embed", cfg)
        self.blocks = nn.ModuleList(Block(cfg, i, ATTENTION[numerics.attention]) for i in range(cfg.num_layers))
        count = sum(len(slot.skips) for slot in schedule(cfg))
        self.skip_weights = param((count, cfg.model_dim), constant(1.0), "scalar", "keep")

    def hidden(self, ids: Tensor, plan: Plan) -> Tensor:
        """ids (B,T) int64 -> (B,T,C), normalised."""
        x = F.embedding(ids, self.embed).to(self.dtype)
        for site in self.embed_sites:
            x = site(x, ids)
        context, outputs = Context(ids, x), []
        for slot in plan:
            for weight, source in slot.skips:
                x = x + self.skip_weights[weight].to(x.dtype) * outputs[source]
            x = self.blocks[slot.block](x, context)
            outputs.append(x)
        return norm(x)

    def losses(self, h: Tensor, targets: Tensor) -> Tensor:
        """h (...,C), targets (...) -> nats (...) fp32; a target of -100 gives 0."""
        return softcapped_cross_entropy(F.linear(h, self.embed.to(h.dtype)), targets, self.cfg.logit_softcap)

    def forward(self, ids: Tensor, targets: Tensor, plan: Plan) -> Tensor:
        """Summed loss of a micro-batch in nats. ids, targets (B,T) int64 -> 0-D fp32."""
        return self.losses(self.hidden(ids, plan), targets).sum()

    def nll(self, ids: Tensor, targets: Tensor, rows: Tensor, plan: Plan) -> Tensor:
        """Loss of chosen positions only: ids (B,W), targets and rows (B,S) int64 -> nats (B,S) fp32."""
        h = self.hidden(ids, plan)
        return self.losses(torch.gather(h, 1, rows.unsqueeze(-1).expand(-1, -1, h.size(-1))), targets)


def flops_per_token(model: GPT, plan: Plan, seq: int) -> float:
    """Forward and backward FLOPs of one training token: 6 per matmul weight used, plus causal attention."""
    per_block = [sum(p.numel() for p in b.parameters() if p.opt == "matrix") for b in model.blocks]
    outside = model.embed.numel() + sum(p.numel() for p in model.embed_sites.parameters() if p.opt == "matrix")
    return 6 * (outside + sum(per_block[s.block] for s in plan)) + 6 * len(plan) * model.cfg.model_dim * seq


# ---- 6 Optimisation: one Muon made of stages, AdamW groups, ramps, averaging ----------------------------------------
class FlatParameters:
    """All weights as views of one fp32 vector and all gradients as views of another, same-shape matrices adjacent.

    Modules keep ordinary parameters; reduction, clipping, averaging and Muon's stacks work on whole memory.
    The gradient vector ends with one extra number, the loss, so that one all-reduce carries both.
    """

    def __init__(self, model: GPT):
        self.params = sorted(model.parameters(), key=lambda p: (p.opt != "matrix", p.opt, p.shape))  # stable
        total, device = sum(p.numel() for p in self.params), self.params[0].device
        self.weights = torch.zeros(total, device=device)
        self.gradients = torch.zeros(total + 1, device=device)
        self.offsets = np.cumsum([0] + [p.numel() for p in self.params]).tolist()
        for p, offset in zip(self.params, self.offsets):
            self.weights[offset:offset + p.numel()] = p.data.flatten()
            p.data = self.weights[offset:offset + p.numel()].view(p.shape)
            p.grad = self.gradients[offset:offset + p.numel()].view(p.shape)

    def stacks(self) -> list[tuple[Tensor, Tensor]]:
        """(weights, gradients) of the matrix group as (K, m, n) views, one pair per shape."""
        found, i = [], 0
        matrices = [p for p in self.params if p.opt == "matrix"]
        while i < len(matrices):
            shape, k = matrices[i].shape, sum(p.shape == matrices[i].shape for p in matrices)
            span = slice(self.offsets[i], self.offsets[i + k])
            found.append((self.weights[span].view(k, *shape), self.gradients[span].view(k, *shape)))
            i += k
        return found

    def clip(self, bound: float):
        """Scale the gradient down to the given norm; 0 leaves it alone."""
        if bound:
            g = self.gradients[:-1]
            g.mul_((bound / (g.norm() + 1e-6)).clamp(max=1.0))


# Stages: stage(u (K,m,n), state, hp) -> (K,m,n). `state` belongs to the stack, hp holds 0-D tensors and constants.
def nesterov(u: Tensor, state: dict[str, Tensor], hp: dict[str, Any]) -> Tensor:
    """Heavy-ball buffer b <- mu*b + g, look-ahead g + mu*b."""
    buffer = state.setdefault("momentum", torch.zeros_like(u))
    buffer.mul_(hp["momentum"]).add_(u)
    return u + hp["momentum"] * buffer


def row_norm(u: Tensor, state: dict[str, Tensor], hp: dict[str, Any]) -> Tensor:
    """Equal norm for every output row before orthogonalisation. Source: MuonEq-R, arXiv 2603.28254."""
    return u / u.norm(dim=-1, keepdim=True).clamp(min=1e-7)


QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (  # arXiv 2505.16932, designed for exactly five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(u: Tensor, table: tuple[tuple[float, float, float], ...], dtype: torch.dtype) -> Tensor:
    """Replace singular values by about one: X <- aX + (bA + cA^2)X with A = XX^T, one (a,b,c) per step."""
    x = u.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in table:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(u.dtype)


def newton_schulz(u: Tensor, state: dict[str, Tensor], hp: dict[str, Any]) -> Tensor:
    """Five equal quintic steps; singular values end within about [0.7, 1.2]."""
    return orthogonalise(u, QUINTIC, hp["dtype"])


def polar_express(u: Tensor, state: dict[str, Tensor], hp: dict[str, Any]) -> Tensor:
    """Five minimax steps, after a 2 % margin on the input norm."""
    return orthogonalise(u, ((lambda a, b, c: (a / 1.02, b / 1.02**3, c / 1.02**5))(*POLAR_EXPRESS[0]),)
                         + POLAR_EXPRESS[1:], hp["dtype"])


def aspect_scale(u: Tensor, state: dict[str, Tensor], hp: dict[str, Any]) -> Tensor:
    """sqrt(max(1, rows/columns)): the same update size per entry for wide and tall matrices."""
    return u * max(1.0, u.size(-2) / u.size(-1))**0.5


MUON = {
    "muon": (nesterov, newton_schulz, aspect_scale),
    "muon_polar": (nesterov, polar_express, aspect_scale),
    "muoneq_r": (nesterov, row_norm, newton_schulz, aspect_scale),
}


class Muon:
    """Momentum, orthogonalise, scale: runs a list of stages over every stack of same-shape matrices.

    Each rank orthogonalises its share of a stack; one all-reduce hands out the updates. State is equal on all ranks,
    so a checkpoint can be resumed by any number of them. Source: Keller Jordan's Muon; stages: MUON.
    """

    def __init__(self, flat: FlatParameters, cfg: OptimConfig, rt: Runtime, dtype: torch.dtype):
        self.stacks, self.stages, self.rt = flat.stacks(), MUON[cfg.muon], rt
        self.lr, self.wd = cfg.matrix_lr, cfg.muon_wd
        self.state: list[dict[str, Tensor]] = [{} for _ in self.stacks]
        self.hp = dict(momentum=torch.tensor(0.0, device=flat.weights.device), dtype=dtype)

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float):
        """Update the matrices from their reduced gradients."""
        self.hp["momentum"].fill_(momentum)
        for (weights, gradients), state in zip(self.stacks, self.state):
            u = self.stages[0](gradients, state, self.hp)
            share = slice(len(u) * self.rt.rank // self.rt.world, len(u) * (self.rt.rank + 1) // self.rt.world)
            mine = u[share]
            for stage in self.stages[1:] if len(mine) else ():
                mine = stage(mine, state, self.hp)
            update = mine if self.rt.world == 1 else torch.zeros_like(u)
            if self.rt.world > 1:
                update[share] = mine
                self.rt.all_reduce(update)
            weights.mul_(1 - self.lr * lr_scale * self.wd).sub_(update, alpha=self.lr * lr_scale)

    def state_dict(self) -> list[dict[str, Tensor]]:
        return self.state

    def load_state_dict(self, state: list[dict[str, Tensor]]):
        device = self.hp["momentum"].device
        self.state = [{name: value.to(device) for name, value in stack.items()} for stack in state]


def adamw(model: GPT, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over everything that is no matrix, one group per tag; `base_lr` is what the ramp multiplies."""
    rates = {"embed": cfg.tied_embed_lr, "table": cfg.table_lr, "scalar": cfg.scalar_lr}
    groups = [dict(params=[p for p in model.parameters() if p.opt == tag], lr=lr, base_lr=lr)
              for tag, lr in rates.items()]
    owned = sum(len(g["params"]) for g in groups) + sum(p.opt == "matrix" for p in model.parameters())
    if owned != sum(1 for _ in model.parameters()):
        raise RuntimeError("a parameter's `opt` tag belongs to no optimiser group")
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                             weight_decay=cfg.adam_wd, fused=True)


class Progress(NamedTuple):
    """Where a run stands; everything that ramps is a function of this."""
    step: int
    frac: float       # part of the run that is over, 0..1
    remaining: float  # seconds of training left, or steps when there is no wall-clock limit
    step_cost: float  # seconds of one step (0 = not known yet), or 1 step


def warmdown_iters(p: Progress, cfg: OptimConfig) -> float:
    """Linear to zero over the last WARMDOWN_ITERS steps, their duration estimated from the steps so far.

    A slow first step must not start the decay: the estimate skips the first steps and is 0 until it is sound.
    """
    span = cfg.warmdown_iters * p.step_cost
    return min(1.0, p.remaining / span) if span else 1.0


def warmdown_frac(p: Progress, cfg: OptimConfig) -> float:
    """Linear to zero over the last WARMDOWN_FRAC of the run."""
    return min(1.0, (1 - p.frac) / cfg.warmdown_frac) if cfg.warmdown_frac else 1.0


LR_SCHEDULES = {"warmdown_iters": warmdown_iters, "warmdown_frac": warmdown_frac}


def momentum_warmup(p: Progress, cfg: OptimConfig) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    f = min(1.0, p.step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - f) * cfg.muon_momentum_warmup_start + f * cfg.muon_momentum


# name -> value at a point of the run; the training loop applies them all before each step
RAMPS: dict[str, Callable[[Progress, Config], float]] = {
    "lr": lambda p, c: max(c.optim.min_lr, LR_SCHEDULES[c.optim.lr_schedule](p, c.optim)),
    "momentum": lambda p, c: momentum_warmup(p, c.optim),
    "qat": lambda p, c: float(p.frac >= c.quant.qat_start_frac),
}


class LastWeights:
    """No averaging: what is exported is what the last step left. Interface of every averager."""

    def __init__(self, weights: Tensor, cfg: OptimConfig):
        self.weights = weights

    def update(self):
        """Called after every step."""

    def apply(self):
        """Replace the live weights by the averaged ones, once, after training."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]):
        """Nothing to restore."""


class EMA(LastWeights):
    """Exponential moving average in fp32, updated after every step. Source: PR 287. Knob: EMA_DECAY."""

    def __init__(self, weights: Tensor, cfg: OptimConfig):
        super().__init__(weights, cfg)
        self.decay, self.average = cfg.ema_decay, weights.clone()

    def update(self):
        self.average.lerp_(self.weights, 1 - self.decay)

    def apply(self):
        self.weights.copy_(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]):
        self.average.copy_(state["average"])


AVERAGERS = {"none": LastWeights, "ema": EMA}


# ---- 7 Quantisation -------------------------------------------------------------------------------------------------
class QTensor(NamedTuple):
    """A tensor as it is stored: values, and one fp16 scale per row when the values are levels."""
    values: Tensor               # int8 levels (m,n), or fp16/fp32 of any shape
    scale: Tensor | None = None  # (m,) fp16

    def dequant(self) -> Tensor:
        """fp32, the shape of `values`."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale.float()[:, None]


class Cast(NamedTuple):
    """Store as a float type. `fake` is the rounding that the export will do."""
    dtype: torch.dtype

    def fit(self, w: Tensor) -> QTensor:
        return QTensor(w.to(self.dtype))


class RoundToNearest(NamedTuple):
    """Symmetric uniform levels -m..m per row, m = 2^(bits-1) - 1; a row's clip is a high quantile of its |w|.

    `floor` is the smallest clip: 1.0 reproduces the published int8 export, 0 adapts to small rows.
    """
    bits: int
    quantile: float
    floor: float

    def fit(self, w: Tensor) -> QTensor:
        """w (m,n) fp32 -> levels and fp16 scales. The error is at most half a scale inside the clip."""
        top = 2 ** (self.bits - 1) - 1
        clip = row_quantile(w.abs(), self.quantile).clamp(min=self.floor)
        scale = rounded_to_fp16((clip / top).clamp(2**-14, 65504))  # a normal fp16: never zero, never infinite
        levels = (w / scale[:, None]).round().clamp(-top, top)
        return QTensor(levels.to(torch.int8), scale.half())


def rounded_to_fp16(x: Tensor) -> Tensor:
    """The fp16 value nearest to each positive fp32 in [2^-14, 65504], ties to even, still as fp32.

    In integer arithmetic, because a compiler may drop a cast to fp16 and back, and the training grid would then
    differ from the exported one.
    """
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def row_quantile(a: Tensor, q: float) -> Tensor:
    """Linear-interpolation quantile of each row, by the few largest entries. a (m,n) -> (m,)."""
    position = q * (a.size(1) - 1)
    below = min(int(position), a.size(1) - 1)
    largest = a.topk(a.size(1) - below, dim=1).values  # position `below` and everything above it
    upper = largest[:, max(largest.size(1) - 2, 0)]
    return torch.lerp(largest[:, -1], upper, position - below)


def quantiser(bits: int, cfg: QuantConfig) -> Cast | RoundToNearest:
    """The quantiser of a bit width: 16 means fp16."""
    return Cast(torch.float16) if bits == 16 else RoundToNearest(bits, cfg.clip_quantile, cfg.scale_floor)


# tag of a parameter -> its quantiser
QUANTISERS: dict[str, Callable[[QuantConfig], Cast | RoundToNearest]] = {
    "matrix": lambda c: quantiser(c.matrix_bits, c),
    "embed": lambda c: quantiser(c.embed_bits, c),
    "keep": lambda c: Cast(torch.float32),
}


class FakeQuant(nn.Module):
    """Weight site: in the forward the exported values bit for bit, in the backward the identity.

    `on` is a tensor, so switching it mid-run takes effect inside a compiled graph. Knobs: QAT, QAT_START_FRAC.
    """

    def __init__(self, rule: Cast | RoundToNearest):
        super().__init__()
        self.rule = rule
        self.register_buffer("on", torch.zeros(()), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        stored = self.rule.fit(w.detach()).dequant()
        return torch.where(self.on > 0, stored, w.detach()) + (w - w.detach())


def attach_qat(model: GPT, cfg: QuantConfig) -> list[FakeQuant]:
    """Give every block matrix its fake quantiser; returns them so that the training loop can switch them."""
    attached = []
    for module in model.modules() if cfg.qat == "ste" else ():
        if isinstance(module, Linear) and module.weight.quant == "matrix":
            module.weight_sites.append(FakeQuant(QUANTISERS["matrix"](cfg)).to(module.weight.device))
            attached.append(module.weight_sites[-1])
    return attached


# ---- 8 Artifact: a self-describing file, safe to read from strangers ------------------------------------------------
class Codec(NamedTuple):
    """A byte compressor. `unpack(data, size)` returns at most `size` bytes, whatever the data claims."""
    number: int  # identifies it in the file
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]
    module: Any = zlib


def unzstd(data: bytes, size: int) -> bytes:
    """At most `size` bytes of a zstd stream."""
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 28).stream_reader(data)
    return reader.read(size)


def unbrotli(data: bytes, size: int) -> bytes:
    """At most `size` bytes of a brotli stream."""
    decoder, out = brotli.Decompressor(), b""
    while len(out) < size and not decoder.is_finished():
        piece = decoder.process(b"" if out else data, output_buffer_limit=size - len(out))
        if not piece:
            break
        out += piece
    return out[:size]


LZMA = dict(format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}])
CODECS = {
    "zlib": Codec(1, lambda b: zlib.compress(b, 9), lambda b, n: zlib.decompressobj().decompress(b, n or 1)[:n]),
    "lzma": Codec(2, lambda b: lzma.compress(b, **LZMA), lambda b, n: lzma.LZMADecompressor(**LZMA).decompress(b, n),
                  lzma),
    "zstd": Codec(3, lambda b: zstandard.ZstdCompressor(level=22).compress(b), unzstd, zstandard),
    "brotli": Codec(4, lambda b: brotli.compress(b, quality=11, lgwin=24), unbrotli, brotli),
}


def available_codecs() -> list[str]:
    return [name for name, codec in CODECS.items() if codec.module]


MAGIC, FORMAT_VERSION, PREFIX = b"GOLF", 1, struct.Struct("<4sHBxII")  # magic, version, codec, header bytes, raw bytes
MAX_STREAM_BYTES = 1 << 30
DTYPES = {"i1": torch.int8, "f2": torch.float16, "f4": torch.float32}


def pack_artifact(tensors: dict[str, QTensor], header: dict[str, Any], codec: Codec) -> bytes:
    """Serialise: prefix, packed JSON header, one packed stream per kind of number, sha256 of all before it.

    Values of equal type lie in one stream in the order of the header, which lets the codec see them together.
    """
    streams: dict[str, list[bytes]] = {}
    table = []
    for name, t in tensors.items():
        kind = {v: k for k, v in DTYPES.items()}[t.values.dtype]
        table.append([name, kind, list(t.values.shape), int(t.scale is not None)])
        for key, part in ((kind, t.values), ("scale", t.scale)):
            if part is not None:
                little = part.numpy().astype(part.numpy().dtype.newbyteorder("<"))
                streams.setdefault(key, []).append(little.tobytes())
    raw = {key: b"".join(parts) for key, parts in streams.items()}
    packed = {key: codec.pack(data) for key, data in raw.items()}
    sizes = [[key, codec.number, len(raw[key]), len(packed[key])] for key in raw]
    text = json.dumps(dict(header, tensors=table, streams=sizes), separators=(",", ":")).encode()
    small = codec.pack(text)
    body = PREFIX.pack(MAGIC, FORMAT_VERSION, codec.number, len(small), len(text)) + small + b"".join(packed.values())
    return body + hashlib.sha256(body).digest()


def unpack_stream(data: bytes, number: int, size: int) -> bytes:
    """Decompress one stream to exactly `size` bytes. Raises UserError on anything else."""
    found = [codec for codec in CODECS.values() if codec.number == number]
    if not found or not found[0].module:
        raise UserError(f"its codec {number!r} is not available here")
    if type(size) is not int or not 0 <= size <= MAX_STREAM_BYTES:
        raise UserError(f"a stream claims {size!r} bytes")
    try:
        raw = found[0].unpack(data, size + 1)  # one more, so that a stream with too much is noticed
    except Exception as error:
        raise UserError(f"a stream does not decompress ({type(error).__name__})") from None
    if len(raw) != size:
        raise UserError(f"a stream holds {'more' if len(raw) > size else len(raw)} instead of {size} bytes")
    return raw


def unpack_streams(lines: list, body: bytes) -> dict[str, memoryview]:
    """All streams by name. Raises UserError unless names are known and different and every byte belongs to one."""
    if len({line[0] for line in lines}) != len(lines) or not {line[0] for line in lines} <= {*DTYPES, "scale"}:
        raise UserError("its streams are repeated or unknown")
    if not all(type(n) is int and n >= 0 for line in lines for n in line[1:]):
        raise UserError("its streams have impossible sizes")
    if (claimed := sum(raw for _, _, raw, _ in lines)) > MAX_STREAM_BYTES:
        raise UserError(f"it claims {claimed} bytes in its streams")
    if sum(length for *_, length in lines) != len(body):
        raise UserError("its streams do not fill the file")
    streams, offset = {}, 0
    for key, number, raw, length in lines:
        streams[key] = memoryview(unpack_stream(body[offset:offset + length], number, raw))
        offset += length
    return streams


def unpack_artifact(blob: bytes) -> tuple[dict[str, Any], dict[str, QTensor]]:
    """Inverse of pack_artifact: (header, tensors). Executes nothing from the file. Raises UserError with the reason."""
    if len(blob) < PREFIX.size + 32 or blob[:4] != MAGIC:
        raise UserError("not an artifact (too short, or wrong magic)")
    _, version, number, packed, size = PREFIX.unpack_from(blob)
    if version != FORMAT_VERSION:
        raise UserError(f"format version {version}; this script reads {FORMAT_VERSION}")
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise UserError("checksum mismatch: truncated or corrupted")
    try:
        header = json.loads(unpack_stream(blob[PREFIX.size:PREFIX.size + packed], number, size))
        streams = unpack_streams(header["streams"], blob[PREFIX.size + packed:-32])
        tensors: dict[str, QTensor] = {}
        for name, kind, shape, scaled in header["tensors"]:
            if type(name) is not str or name in tensors or scaled and (kind != "i1" or len(shape) != 2):
                raise ValueError("a tensor is repeated, or has scales that it cannot have")
            values = take(streams, kind, DTYPES[kind], shape)
            tensors[name] = QTensor(values, take(streams, "scale", torch.float16, shape[:1]) if scaled else None)
        if any(map(len, streams.values())):
            raise ValueError("a stream is longer than its tensors")
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise UserError(str(error) if isinstance(error, UserError) else f"malformed header ({error!r})") from None
    return header, tensors


def take(streams: dict[str, memoryview], key: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Cut the next tensor off a stream. Raises ValueError when the stream is too short or the shape is not one."""
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {shape!r}"[:200])
    size = math.prod(shape) * dtype.itemsize
    if size > len(streams[key]):
        raise ValueError(f"stream {key} is too short")
    data, streams[key] = streams[key][:size], streams[key][size:]
    numpy_dtype = {torch.int8: "<i1", torch.float16: "<f2", torch.float32: "<f4"}[dtype]
    return torch.from_numpy(np.frombuffer(data, numpy_dtype).astype(numpy_dtype[1:]).reshape(shape))


def quantise(model: GPT, cfg: QuantConfig) -> dict[str, QTensor]:
    """Every parameter through the quantiser of its tag, on the CPU."""
    return {name: QUANTISERS[p.quant](cfg).fit(p.detach().float().cpu()) for name, p in model.named_parameters()}


STORED_GROUPS = ("model", "eval")  # what an artifact must know to be scored again
STORED_FIELDS = ("vocab_size", "train_seq_len", "matrix_bits", "codec", "seed", "artifact_budget_bytes")


def export(cfg: Config, rt: Runtime, model: GPT, numerics: Numerics, data: Data) -> Path:
    """Quantise, pack and write the artifact (on rank 0); returns its path."""
    stored = cfg.values(*STORED_GROUPS) | {name: cfg.values()[name] for name in STORED_FIELDS}
    header = dict(config=stored, numerics=numerics._asdict(), tokenizer_sha256=data.tokenizer_sha256)
    with rt.phase("quantise"):
        tensors = quantise(model, cfg.quant)
    with rt.phase("serialise"):
        blob = pack_artifact(tensors, header, CODECS[cfg.quant.codec])
        path = rt.folder / "model.golf"
        write_atomic(path, lambda f: f.write(blob))
    rt.log(f"Serialized model: {sum(p.numel() * 4 for p in model.parameters())} bytes")
    rt.log(f"Code size: {code_bytes()} bytes")
    rt.log(f"Total submission size: {len(blob) + code_bytes()} bytes")
    rt.log(f"Serialized model int{cfg.quant.matrix_bits}+{cfg.quant.codec}: {len(blob)} bytes")
    rt.log(f"audit:artifact sha256:{hashlib.sha256(blob).hexdigest()} bytes:{len(blob)}")
    return path


def code_bytes() -> int:
    """Bytes of code that count against the budget: this file as it runs."""
    return SCRIPT.stat().st_size


def read_artifact(path: Path, rt: Runtime) -> tuple[dict[str, Any], dict[str, QTensor]]:
    """Read and verify an artifact on rank 0, hand it to all. Raises UserError naming the file."""
    def work():
        try:
            if path.stat().st_size > MAX_STREAM_BYTES:
                raise UserError(f"{path.stat().st_size} bytes is no artifact")
            blob = path.read_bytes()
            check_header(unpack_artifact(blob)[0])
            return blob
        except OSError as error:
            raise UserError(f"ARTIFACT={relative(path)}: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"ARTIFACT={relative(path)}: {error}") from None
    return unpack_artifact(rt.on_main(work))


def check_header(header: Any):
    """Raise UserError unless a header has what scoring needs, each of the right type."""
    want = dict(config=dict, numerics=dict, tokenizer_sha256=str)
    wrong = [key for key, kind in want.items() if not isinstance(header.get(key), kind)]
    if wrong:
        raise UserError(f"its header lacks {', '.join(wrong)}")
    if set(header["config"]) != set(cfg_fields()):
        odd = sorted(set(header["config"]) ^ set(cfg_fields()))
        raise UserError(f"its configuration does not fit this script: {', '.join(odd)}")
    n = header["numerics"]
    if set(n) != set(Numerics._fields) or n["mode"] not in KNOBS["numerics"][1].metadata["choices"] or \
            not isinstance(n["attention"], str) or n["attention"] not in ATTENTION or type(n["compile"]) is not bool:
        raise UserError(f"its numerics are unknown: {n}")


def artifact_config(env: dict[str, str], path: Path, header: dict[str, Any]) -> Config:
    """The configuration to score an artifact with. Raises UserError naming the file when its own part is bad."""
    load(env)  # what the user typed is judged first, so that what is left is the file's fault
    try:
        return load(env, header["config"])
    except UserError as error:
        raise UserError(f"ARTIFACT={relative(path)} does not fit: {'; '.join(map(str, error.args))}") from None


def cfg_fields() -> list[str]:
    """Names of the configuration that every artifact carries."""
    return [f.name for group in STORED_GROUPS for f in fields(GROUPS[group])] + list(STORED_FIELDS)


def build_from_artifact(cfg: Config, tensors: dict[str, QTensor], numerics: Numerics) -> GPT:
    """A model made of nothing but the file: configuration from its header, weights from its streams."""
    with torch.device("meta"):  # compare shapes before any memory is taken
        shapes = GPT(cfg.model, cfg.data.vocab_size, numerics)
    wanted = {name: tuple(p.shape) for name, p in shapes.named_parameters()}
    if wanted != {name: tuple(t.values.shape) for name, t in tensors.items()}:
        raise UserError("its tensors do not fit its own configuration")
    model = GPT(cfg.model, cfg.data.vocab_size, numerics)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name].dequant())
    return model.eval().requires_grad_(False)


def predict_model_bytes(model: GPT, cfg: QuantConfig) -> int:
    """Size of the artifact before training: the real quantisers and codec on Gaussian rows of the real lengths.

    Assumes entries of unit-free Gaussian shape; a SCALE_FLOOR makes trained size depend on their size as well.
    """
    samples: dict[tuple[str, int], tuple[float, int]] = {}
    total, generator = 400.0, torch.Generator().manual_seed(0)
    for p in model.parameters():
        columns = p.size(-1)
        if (p.quant, columns) not in samples:
            rows = max(1, min(2**19 // columns, 4096))
            t = QUANTISERS[p.quant](cfg).fit(torch.randn(rows, columns, generator=generator))
            packed = len(CODECS[cfg.codec].pack(t.values.numpy().tobytes()))
            samples[p.quant, columns] = packed / (rows * columns), 2 if t.scale is not None else 0
        per_weight, per_row = samples[p.quant, columns]
        total += p.numel() * per_weight + p.numel() / columns * per_row + 12
    return int(total)


# ---- 9 Evaluation: one loop for every strategy; a loss is banked before anything may adapt --------------------------
class Score(NamedTuple):
    """Sums over scored targets; the only place that knows the bits-per-byte formula."""
    nats: float
    tokens: int
    bytes: int
    coverage: str = ""  # sha256 of the per-target count of scores

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2) / self.bytes


class Windows(NamedTuple):
    """Fixed predictor over windows of `size` that advance by `stride` and score what no earlier window scored.

    Window 0 scores all its targets, later ones those past the first size - stride: every target once, each (after
    window 0) with at least that much context. stride == size gives disjoint chunks. Window starts are 0, S, 2S, ...
    while the start plus size - stride is before the end. Source: the competition's corrected sliding rule.
    """
    name: str
    size: int
    stride: int

    def items(self, targets: int) -> np.ndarray:
        """(n, 3) int64: window start, first scored target, count. Window 0 is split so that no count exceeds stride."""
        context = self.size - self.stride
        later = np.arange(self.stride, max(targets - context, self.stride), self.stride)
        first = np.arange(0, min(self.size, targets), self.stride)
        starts = np.concatenate([np.zeros_like(first), later])
        begin = np.concatenate([first, later + context])
        end = np.minimum(begin + self.stride, np.minimum(starts + self.size, targets))
        return np.stack([starts, begin, end - begin], 1)

    def adapt(self, items: np.ndarray, losses: np.ndarray):
        """A fixed predictor learns nothing from banked losses."""


STRATEGIES: dict[str, Callable[[Config], Windows]] = {
    "chunked": lambda c: Windows("chunked", c.data.train_seq_len, c.data.train_seq_len),
    "sliding": lambda c: Windows(f"sliding_{c.eval.eval_seq_len}_{c.eval.eval_stride}", c.eval.eval_seq_len,
                                 c.eval.eval_stride),
}


def window_batch(tokens: np.ndarray, items: np.ndarray, size: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of one batch: ids (B,size), targets and rows (B,stride). Padding is causal-safe: right, never scored."""
    offsets = np.minimum(items[:, :1] + np.arange(size), len(tokens) - 1)
    positions = np.minimum(items[:, 1:2] + np.arange(stride), np.maximum(items[:, 1:2] + items[:, 2:] - 1, 0))
    rows = positions - items[:, :1]
    return tuple(torch.from_numpy(a.astype(np.int64)) for a in (tokens[offsets], tokens[positions + 1], rows))


def score(nll: Callable, tokens: np.ndarray, target_bytes: np.ndarray, strategy: Windows, rt: Runtime,
          batch_tokens: int, observer: Callable | None = None) -> Score:
    """Score every target tokens[1:] exactly once and return the sums, equal on all ranks and for any number of them.

    nll(ids (B,W), targets (B,S), rows (B,S)) -> nats (B,S). `observer(items, losses)` sees each banked batch before
    the strategy may adapt. Raises RunFailed when a target is missed, repeated or its loss not finite.
    """
    targets = len(tokens) - 1
    bank, count = torch.zeros(targets), torch.zeros(targets, dtype=torch.int32)
    items, rows = strategy.items(targets), max(1, batch_tokens // strategy.size)
    mine = items[len(items) * rt.rank // rt.world:len(items) * (rt.rank + 1) // rt.world]
    with torch.no_grad(), rt.progress(len(mine), "score") as bar:
        for lo in range(0, len(mine), rows):
            batch = mine[lo:lo + rows]
            padded = np.concatenate([batch, np.repeat(batch[-1:], rows - len(batch), 0)])  # one shape, one graph
            inputs = window_batch(tokens, padded, strategy.size, strategy.stride)
            losses = nll(*(t.to(rt.device, non_blocking=True) for t in inputs)).float().cpu()
            for (_, first, n), row in zip(batch.tolist(), losses):
                bank[first:first + n] = row[:n]
                count[first:first + n] += 1
            if observer:
                observer(batch, losses)
            strategy.adapt(batch, losses)
            if bar:
                bar.update(len(batch))
    rt.all_reduce(bank)  # disjoint shares: the sum is exact
    rt.all_reduce(count)
    if (count != 1).any() or not bank.isfinite().all():
        raise RunFailed(f"{int((count != 1).sum())} targets not scored exactly once, "
                           f"{int((~bank.isfinite()).sum())} losses not finite")
    coverage = hashlib.sha256(count.numpy().astype("<i4").tobytes()).hexdigest()[:16]
    return Score(float(bank.double().sum()), targets, int(target_bytes.sum(dtype=np.int64)), coverage)


def score_model(cfg: Config, rt: Runtime, model: GPT, numerics: Numerics, data: Data, kind: str) -> Score:
    """Score a model with a named strategy and log the audit line."""
    plan, strategy = schedule(cfg.model), STRATEGIES[kind](cfg)
    nll = compiled(model.nll, numerics)
    result = score(lambda ids, targets, rows: nll(ids, targets, rows, plan), data.val, data.val_bytes, strategy, rt,
                   cfg.eval.eval_batch_tokens)
    rt.log(f"score:{strategy.name} val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f} tokens:{result.tokens} "
           f"bytes:{result.bytes} scored_once:1 coverage:{result.coverage}")
    return result


# ---- 10 Training ----------------------------------------------------------------------------------------------------
class Clock:
    """Training seconds on a monotonic clock; validation and checkpoints stop it."""

    def __init__(self, rt: Runtime):
        self.rt, self.total, self.since = rt, 0.0, None

    def read(self) -> float:
        return self.total + (time.monotonic() - self.since if self.since is not None else 0.0)

    def start(self):
        self.since = time.monotonic()

    def stop(self):
        """Stand still once the device has finished."""
        self.rt.synchronize()
        self.total, self.since = self.read(), None

    @contextlib.contextmanager
    def paused(self):
        """Do not count the enclosed time; a clock that stands still stays so."""
        running = self.since is not None
        self.stop()
        yield
        if running:
            self.start()


def load_checkpoint(cfg: Config, rt: Runtime) -> dict[str, Any] | None:
    """The run folder's checkpoint when RESUME=auto and there is one. Tensors and plain values only, never code."""
    path = rt.folder / "checkpoint.pt"
    blob = rt.on_main(lambda: path.read_bytes() if cfg.run.resume == "auto" and path.exists() else None)
    if blob is None:
        return None
    try:
        saved = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if set(saved) != {"state", "identity", "numerics"}:
            raise ValueError("foreign")
        return saved
    except Exception as error:
        raise UserError(f"{relative(path)}: not a readable checkpoint ({type(error).__name__}); move it away to start "
                        "over") from None


class Trainer:
    """Owns what changes during training: weights, optimisers, averager, data position, clock."""

    def __init__(self, cfg: Config, rt: Runtime, data: Data, model: GPT, numerics: Numerics):
        self.cfg, self.rt, self.data, self.model, self.numerics = cfg, rt, data, model, numerics
        self.plan, self.loss = schedule(cfg.model), compiled(model.forward, numerics)
        self.qat = attach_qat(model, cfg.quant)
        self.flat = FlatParameters(model)
        self.muon = Muon(self.flat, cfg.optim, rt, torch.bfloat16 if numerics.mode == "bf16" else torch.float32)
        self.adam = adamw(model, cfg.optim)
        self.averager = AVERAGERS[cfg.optim.averaging](self.flat.weights, cfg.optim)
        self.loader = LOADERS[cfg.data.loader](data.train, cfg)
        self.clock, self.step_number = Clock(rt), 0
        self.recent: list[float] = []  # seconds of the last 50 steps; the first, slow ones are not among them
        self.pending: tuple[int, Tensor] | None = None  # loss of the previous step, not yet known to be finite
        self.last_checkpoint = time.monotonic()

    # One step.
    def progress(self, elapsed: float) -> Progress:
        """Where the run stands, from rank 0's clock and the step number alone."""
        o, step = self.cfg.optim, self.step_number
        if not o.max_wallclock_seconds:
            return Progress(step, step / o.iterations, o.iterations - step, 1.0)
        budget = o.max_wallclock_seconds - o.reserve_seconds
        cost = statistics.median(self.recent) if len(self.recent) >= 5 else 0.0
        left = max(0.0, min(budget - elapsed, (o.iterations - step) * cost if cost else budget))
        return Progress(step, min(1.0, max(elapsed / budget, step / o.iterations)), left, cost)

    def micro_batches(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, targets) of one fixed shape; missing rows are padded with targets that give no loss."""
        size = min(-(-self.loader.rows // self.rt.world),
                   max(1, self.cfg.system.micro_batch_tokens // self.cfg.data.train_seq_len))
        for lo in range(0, len(rows), size):
            part = torch.from_numpy(rows[lo:lo + size].astype(np.int64))
            ids = torch.zeros(size, part.size(1) - 1, dtype=torch.int64)
            targets = torch.full_like(ids, -100)
            ids[:len(part)], targets[:len(part)] = part[:, :-1], part[:, 1:]
            yield ids.to(self.rt.device, non_blocking=True), targets.to(self.rt.device, non_blocking=True)

    def step(self, rows: np.ndarray, ramps: dict[str, float]) -> Tensor:
        """One optimiser update from this rank's rows; returns the mean loss of the whole batch (0-D, on the device)."""
        for site in self.qat:
            site.on.fill_(ramps["qat"])
        self.flat.gradients.zero_()
        share = 1 / (self.loader.rows * self.cfg.data.train_seq_len)
        for ids, targets in self.micro_batches(rows):
            loss = self.loss(ids, targets, self.plan) * share
            loss.backward()
            self.flat.gradients[-1] += loss.detach()
        self.rt.all_reduce(self.flat.gradients)
        self.flat.clip(self.cfg.optim.grad_clip_norm)
        self.muon.step(ramps["lr"], ramps["momentum"])
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * ramps["lr"]
        self.adam.step()
        self.averager.update()
        return self.flat.gradients[-1].clone()

    def prewarm(self):
        """Run whole steps on synthetic tokens so that kernels compile off the clock, then undo everything."""
        steps = self.cfg.optim.warmup_steps
        before = copy.deepcopy(self.state())
        generator = np.random.default_rng(0)
        mine = len(range(self.rt.rank, self.loader.rows, self.rt.world))
        for i in range(steps):
            fake = generator.integers(self.cfg.data.vocab_size, size=(mine, self.cfg.data.train_seq_len + 1))
            self.step(fake.astype(np.uint16), dict(lr=1.0, momentum=0.0, qat=1.0))
            self.rt.log(f"warmup_step:{i + 1}/{steps}", echo=False)
        self.restore(before)

    # Checkpoints.
    def state(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs; tensors are live, not copies."""
        return dict(weights=self.flat.weights, muon=self.muon.state_dict(), adam=self.adam.state_dict(),
                    averager=self.averager.state_dict(), loader=self.loader.state_dict(), step=self.step_number,
                    seconds=self.clock.read(), recent=list(self.recent), rng=torch.get_rng_state())

    def restore(self, state: dict[str, Any]):
        """Inverse of state(); also accepts the live state's copies."""
        self.flat.weights.copy_(state["weights"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.averager.load_state_dict(state["averager"])
        self.loader.load_state_dict(state["loader"])
        self.step_number, self.recent, self.clock.total = state["step"], list(state["recent"]), state["seconds"]
        torch.set_rng_state(state["rng"])

    def identity(self) -> dict[str, Any]:
        """The configuration that a checkpoint must agree with."""
        free = ("data_path", "tokenizer_path", "iterations", "max_wallclock_seconds", "micro_batch_tokens",
                "eval_batch_tokens")
        identity = self.cfg.values("data", "model", "optim", "quant") | dict(seed=self.cfg.run.seed)
        return {k: v for k, v in identity.items() if k not in free}

    def save(self):
        """Write the checkpoint atomically, off the training clock (rank 0)."""
        self.check_finite()
        with self.clock.paused():
            if not self.flat.weights.isfinite().all():
                raise RunFailed(self.not_finite("weights", self.step_number))
            if self.rt.main:
                content = dict(state=self.state(), identity=self.identity(), numerics=self.numerics._asdict())
                try:
                    write_atomic(self.rt.folder / "checkpoint.pt", lambda f: torch.save(content, f))
                    self.rt.metric("checkpoint", step=self.step_number)
                except OSError as error:  # a full disk must not end a run that can still finish
                    self.rt.log(f"warning: checkpoint not written ({error.strerror})")
            self.last_checkpoint = time.monotonic()

    def resume(self, saved: dict[str, Any]):
        """Continue from a loaded checkpoint. Raises UserError when it belongs to another configuration."""
        mine, theirs = self.identity(), saved["identity"]
        differ = [f"{k.upper()}: checkpoint {theirs.get(k)}, now {mine[k]}" for k in mine if mine[k] != theirs.get(k)]
        if differ:
            raise UserError("RESUME=auto: the checkpoint has another configuration; " + "; ".join(differ))
        try:
            self.restore(saved["state"])
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"RESUME=auto: the checkpoint does not fit this script ({type(error).__name__}); move it "
                            "away to start over") from None
        self.rt.log(f"resumed:step {self.step_number} train_time:{self.clock.read() * 1e3:.0f}ms")

    # The loop.
    def check_finite(self):
        """Stop the run when the previous step's loss was not finite (read one step late, so the device stays busy)."""
        if self.pending is not None and not math.isfinite(self.pending[1].item()):
            raise RunFailed(self.not_finite("loss", self.pending[0]))
        self.pending = None

    def not_finite(self, what: str, step: int) -> str:
        """What to tell the user of a diverged run."""
        saved = self.rt.folder / "checkpoint.pt"
        hint = f"last good checkpoint: {relative(saved)}" if saved.exists() else "no checkpoint was written yet"
        return (f"{what} not finite at step {step} ({hint}); try a lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR, "
                "GRAD_CLIP_NORM=0.3, or NUMERICS=fp32")

    def report(self, loss: Tensor, p: Progress, ramps: dict[str, float]):
        """The competition's training line with speed and time left: the first steps, then every TRAIN_LOG_EVERY."""
        step = self.step_number
        if step <= 10 or step % self.cfg.run.train_log_every == 0:
            loss_now, elapsed = loss.item(), self.clock.read()
            average = elapsed * 1e3 / step
            self.rt.metric("train", step=step, loss=loss_now, seconds=elapsed, **ramps)
            speed = step * self.cfg.data.train_batch_tokens / max(elapsed, 1e-9)
            left = p.remaining * (1 if self.cfg.optim.max_wallclock_seconds else average / 1e3)
            self.rt.log(f"step:{step}/{self.cfg.optim.iterations} train_loss:{loss_now:.4f} "
                        f"train_time:{elapsed * 1e3:.0f}ms step_avg:{average:.2f}ms tok/s:{speed:.0f} left:{left:.0f}s")

    def validate(self, elapsed: float):
        """The competition's validation line: chunked score of the live weights without fake quantisation."""
        for site in self.qat:
            site.on.zero_()
        numerics = self.numerics._replace(compile=self.numerics.compile and self.rt.device.type == "cuda")
        result = score_model(self.cfg, self.rt, self.model, numerics, self.data, "chunked")
        step = self.step_number
        self.rt.log(f"step:{step}/{self.cfg.optim.iterations} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} "
                    f"train_time:{elapsed * 1e3:.0f}ms step_avg:{elapsed * 1e3 / max(step, 1):.2f}ms")
        self.rt.metric("val", step=step, loss=result.loss, bpb=result.bpb, seconds=elapsed)

    def stop_reason(self, elapsed: float) -> str:
        """Why training ends before another step as long as the longest of the last 20; empty when it goes on."""
        o = self.cfg.optim
        if self.step_number >= o.iterations:
            return "iterations"
        end = elapsed + max(self.recent[-20:], default=0.0)
        return "wallclock_cap" if o.max_wallclock_seconds and end > o.max_wallclock_seconds - o.reserve_seconds else ""

    def run(self):
        """Train until the clock or ITERATIONS says stop, the same step on every rank, then average the weights."""
        elapsed, due, interrupted = self.rt.numbers_from_main(self.clock.read(), 0, 0)
        every = self.cfg.run.val_loss_every
        self.clock.start()
        with self.rt.progress(1.0, "train") as bar, self.rt.catch_signals():
            while not self.stop_reason(elapsed):
                begin, p = elapsed, self.progress(elapsed)
                ramps = {name: ramp(p, self.cfg) for name, ramp in RAMPS.items()}
                loss = self.step(self.loader.next(self.rt.rank, self.rt.world), ramps)
                self.check_finite()
                self.step_number += 1
                self.pending = (self.step_number, loss)
                self.report(loss, p, ramps)
                waited = time.monotonic() - self.last_checkpoint
                elapsed, due, interrupted = self.rt.numbers_from_main(
                    self.clock.read(), waited >= (self.cfg.run.checkpoint_every or math.inf), self.rt.interrupted)
                if self.step_number > 3:
                    self.recent = [*self.recent[-49:], elapsed - begin]
                if bar:
                    bar.update(max(0.0, round(p.frac - bar.n, 3)))
                if due or interrupted:
                    self.save()
                if interrupted:
                    raise KeyboardInterrupt
                if every and self.step_number % every == 0:
                    with self.clock.paused():
                        self.validate(elapsed)
            self.finish(elapsed, self.stop_reason(elapsed))

    def finish(self, elapsed: float, reason: str):
        """Log why training ended, keep a last checkpoint, put the averaged weights in place and validate them."""
        self.check_finite()
        self.clock.stop()
        if reason == "wallclock_cap":
            self.rt.log(f"stopping_early: wallclock_cap train_time:{elapsed * 1e3:.0f}ms "
                        f"step:{self.step_number}/{self.cfg.optim.iterations}")
        if self.cfg.run.checkpoint_every:
            self.save()
        self.averager.apply()


# ---- 11 main: the story in reading order ----------------------------------------------------------------------------
def parameter_report(model: GPT, cfg: Config, rt: Runtime):
    """Totals that identify the architecture: parameters by role, slots, FLOPs per token."""
    roles: dict[str, int] = {}
    for p in model.parameters():
        roles[p.opt] = roles.get(p.opt, 0) + p.numel()
    plan = schedule(cfg.model)
    rt.log(f"model_params:{sum(roles.values())}")
    rt.log("parameters " + " ".join(f"{role}:{n}" for role, n in roles.items()))
    rt.log("slots:" + " ".join(f"{s.block}" + "".join(f"+{source}" for _, source in s.skips) for s in plan))
    rt.log(f"flops_per_token:{flops_per_token(model, plan, cfg.data.train_seq_len):.4g}")


def plan_only(cfg: Config, rt: Runtime):
    """RUN_MODE=plan: what a run would be, without data or training."""
    log_header(cfg, rt)
    torch.manual_seed(cfg.run.seed)
    model = GPT(cfg.model, cfg.data.vocab_size, Numerics())
    parameter_report(model, cfg, rt)
    predicted, budget = predict_model_bytes(model, cfg.quant), cfg.quant.artifact_budget_bytes
    rt.log(f"predicted_bytes model:{predicted} code:{code_bytes()} total:{predicted + code_bytes()} budget:{budget} "
           f"fits:{int(predicted + code_bytes() <= budget)}")


def artifact_numerics(cfg: Config, rt: Runtime, header: dict[str, Any]) -> Numerics:
    """The arithmetic that the artifact was scored with, unless the environment or this machine says otherwise."""
    if any(cfg.origins[name] == "environment" for name in ("numerics", "attention", "compile")):
        return rt.on_main(lambda: choose_numerics(cfg, rt))
    wanted = Numerics(**header["numerics"])
    return wanted._replace(compile=rt.on_main(lambda: wanted.compile and can_compile()))


def official_score(cfg: Config, rt: Runtime, path: Path, data: Data, env: dict[str, str]) -> tuple[Config, Score]:
    """Score the model that the file at `path` holds; nothing of a live model is used. Logs the one official line."""
    with rt.phase("load"):
        header, tensors = read_artifact(path, rt)
        cfg = artifact_config(env, path, header)
        if header["tokenizer_sha256"] != data.tokenizer_sha256:
            raise UserError(f"ARTIFACT={relative(path)}: trained with another tokenizer than TOKENIZER_PATH")
        numerics = artifact_numerics(cfg, rt, header)
        apply_numerics(numerics, rt)
        try:
            model = build_from_artifact(cfg, tensors, numerics).to(rt.device)
        except UserError as error:
            raise UserError(f"ARTIFACT={relative(path)}: {error}") from None
    with rt.phase("eval"):
        begin = time.monotonic()
        result = score_model(cfg, rt, model, numerics, data, cfg.eval.eval)
        milliseconds = (time.monotonic() - begin) * 1e3
    label = "roundtrip" if cfg.eval.eval == "chunked" else "sliding_window"
    name = f"final_int{cfg.quant.matrix_bits}_{cfg.quant.codec}_{label}"
    rt.log(f"{name} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} eval_time:{milliseconds:.0f}ms")
    rt.log(f"{name}_exact val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f}")
    return cfg, result


def summary(cfg: Config, rt: Runtime, path: Path, data: Data, result: Score):
    """The fixed block that ends a run, then the official line."""
    model_bytes, budget = path.stat().st_size, cfg.quant.artifact_budget_bytes
    total = model_bytes + code_bytes()
    room = f"{budget - total:,} bytes free" if total <= budget else f"OVER BUDGET by {total - budget:,} bytes"
    rt.log("-" * 100)
    rt.log(f"official score   {result.bpb:.4f} bits per byte   ({result.loss:.4f} nats per token, {result.tokens:,} "
           f"tokens, {result.bytes:,} bytes, {STRATEGIES[cfg.eval.eval](cfg).name})")
    rt.log(f"artifact         {total:,} bytes = code {code_bytes():,} + model {model_bytes:,}   ({room} of {budget:,})")
    spent: dict[str, float] = {}
    for name, begin, end in rt.phases:
        spent[name] = spent.get(name, 0.0) + end - begin
    rt.log("time             " + "  ".join(f"{name} {seconds:.1f}s" for name, seconds in spent.items()))
    if reference := data.manifest.get("reference_bpb"):
        rt.log("for orientation  " + "  ".join(f"{name} {value:.3f}" for name, value in reference.items())
               + "   (compressors primed with the training text, same validation text)")
    if not data.manifest.get("comparable", True):
        rt.log(f"note             {data.manifest['note']}")
    rt.log("-" * 100)
    rt.log(f"final:official variant:{STRATEGIES[cfg.eval.eval](cfg).name} val_loss:{result.loss:.8f} "
           f"val_bpb:{result.bpb:.8f} tokens:{result.tokens} bytes:{result.bytes}")
    rt.metric("final", loss=result.loss, bpb=result.bpb, tokens=result.tokens, bytes=result.bytes,
              model_bytes=model_bytes, code_bytes=code_bytes(), phases=spent)


def peak_memory(rt: Runtime) -> str:
    """The competition's memory line; on a CPU the resident set of the process."""
    if rt.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB"


def train_and_export(cfg: Config, rt: Runtime, data: Data) -> Path:
    """Build, prewarm (or resume), train, validate, quantise, pack; returns the artifact's path."""
    saved = load_checkpoint(cfg, rt)
    with rt.phase("calibrate"):
        numerics = Numerics(**saved["numerics"]) if saved else rt.on_main(lambda: choose_numerics(cfg, rt))
        apply_numerics(numerics, rt)
    torch.manual_seed(cfg.run.seed)
    model = GPT(cfg.model, cfg.data.vocab_size, numerics).to(rt.device)
    parameter_report(model, cfg, rt)
    trainer = Trainer(cfg, rt, data, model, numerics)
    with rt.phase("prewarm"):
        trainer.prewarm()
    if saved:
        trainer.resume(saved)
    with rt.phase("train"):
        trainer.run()
    with rt.phase("validate"):
        trainer.validate(trainer.clock.read())
    rt.log(peak_memory(rt))
    return rt.on_main(lambda: export(cfg, rt, model, numerics, data))


def run(cfg: Config, rt: Runtime, env: dict[str, str]):
    """One whole run in the mode that RUN_MODE names."""
    if cfg.run.run_mode == "plan":
        return plan_only(cfg, rt)
    if cfg.run.run_mode == "eval":
        path = Path(cfg.run.artifact)
        header, _ = read_artifact(path, rt)  # fail on a bad file before anything else
        cfg = artifact_config(env, path, header)
        log_header(cfg, rt)
        data = open_data(cfg, rt)
    else:
        if not rt.open_run(cfg):
            return rt.log(f"{relative(rt.folder)} is complete; see its log.txt")
        log_header(cfg, rt)
        with rt.phase("data"):
            data = open_data(cfg, rt)
        path = train_and_export(cfg, rt, data)
    scored, result = official_score(cfg, rt, path, data, env)
    summary(scored, rt, path, data, result)


def main(argv: list[str], env: dict[str, str]) -> int:
    """Entry point; returns the exit code: 0 done, 1 a run that failed, 2 a mistake in the input, 130 interrupted."""
    if argv and argv[0] in ("-h", "--help", "--help=md"):
        print(help_text(markdown=argv[0] == "--help=md"))
        return 0
    rt, main_rank = None, env.get("RANK", "0") == "0"
    try:
        if argv:
            raise UserError(f"{argv[0]}: takes no arguments but --help; knobs are environment variables")
        cfg = load(env)
        rt = Runtime(cfg, env)
        run(cfg, rt, env)
        return 0
    except (UserError, RunFailed) as error:
        for message in error.args if main_rank or isinstance(error, OneRankFailed) else ():
            print("error: " + "".join(c if c.isprintable() else "?" for c in str(message))[:1000], file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:  # disk full, file gone: the machine's fault, not a bug
        print(f"error: {relative(error.filename or '.')}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if rt and rt.main:
            print(f"interrupted; continue with RUN_ID={rt.folder.name} RESUME=auto" if rt.folder else "interrupted",
                  file=sys.stderr)
        return 130
    finally:
        if rt:
            rt.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], environment()))

#!/usr/bin/env python3
"""A stand-in for train_gpt.py: same knob tables, same log lines, a planted optimum, milliseconds
instead of minutes.

Fourteen knobs of five skills, one of which does nothing; the best values lie away from the
defaults; two knobs of different skills interact; the larger model only fits the budget with fewer
bits. FAKE_* variables make it misbehave.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path


def knob(default, lo=None, hi=None, choices=(), needs=""):
    return field(
        default=default,
        metadata=dict(doc="planted", lo=lo, hi=hi, choices=tuple(choices), needs=needs),
    )


@dataclass(frozen=True)
class RunConfig:
    run_mode: str = knob("train", choices=("train", "plan", "eval"))
    artifact: str = knob("")
    seed: int = knob(1337, 0, 2**31 - 1)
    runs_dir: str = knob("runs")
    run_id: str = knob("auto")


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = knob(9, 1, 64)
    model_dim: int = knob(512, 16, 4096)
    mlp_mult: float = knob(2.0, 0.25, 16)
    inert_a: float = knob(0.5, 0, 1)
    inert_b: float = knob(0.5, 0, 1)
    inert_c: str = knob("one", choices=("one", "two", "three"))


@dataclass(frozen=True)
class OptimConfig:
    iterations: int = knob(100, 1, 10**8)
    matrix_lr: float = knob(0.04, 0, 1)
    scalar_lr: float = knob(0.04, 0, 1)
    muon_momentum: float = knob(0.95, 0, 0.9999)
    beta2: float = knob(0.95, 0, 0.99999)
    warmdown_iters: int = knob(30, 0, 10**7)
    min_lr: float = knob(0.0, 0, 1)


@dataclass(frozen=True)
class QuantConfig:
    matrix_bits: int = knob(8, 2, 16, choices=(4, 5, 6, 7, 8, 16))
    clip_sigmas: float = knob(12.0, 0.5, 100)


GROUPS = dict(run=RunConfig, model=ModelConfig, optim=OptimConfig, quant=QuantConfig)
KNOBS = {f.name: (group, f) for group, cls in GROUPS.items() for f in fields(cls)}
BUDGET, DEFAULT, BEST = 16_000_000, 1.2059, 1.1703
SKILLS = {
    "architecture": dict(
        NUM_LAYERS=dict(low=4, high=16),
        MODEL_DIM=dict(choices=[384, 448, 512, 576, 640]),
        MLP_MULT=dict(low=1, high=5),
    ),
    "optimizer": dict(
        MATRIX_LR=dict(low=0.005, high=0.2, log=True),
        SCALAR_LR=dict(low=0.005, high=0.2, log=True),
        MUON_MOMENTUM=dict(low=0.8, high=0.995),
        BETA2=dict(low=0.9, high=0.999),
    ),
    "schedule": dict(
        WARMDOWN_ITERS={"as": "fraction_of_steps", "low": 0.05, "high": 0.9},
        MIN_LR=dict(low=0.0, high=0.5),
    ),
    "compression": dict(
        MATRIX_BITS=dict(choices=[4, 5, 6, 7, 8]), CLIP_SIGMAS=dict(low=4.0, high=30.0, log=True)
    ),
    "inert": dict(
        INERT_A=dict(low=0, high=1),
        INERT_B=dict(low=0, high=1),
        INERT_C=dict(choices=["one", "two", "three"]),
    ),
}


class UserError(ValueError):
    pass


class Config(dict):
    def values(self):
        return dict(self)


def load(env):
    values, errors = {}, []
    for name, (_, f) in KNOBS.items():
        text = env.get(name.upper())
        try:
            values[name] = f.default if text is None else type(f.default)(text)
        except ValueError:
            errors.append(f"{name.upper()}={text!r}: want a number")
    if values.get("model_dim", 64) % 64:
        errors.append(f"MODEL_DIM={values['model_dim']} is not divisible by 64")
    if errors:
        raise UserError("\n".join(errors))
    return Config(values)


def model_bytes(v) -> int:
    weights = v["num_layers"] * v["model_dim"] ** 2 * (3.0 + 2 * v["mlp_mult"])
    return int((weights * v["matrix_bits"] / 8 + v["model_dim"] * 1024) * 0.85)


def true_score(v) -> float:
    """Noise-free bits per byte of a configuration; DEFAULT at the defaults, BEST at the best that
    fits."""
    capacity = math.log(v["num_layers"] * v["model_dim"] ** 2 * (3.0 + 2 * v["mlp_mult"]))
    depth = (
        0.004 * math.log(v["num_layers"] / 11) ** 2 / 0.1
        + 0.003 * math.log(v["mlp_mult"] / 3.0) ** 2 / 0.3
    )
    size = 0.030 * max(-0.9, math.log(9 * 512**2 * 7) - capacity) + depth
    lr = math.log(v["matrix_lr"] / 0.022)
    momentum = (v["muon_momentum"] - 0.98) / 0.03
    optimizer = (
        0.007 * lr**2 / 0.8
        + 0.004 * momentum**2 / 2
        + 0.002 * math.log(v["scalar_lr"] / 0.02) ** 2
        + 0.0015 * ((v["beta2"] - 0.97) / 0.02) ** 2 / 2
        + 0.0015 * lr * momentum
    )
    warm = v["warmdown_iters"] / v["iterations"]
    schedule = 0.006 * ((warm - 0.6) / 0.3) ** 2 + 0.002 * ((v["min_lr"] - 0.05) / 0.2) ** 2
    quant = {4: 0.030, 5: 0.010, 6: 0.0010, 7: 0.0003, 8: 0.0}[min(8, v["matrix_bits"])]
    quant += 0.004 * math.log(v["clip_sigmas"] / 8.0) ** 2 + 0.001 * momentum * math.log(
        v["clip_sigmas"] / 8.0
    )
    return SCALE * (size + optimizer + schedule + quant) + OFFSET


# Set so that the defaults score DEFAULT and the best feasible configuration BEST
# (test_forge_propose checks both).
SCALE, OFFSET = 1.4042784275, 1.1840306


def rungs_noise(rung: str, seed: int, v) -> float:
    mix = hashlib.sha256(json.dumps([rung, seed, sorted(v.items())], default=str).encode()).digest()
    return random.Random(mix).gauss(0, 1)


def noisy_score(v, sigma: float) -> float:
    """What a run with this seed scores; knobs that a patch adds do not change the noise."""
    searched = {
        k: x
        for k, x in v.items()
        if k in KNOBS and KNOBS[k][0] != "run" and not k.startswith("patch_")
    }
    return true_score(v) + sigma * rungs_noise("fake", v["seed"], searched)


def log_lines(v, score: float, steps: int = 10):
    """What the real script prints, in its order."""
    total = model_bytes(v) + 1000
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    yield f"audit:code sha256:{code} wrapped:0 bytes:1000"
    yield (
        "audit:env python:3 torch:fake cuda:None gpu:none host_hash:000000000000 world_size:1 "
        "threads:1"
    )
    yield (
        "audit:data manifest:fake train_shards:1 val_tokens:1000 val_bytes:2500 "
        "tokenizer_sha256:fake"
    )
    yield f"model_params:{model_bytes(v)}"
    for step in range(1, steps + 1):
        yield (
            f"step:{step}/{steps} train_loss:{score * 1.7 + 3 / step:.4f} "
            f"train_time:{step * 10}ms step_avg:10.00ms tok/s:1 left:0s"
        )
    yield (
        f"step:{steps}/{steps} val_loss:{score * 1.73:.4f} val_bpb:{score:.4f} "
        f"train_time:{steps * 10}ms step_avg:1ms"
    )
    yield "Code size: 1000 bytes"
    yield f"Total submission size: {total} bytes"
    loss = score * 2500 / 1000 * math.log(2)
    yield f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{score:.8f}"
    yield (
        f"final:official variant:chunked val_loss:{loss:.8f} val_bpb:{score:.8f} tokens:1000 "
        "bytes:2500"
    )


@contextlib.contextmanager
def meet(folder: Path):
    """Note who else is on this process's devices while it runs; a file is left by whoever is killed
    and does not count."""
    for device in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        mine = folder / f"{device}.{os.getpid()}"
        mine.write_text("", "utf-8")
        pids = [int(p.suffix[1:]) for p in folder.glob(f"{device}.*") if p.suffix[1:].isdigit()]
        others = [p for p in pids if p != os.getpid() and Path(f"/proc/{p}/cwd").exists()]
        with open(folder / "met.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(device=device, others=others)) + "\n")
    yield
    mine.unlink()


def main() -> int:
    env = dict(os.environ)
    try:
        v = load(env)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = model_bytes(v) + 1000
    if v["run_mode"] == "plan":
        print(
            f"model_params:{model_bytes(v)}\nplan:0 flops_per_token:1e6 slots:0 skips:\n"
            f"predicted_bytes model:{model_bytes(v)} code:1000 total:{total} "
            f"budget:{BUDGET} fits:{int(total <= BUDGET)}"
        )
        return 0
    if v["run_mode"] == "eval":
        stored = json.loads(Path(v["artifact"]).read_bytes().partition(b"\n")[0])
        v |= {k: x for k, x in stored.items() if k in v and KNOBS[k][0] != "run"}
        v["seed"] = stored["seed"]
        print(list(log_lines(v, noisy_score(v, stored["noise"])))[-1])
        return 0
    tricks = (
        json.loads((Path(__file__).parent / "tricks.json").read_text())
        if (Path(__file__).parent / "tricks.json").exists()
        else {}
    )
    trick = tricks.get("by_seed", {}).get(str(v["seed"]), tricks.get("always", ""))
    folder = Path(v["runs_dir"]) / v["run_id"]
    folder.mkdir(parents=True, exist_ok=True)
    score = noisy_score(v, tricks.get("noise", 0.001))
    lines = list(log_lines(v, score, tricks.get("steps", 10)))
    if trick == "stubborn":  # ignores SIGTERM, and so do a grandchild and one that left the session
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
            time.sleep(300)
        print("step:1/10 train_loss:5.0 train_time:10ms", flush=True)
        time.sleep(300)
    pause = tricks.get("pause", 0.0)
    if isinstance(pause, list):  # drawn by this process
        pause = random.uniform(*pause)
    met = meet(Path(tricks["meeting"])) if "meeting" in tricks else contextlib.nullcontext()
    with met:
        for line in lines[:-1]:
            print(line, flush=True)
            time.sleep(pause)
    if trick == "crash":
        raise RuntimeError("planted crash")
    if trick == "nan":
        print("step:10/10 train_loss:nan train_time:100ms", flush=True)
        time.sleep(60)
    if trick == "silent":
        time.sleep(300)
    head = json.dumps(v | dict(noise=tricks.get("noise", 0.001))).encode() + b"\n"
    (folder / "model.golf").write_bytes(head + b"\0" * (model_bytes(v) - len(head)))
    if trick == "fake_line":
        print("final:official variant:chunked val_loss:0.1 val_bpb:0.1 tokens:1000 bytes:2500")
    print(
        lines[-1].replace("tokens:1000", "tokens:900") if trick == "short_text" else lines[-1],
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

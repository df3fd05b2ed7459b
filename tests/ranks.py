"""What comes out the same on any number of ranks: steps of the optimiser, scores of all strategies.

Started by torchrun as a script, it writes what it found: ranks.py steps|scores FILE.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import clean_env
from helpers import config, flattened, random_model
from torch import nn

import train_gpt as tg

# ---- Steps of the optimiser ----
SHAPES = [(24, 24)] + [(48, 16)] * 3 + [(16, 48)] * 2  # square, tall, wide; the last two stacked
RANK_KNOBS = {
    "muon": dict(grad_clip_norm=0.5),
    "normuon": dict(muon_decay="cautious"),
    "turbo_muon_plus": dict(numerics="bf16"),
    "mousse": dict(muon_refresh=2),
    "rmnp": dict(ademamix_alpha=2),
}
for kind, knobs in RANK_KNOBS.items():
    knobs["muon"] = kind


def tagged(shapes=SHAPES, seed: int = 0) -> nn.Module:
    """A module of matrices that Muon owns and one vector that it does not."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.matrices = nn.ParameterList(
        tg.param(shape, tg.normal(1.0), "matrix", "matrix") for shape in shapes
    )
    module.vector = tg.param((5,), tg.normal(1.0), "scalar", "keep")
    return module


def ramps(lr: float = 1.0, momentum: float = 0.9, **more) -> dict[str, float]:
    """What moves in these tests, nothing else does."""
    return tg.full_speed() | dict(plan=0, lr=lr, momentum=momentum) | more


def four_steps(rt: tg.Runtime, **knobs) -> dict:
    """Weights, optimiser state and this rank's shares after four steps on the ranks of `rt`."""
    cfg = config(scalar_lr=0.125, **knobs)
    dtype = torch.bfloat16 if knobs.get("numerics") == "bf16" else torch.float32
    module = tagged()
    flat, optimiser = flattened(module, cfg, rt, dtype)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in module.parameters():  # whole numbers over six: their sums are exact in any order
            parts = torch.randint(-64, 64, (6, *p.shape), generator=generator).float() / 64
            p.grad.copy_(parts[rt.rank :: rt.world].sum(0))
        flat.rest[-1] = rt.rank + 1
        optimiser.step(ramps(0.5, 0.9, alpha=1.0, beta3=0.9))
        if step == 1:  # into a file and back, as at a resumption by any number of ranks
            optimiser.load_state_dict(optimiser.state_dict())
    assert flat.rest[-1] == rt.world * (rt.world + 1) / 2, "the loss travels with the gradients"
    shares = [len(bank.state["momentum"]) for bank in flat.banks if "momentum" in bank.state]
    return dict(weights=flat.weights, state=optimiser.state_dict(), shares=shares)


def all_steps(rt: tg.Runtime) -> dict[str, dict]:
    """four_steps() of every entry of RANK_KNOBS."""
    return {name: four_steps(rt, **knobs) for name, knobs in RANK_KNOBS.items()}


# ---- Scores ----
VOCAB = 61
SMALL = dict(VOCAB_SIZE=VOCAB, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, EVAL_BATCH_TOKENS=256)
LORA = SMALL | dict(
    EVAL="doc",
    EVAL_SEQ_LEN=24,
    EVAL_STRIDE=8,
    TTT="lora",
    TTT_LORA_CHUNK=7,
    TTT_LORA_RANK=3,
    TTT_LORA_ALPHA=6,
    TTT_LORA_DOCS=3,
    TTT_LORA_LR=0.02,
    TTT_LORA_WD=0.1,
)
JOBS = {
    "chunked": SMALL,
    "sliding": SMALL | dict(EVAL="sliding", EVAL_SEQ_LEN=32, EVAL_STRIDE=8),
    "doc": SMALL | dict(EVAL="doc", EVAL_SEQ_LEN=32, EVAL_STRIDE=8),
    "sgd": SMALL
    | dict(
        EVAL="sliding", EVAL_SEQ_LEN=32, EVAL_STRIDE=8, TTT="sgd", TTT_CHUNK_TOKENS=128, TTT_LR=0.1
    ),
    "phased, warm": LORA
    | dict(TTT="phased", TTT_WARM_A=1, TTT_PHASES=1, TTT_PHASE_DOCS=4, TTT_LR=0.05),
}


def documents(length: int = 260, seed: int = 3) -> np.ndarray:
    """Random text of about ten documents, one of them as short as can be, the last cut short."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, length).astype(np.uint16)
    tokens[[0, 5, 6, 40, 41 + 30, *rng.integers(90, length - 2, 4)]] = 1
    return tokens


def scores(rt: tg.Runtime) -> dict[str, list[str]]:
    """Sum, coverage and every document's loss of each strategy, to the last bit."""
    found = {}
    for name, knobs in JOBS.items():
        cfg = config(**knobs)
        model = random_model(cfg)
        data = tg.Data(None, documents(330), np.ones(329, np.int16), "", {})
        subject = tg.Subject(cfg, rt, model, tg.Numerics(), tg.schedule(cfg.model))
        result = tg.score_model(subject, data)
        found[name] = [result.nats.hex(), result.coverage, result.documents.tobytes().hex()]
    return found


# ---- On several ranks ----
def on_ranks(what: str, world: int, out: Path) -> dict:
    """What `steps` or `scores` gives on a number of gloo ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, what, str(out)],
        capture_output=True,
        text=True,
        env=clean_env(OMP_NUM_THREADS=1),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


if __name__ == "__main__":
    runtime = tg.Runtime(config(threads=1), tg.environment())
    result = dict(steps=all_steps, scores=scores)[sys.argv[1]](runtime)
    if runtime.main:
        torch.save(result, sys.argv[2])
    torch.distributed.destroy_process_group()

"""Probe an evaluation of train_gpt.py from outside: the probes of text_probes.py on its score().

    python records/tools.py probes [NAME=VALUE ...]     knobs of train_gpt.py, e.g.
    PRESET=phased_ttt EVAL=doc python records/tools.py probes ARTIFACT=FILE [NAME=VALUE ...]   the
    model of a finished artifact

Without ARTIFACT the preset is shrunk (+tiny, 17 tokens) and every weight is random, so that every
technique matters. The probes see the loss of each target through the observer of score(). One probe
needs the model itself:

uniform   a model without knowledge scores exactly log2(V) * tokens / bytes (fixed predictors)
"""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_gpt as tg

from . import text_probes
from .text_probes import Seen, probe_text

VOCAB, LENGTH = 17, 180  # of a shrunk model and of the text it is probed with
Make = Callable[[np.ndarray], tg.Fixed]  # a text -> a fresh strategy that will score it


def state_digests(strategy: tg.Fixed, rows: int) -> list[str]:
    """Digest of what scores each row of a batch: all weights and buffers, and the row's own
    adapters."""
    own, shared = [hashlib.sha256() for _ in range(rows)], hashlib.sha256()
    adapters = {id(t) for _, module in strategy.attached for t in module.parameters()}
    for tensor in (*strategy.model.parameters(), *strategy.model.buffers()):
        if id(tensor) not in adapters:
            shared.update(tensor.detach().cpu().numpy().tobytes())
    for _, module in strategy.attached:
        for tensor in module.parameters():
            for row, digest in enumerate(own):
                digest.update(tensor[row].detach().cpu().numpy().tobytes())
    return [hashlib.sha256(shared.digest() + digest.digest()).hexdigest()[:16] for digest in own]


def observe(
    make: Make, tokens: np.ndarray, rt: tg.Runtime, digest: Callable = state_digests
) -> Seen:
    """Run one evaluation and keep everything; a refusal by score() is kept, not raised."""
    n, strategy, error = len(tokens) - 1, make(tokens), ""
    losses, count, order, start = (
        np.full(n, np.nan),
        np.zeros(n, int),
        np.full(n, -1),
        np.zeros(n, int),
    )
    digests, batches = [""] * n, 0

    def watch(batch: tg.Batch, found: torch.Tensor):
        nonlocal batches
        states = digest(strategy, len(batch.items))
        for (begin, first, many), row, state in zip(batch.items.tolist(), found, states):
            here = slice(first, first + many)
            losses[here], order[here], start[here], digests[here] = (
                row[:many],
                batches,
                begin,
                [state] * many,
            )
            count[here] += 1
        batches += 1

    try:
        coverage = tg.score(tokens, np.ones(n), strategy, rt, watch).coverage
        if coverage != hashlib.sha256(np.ones(n, "<i4").tobytes()).hexdigest()[:16]:
            error = "the coverage hash is not that of a text scored once"
    except tg.RunFailed as refused:
        error = str(refused)
    return Seen(losses, count, order, start, digests, error)


def audit(
    make: Make,
    tokens: np.ndarray,
    vocab: int,
    rt: tg.Runtime,
    digest: Callable = state_digests,
    bos: int = 1,
    **options,
) -> dict[str, Any]:
    """Every probe of the strategies of `make`; options as text_probes.audit."""
    return text_probes.audit(
        lambda x, digests: observe(make, x, rt, digest if digests else no_digest),
        tokens,
        vocab,
        bos=bos,
        **options,
    )


def no_digest(strategy: tg.Fixed, rows: int) -> list[str]:
    """For probes that look at losses alone."""
    return [""] * rows


# ---- Presets and artifacts ----
def random_weights(model: tg.GPT, seed: int = 0):
    """Every parameter random and of a size that matters, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.size(-1) ** -0.5 if p.opt == "matrix" else p + 0.3 * noise)


def subject(env: dict[str, str]) -> tuple[tg.Config, tg.GPT, tg.Plan]:
    """(configuration, model, plan) to probe: a shrunk preset, or an artifact. Raises UserError."""
    if path := env.get("ARTIFACT"):
        rt = tg.Runtime(tg.load(env | {"RUN_MODE": "eval"}), {})
        header, body = tg.read_artifact(Path(path), rt)
        cfg = tg.artifact_config(env | {"RUN_MODE": "eval"}, Path(path), header)
        model = tg.build_from_artifact(cfg, header, body, tg.Numerics())
        return cfg, model, tg.stored_plan(cfg, header)
    shrunk = dict(
        VOCAB_SIZE=VOCAB,
        EVAL_SEQ_LEN=32,
        EVAL_STRIDE=8,
        TRAIN_SEQ_LEN=32,
        EVAL_BATCH_TOKENS=64,
        TTT_CHUNK_TOKENS=48,
        TTT_LORA_CHUNK=8,
        TTT_LORA_DOCS=2,
        TTT_PHASE_DOCS=3,
        TTT_PHASES=2,
        TTT_EPOCHS=1,
        PREQUANT_EPOCHS=2,
        PREQUANT_LR=0.01,
        DEVICE="cpu",
    )
    preset = env.get("PRESET", "baseline")
    cfg = tg.load({k: str(v) for k, v in shrunk.items()} | env | {"PRESET": preset + "+tiny"})
    model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics())
    random_weights(model)
    return cfg, model, tg.schedule(cfg.model)


def strategy_maker(cfg: tg.Config, model: tg.GPT, plan: tg.Plan, rt: tg.Runtime) -> Make:
    """A fresh copy of the model and a fresh strategy for each text; TTT=prequant trains the copy on
    that text first, as a run would have done."""

    def make(tokens: np.ndarray) -> tg.Fixed:
        mine = tg.Subject(cfg, rt, copy.deepcopy(model), tg.Numerics(), plan)
        if cfg.eval.ttt == "prequant" and not cfg.eval.compliant:
            tuner = tg.FineTuner(mine, lambda p: torch.optim.AdamW(p, weight_decay=0.0))
            for _ in range(cfg.eval.prequant_epochs):
                tuner.step(
                    *tg.padded_rows(tokens, tg.cut(0, len(tokens) - 1, cfg.data.train_seq_len)),
                    cfg.eval.prequant_lr,
                )
        return tg.strategy_of(mine)

    return make


def uniform_error(
    cfg: tg.Config, model: tg.GPT, plan: tg.Plan, rt: tg.Runtime, tokens: np.ndarray
) -> float:
    """|bpb - log2(V) * tokens / bytes| of the same windows over a model whose token table is
    zero."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.embed.zero_()
    sizes = np.random.default_rng(0).integers(1, 9, len(tokens) - 1)
    fixed = tg.replace(cfg, eval=tg.replace(cfg.eval, ttt="none"))
    strategy = tg.strategy_of(tg.Subject(fixed, rt, blank, tg.Numerics(), plan))
    result = tg.score(tokens, sizes, strategy, rt)
    return float(abs(result.bpb - math.log2(cfg.data.vocab_size) * (len(tokens) - 1) / sizes.sum()))


def probe(env: dict[str, str], length: int = LENGTH, **options) -> dict[str, Any]:
    """audit() of what a set of knobs describes. Raises UserError for bad knobs."""
    cfg, model, plan = subject(env)
    rt = tg.Runtime(cfg, {})
    bos = cfg.values().get("bos_id", 1)
    tokens = probe_text(length, cfg.data.vocab_size, bos=bos)
    alone = cfg.eval.eval == "doc" and (
        cfg.eval.ttt == "none" or cfg.eval.ttt == "lora" and not cfg.eval.ttt_warm_a
    )
    found = audit(
        strategy_maker(cfg, model, plan, rt),
        tokens,
        cfg.data.vocab_size,
        rt,
        bos=bos,
        isolated=alone,
        **options,
    )
    found["uniform"] = uniform_error(cfg, model, plan, rt, tokens)
    found["flags"] += ["uniform"] * (bool(found["uniform"] > 1e-5))
    return dict(strategy=tg.variant(cfg.eval), preset=cfg.preset) | found

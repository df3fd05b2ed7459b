"""Shared by tests of the arithmetic: small models whose every parameter matters, and exact
attention."""

import math

import torch
from torch import Tensor

import train_gpt as tg

torch.set_num_threads(1)  # on tensors this small more threads only wait for each other

OVERLAYS = ("cpu", "tiny")
SYSTEMS = list(tg.SYSTEMS)
# one entry per technique that a knob switches
TECHNIQUES = {
    "plain": {},
    "xsa": dict(xsa_last_n=2),
    **{f"smear_gate {form}": dict(smear_gate=form) for form in "BCD"},
    "bigram": dict(bigram_buckets=64),
    "engram": dict(engram_buckets=64, engram_dim=4),
    "value_embed": dict(value_embed_last_n=2, value_embed_dim=8),
    "value_residual": dict(value_residual="mix"),
    "output_gate": dict(output_gate_scale=0.7),
    "doc_attention": dict(doc_attention=1),
    "no_positions": dict(rope_dims=-1),
    "no_x0": dict(x0_mix=0),
    "ln_scale": dict(ln_scale=1),
    "shifted": dict(softcap="shifted"),
    "mup": dict(mup_base_width=32),
    "loops": dict(num_loops=2, loop_start=1, loop_end=1),
    "gated_loops": dict(
        num_loops=2,
        loop_start=1,
        loop_end=1,
        loop_ramp_steps=3,
        skip_pairs="around_loop",
    ),
    **{f"skips {form}": dict(skips=form) for form in ("sigmoid", "gated")},
    "few_skips": dict(skip_pairs="as_unlooped", num_loops=2, loop_start=0, loop_end=1),
    **{f"parallel {form}": dict(parallel=form, parallel_start=2) for form in "ABD"},
    "leaky_relu2": dict(leaky_slope=0.3),
    "partial_rope": dict(rope_dims=8),
    "no_skips": dict(skips="none"),
    "all": dict(xsa_last_n=1, smear_gate="B", bigram_buckets=64, leaky_slope=0.5, rope_dims=8),
}


ALONE = tg.Runtime(
    tg.load({"PRESET": "baseline+tiny", "DEVICE": "cpu", "THREADS": "1"}), {}
)  # one rank


def config(preset: str = "baseline+tiny", **knobs) -> tg.Config:
    """The configuration of a preset with knobs on top, as the environment would give it, consent to
    all included."""
    return tg.load(
        {"PRESET": preset, "DEVICE": "cpu", "ALLOW_NONCOMPLIANT": "1"}
        | {name.upper(): str(value) for name, value in knobs.items()}
    )


def random_model(cfg: tg.Config, numerics: tg.Numerics = tg.Numerics(), seed: int = 0) -> tg.GPT:
    """A model whose every parameter is random and of a size that matters, the zero-initialised ones
    included."""
    torch.manual_seed(seed)
    model = tg.GPT(cfg.model, cfg.data.vocab_size, numerics, cfg.optim)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(noise * p.size(-1) ** -0.5 if p.opt == "matrix" else p + 0.3 * noise)
    return model


def flattened(
    model: torch.nn.Module,
    cfg: tg.Config,
    rt: tg.Runtime = ALONE,
    dtype: torch.dtype = torch.float32,
):
    """(flat memory of a model, its optimiser)."""
    flat = tg.FlatParameters(model, rt)
    return flat, tg.Optimiser(flat, cfg, dtype, {})


def random_batch(cfg: tg.Config, rows: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random (ids, targets), each (rows, length)."""
    tokens = torch.randint(
        cfg.data.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def token_losses(model: tg.GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Loss of every position, (rows, length)."""
    return model.losses(model.hidden(ids, tg.schedule(model.cfg)), targets)


def exact(model: tg.GPT) -> tg.GPT:
    """The model in float64, so that what remains between two ways of computing is no rounding."""
    model.dtype = torch.float64
    return model.double()


def exact_losses(model: tg.GPT, ids: Tensor, targets: Tensor, plan: tg.Plan) -> Tensor:
    """Loss of every position (rows, length), the softcap and the softmax written out in float64."""
    cap = model.cfg.logit_softcap
    logits = cap * torch.tanh(model.logits(model.hidden(ids, plan)).double() / cap)
    own = logits.gather(-1, targets[..., None])[..., 0]
    return (logits.logsumexp(-1) - own).detach()


def total_loss(model: tg.GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """What is minimised, summed over a micro-batch, with every loop switched on."""
    return model(ids, targets, tg.schedule(model.cfg))[0]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(D)) V in float64; query head h reads key/value head h // (H/G)."""
    group = q.size(2) // k.size(2)
    out = []
    for head in range(q.size(2)):
        qh, kh, vh = (
            q[:, :, head].double(),
            k[:, :, head // group].double(),
            v[:, :, head // group].double(),
        )
        scores = qh @ kh.mT / math.sqrt(q.size(3))
        visible = torch.ones_like(scores, dtype=torch.bool).tril()
        out.append(torch.where(visible, scores, -math.inf).softmax(-1) @ vh)
    return torch.stack(out, 2)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())

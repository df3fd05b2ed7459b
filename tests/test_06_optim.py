"""Every stage and variant against float64, AdamW and AdEMAMix too; banks on several ranks, ramps, averaging."""

import copy
import io
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_env
from helpers import (
    ALONE,
    TECHNIQUES,
    config,
    distance,
    flattened,
    random_batch,
    random_model,
    token_losses,
)
from running import FAST, metrics, refused, train
from torch import Tensor, nn

import train_gpt as tg

SHAPES = [(24, 24)] + [(48, 16)] * 3 + [(16, 48)] * 2  # square, tall, wide; the last two stacked
QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SEVEN = (  # as published for seven steps from 0.001 without a margin, PR 1089
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
HYPER = tg.Hyper(config().optim)


def polar(u: Tensor) -> Tensor:
    """The exact polar factor in float64."""
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    return left @ right


def tagged(shapes=SHAPES, seed: int = 0) -> nn.Module:
    """A module of matrices that Muon owns and one vector that it does not."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.matrices = nn.ParameterList(
        tg.param(shape, tg.normal(1.0), "matrix", "matrix") for shape in shapes
    )
    module.vector = tg.param((5,), tg.normal(1.0), "scalar", "keep")
    return module


def tagged_optimiser(seed: int = 0, dtype=torch.float32, shapes=SHAPES, **knobs):
    """(module, its flat memory, its optimiser); AdamW stands still."""
    module, cfg = tagged(shapes, seed), config(**dict(scalar_lr=0) | knobs)
    return module, *flattened(module, cfg, dtype=dtype)


def ramps(lr: float = 1.0, momentum: float = 0.9, **more) -> dict[str, float]:
    """What moves in these tests, nothing else does."""
    return tg.full_speed(config()) | dict(lr=lr, momentum=momentum) | more


def matrix(kind: str) -> Tensor:
    """Two hard inputs of one kind, (2,m,n)."""
    generator = torch.Generator().manual_seed(0)
    shape = {"tall": (2, 1024, 256), "wide": (2, 256, 1024)}.get(kind, (2, 256, 256))
    u = torch.randn(shape, generator=generator)
    if kind == "row-imbalanced":
        u = u * 10 ** (4 * torch.rand(2, 256, 1, generator=generator) - 2)
    if kind == "power law":
        left, _, right = torch.linalg.svd(u)
        u = left * torch.arange(1, 257) ** -1.0 @ right
    return u


# ---- Stages ----
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize(
    "name, closeness", (("muon", 0.97), ("muon_polar", 0.99), ("turbo_muon", 0.96))
)
@pytest.mark.parametrize("kind", ("square", "tall", "wide", "row-imbalanced", "power law"))
def test_orthogonalisation_is_close_to_the_polar_factor(kind, name, closeness, dtype):
    u, stage = matrix(kind), tg.MUON[name][1]
    if kind == "row-imbalanced":
        u = tg.row_norm(u, {}, HYPER)
    x = stage(u, {}, replace(HYPER, dtype=dtype))
    assert x.dtype == torch.float32 and x.shape == u.shape
    cosine = nn.functional.cosine_similarity(x.double().flatten(1), polar(u).flatten(1))
    assert cosine.mean() >= closeness
    assert torch.linalg.matrix_norm(x.double(), 2).max() <= 1.25


def through_singular_values(u: Tensor, table) -> Tensor:
    """The polynomials applied to the singular values, in float64."""
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    return left * s.unsqueeze(-2) @ right


@pytest.mark.parametrize("shape", ((24, 24), (48, 16), (16, 48)))
@pytest.mark.parametrize("name", ("newton_schulz", "polar_express", "turbo"))
def test_orthogonalisation_is_its_polynomial_of_the_singular_values(name, shape):
    torch.manual_seed(1)
    u = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    if name == "turbo":
        short = u.double() if shape[0] <= shape[1] else u.double().mT
        x = torch.stack([torch.diag(1 / (m @ m.T).abs().sum(1).sqrt()) @ m for m in short]) / 1.02
        want, got = through_singular_values(x, SEVEN[1:5]), tg.turbo(u, {}, HYPER)
        want = want if shape[0] <= shape[1] else want.mT
        assert torch.linalg.matrix_norm(x, 2).max() <= 1, "the bound holds"
    else:
        margin = 1.02 if name == "polar_express" else 1
        x = u.double() / (u.double().norm(dim=(-2, -1), keepdim=True) * margin)
        want = through_singular_values(
            x, POLAR_EXPRESS if name == "polar_express" else (QUINTIC,) * 5
        )
        got = getattr(tg, name)(u, {}, HYPER)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=2e-4)


def test_the_minimax_solver_finds_the_published_tables():
    np.testing.assert_allclose(tg.polar_table(7, 1e-3, margin=1.0)[:6], SEVEN[:6], rtol=1e-9)
    np.testing.assert_allclose(tg.polar_table(7, 1e-3, margin=1.0)[6], SEVEN[6], rtol=1e-5)
    assert [tuple(row) for row in tg.TURBO["record"]] == [tuple(row) for row in SEVEN[1:5]]


@pytest.mark.parametrize("low, high", ((0.1, 1.0), (0.02, 1.9), (0.7, 1.3)))
def test_a_minimax_quintic_cannot_be_improved(low, high):
    x = np.linspace(low, high, 20_001)
    powers = np.stack([x, x**3, x**5], 1)
    best = np.abs(powers @ tg.minimax_quintic(low, high) - 1)
    at_most = best.max()
    assert (
        np.sum((best[1:-1] > best[:-2]) & (best[1:-1] >= best[2:]) & (best[1:-1] > 0.999 * at_most))
        == 2
    )
    assert best[0] == pytest.approx(at_most, rel=1e-4) == best[-1], (
        "four equal extremes: Chebyshev's criterion"
    )
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = np.array(tg.minimax_quintic(low, high)) * (1 + 1e-3 * generator.standard_normal(3))
        assert np.abs(powers @ other - 1).max() > at_most


@pytest.mark.parametrize("steps", range(2, 9))
def test_the_table_for_any_number_of_steps_is_right_and_no_longer_one_cut_short(steps):
    table = tg.best_polar_table(steps)
    assert len(table) == steps
    x = np.geomspace(1e-6, 1, 20_000)
    y = x
    for a, b, c in table:
        y = a * y + b * y**3 + c * y**5
    assert y.max() <= 1.151, "nothing ends far above one"
    reached = x[np.abs(y - 1) > 0.151].max()
    assert reached < {2: 0.08, 3: 0.02, 4: 0.005}.get(steps, 1.1e-3), "and little far below"
    if steps == 4:
        cut = x
        for a, b, c in POLAR_EXPRESS[:4]:
            cut = a * cut + b * cut**3 + c * cut**5
        assert cut.max() > 1.5, "what the table for five steps does when it is cut"


@pytest.mark.parametrize("steps", (3, 4, 5, 6, 8, 12))
@pytest.mark.parametrize("kind", ("square", "tall", "power law"))
def test_any_number_of_polar_steps_is_stable_in_bf16(kind, steps):
    hp = tg.Hyper(config(muon_steps=steps).optim, torch.bfloat16)
    for stage in (tg.polar_express, tg.turbo):
        x = stage(matrix(kind), {}, hp)
        assert torch.linalg.matrix_norm(x.double(), 2).max() <= 1.25
        cosine = nn.functional.cosine_similarity(
            x.double().flatten(1), polar(matrix(kind)).flatten(1)
        ).mean()
        assert cosine >= {3: 0.84}.get(steps, 0.96)


def test_more_steps_are_nearer_to_the_polar_factor():
    u = matrix("square")
    cosines = [
        float(
            nn.functional.cosine_similarity(
                tg.polar_express(u, {}, tg.Hyper(config(muon_steps=steps).optim))
                .double()
                .flatten(1),
                polar(u).flatten(1),
            ).mean()
        )
        for steps in (2, 3, 4, 5, 6)
    ]
    assert cosines == sorted(cosines) and cosines[2] > 0.98 and cosines[-1] > 0.998


STAGES = (
    tg.newton_schulz,
    tg.polar_express,
    tg.turbo,
    tg.row_norm,
    tg.aspect_scale,
    tg.aspect_scale_plus,
    tg.triangular,
    tg.post_norm,
)


def test_stacked_matrices_are_treated_one_by_one():
    torch.manual_seed(2)
    for shape in {*SHAPES}:
        u = torch.randn(4, *shape) * torch.tensor([1e-2, 1.0, 30.0, 0.0])[:, None, None]
        for stage in STAGES:
            single = torch.stack([stage(m[None], {}, HYPER)[0] for m in u])
            torch.testing.assert_close(stage(u, {}, HYPER), single, rtol=1e-4, atol=1e-5)
            assert not single[3].any(), "a zero gradient moves nothing"


def test_simple_stages_equal_their_formulas():
    torch.manual_seed(3)
    u, state, mu = torch.randn(2, 6, 4), {}, 0.9
    buffer = torch.zeros(2, 6, 4, dtype=torch.float64)
    for _ in range(4):
        g = torch.randn(2, 6, 4)
        buffer = mu * buffer + g.double()
        out = tg.nesterov(g, state, replace(HYPER, momentum=torch.tensor(mu)))
        torch.testing.assert_close(out.double(), g + mu * buffer, rtol=1e-5, atol=1e-6)
    rows = tg.row_norm(u * 100, {}, HYPER)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 6))
    torch.testing.assert_close(rows * u.norm(dim=-1, keepdim=True), u)
    torch.testing.assert_close(tg.aspect_scale(u, {}, HYPER), u * 1.5**0.5)  # 6 rows, 4 columns
    assert torch.equal(tg.aspect_scale(u.mT, {}, HYPER), u.mT)  # wide: as it is
    torch.testing.assert_close(tg.aspect_scale_plus(u.mT, {}, HYPER), u.mT * (4 / 6) ** 0.5)


@pytest.mark.parametrize("mode, last", (("row", -1), ("col", -2), ("col_row", -1), ("row_col", -2)))
def test_post_norm_equals_its_loop(mode, last):
    u = torch.randn(2, 5, 7)
    got = tg.post_norm(u, {}, tg.Hyper(config(muon="muon_plus", muon_post_norm=mode).optim))
    want = u.double().numpy()
    for axis in mode.split("_"):
        for m in want:
            for i in range(m.shape[0 if axis == "row" else 1]):
                line = m[i] if axis == "row" else m[:, i]
                line /= math.sqrt((line**2).sum())
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=last), torch.ones_like(got.norm(dim=last)))


# ---- Every variant against float64, one matrix at a time ----
class Reference:
    """Ten steps of one variant on one matrix in float64 numpy, written from the formulas of its paper."""

    def __init__(self, kind: str):
        self.kind, self.t, self.memory = kind, 0, {}

    def ema(self, name: str, value, beta: float):
        self.memory[name] = beta * self.memory.get(name, 0.0) + (1 - beta) * value
        return self.memory[name]

    def quintics(self, x, table, margin: float = 1.0):
        u, s, v = np.linalg.svd(x / (margin * np.linalg.norm(x)), full_matrices=False)
        for a, b, c in table:
            s = a * s + b * s**3 + c * s**5
        return u * s @ v

    def direction(self, g, mu: float):
        self.t += 1
        if self.kind == "newton_muon":
            g = g @ self.memory["inverse"]
        self.memory["b"] = mu * self.memory.get("b", 0.0) + g
        m, n = g.shape
        return self.spectral(g, g + mu * self.memory["b"]) * math.sqrt(
            m / n if self.kind == "muon_plus" else max(1, m / n)
        )

    def spectral(self, g, u):
        rows = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        columns = lambda x: x / np.linalg.norm(x, axis=0, keepdims=True)  # noqa: E731
        five, kind = (QUINTIC,) * 5, self.kind
        if kind in ("muon", "newton_muon"):
            return self.quintics(u, five)
        if kind == "muon_polar":
            return self.quintics(u, POLAR_EXPRESS, 1.02)
        if kind in ("muoneq_r", "muoneq_r_polar", "rmnp"):
            return {
                "muoneq_r": lambda x: self.quintics(x, five),
                "rmnp": lambda x: x,
                "muoneq_r_polar": lambda x: self.quintics(x, POLAR_EXPRESS, 1.02),
            }[kind](rows(u))
        if kind == "muon_plus":
            return columns(rows(self.quintics(u, five)))
        if kind == "normuon":
            o = self.quintics(u, five)
            scaled = o / (np.sqrt(self.ema("v", (o * o).mean(1, keepdims=True), 0.95)) + 1e-10)
            return scaled * np.linalg.norm(o) / np.linalg.norm(scaled)
        short = u if u.shape[0] <= u.shape[1] else u.T
        if kind == "turbo_muon":
            x = np.diag(1 / np.sqrt(np.abs(short @ short.T).sum(1))) @ short / 1.02
            left, s, right = np.linalg.svd(x, full_matrices=False)
            for a, b, c in SEVEN[1:5]:
                s = a * s + b * s**3 + c * s**5
            x = left * s @ right
            return columns(rows(x if short is u else x.T))
        if kind == "mud":
            q = rows(short)
            x = rows(np.linalg.inv(np.tril(q @ q.T)) @ q)
            return x if short is u else x.T
        raise ValueError(kind)


REFERENCES = sorted(set(tg.MUON) - {"mousse"})  # which has its own, below


@pytest.mark.parametrize("wd", (0.0, 0.3))
@pytest.mark.parametrize("kind", REFERENCES)
def test_ten_steps_equal_float64(kind, wd):
    module, flat, optimiser = tagged_optimiser(muon=kind, matrix_lr=0.05, muon_wd=wd)
    references = [Reference(kind) for _ in SHAPES]
    want = [p.detach().double().numpy().copy() for p in module.matrices]
    start, generator = [w.copy() for w in want], np.random.default_rng(0)
    if kind == "newton_muon":  # any symmetric positive matrices will do
        for bank in flat.banks:
            z = torch.randn(len(bank.params), bank.weights.size(2), 99)
            bank.state["inverse"] = torch.linalg.inv(z @ z.mT / 99 + torch.eye(z.size(1)))
            for p, inverse in zip(bank.params, bank.state["inverse"]):
                i = [p is q for q in module.matrices].index(True)
                references[i].memory["inverse"] = inverse.double().numpy()
    for step in range(10):
        lr, momentum, taper = 1 - 0.05 * step, 0.85 + 0.01 * step, 1 - 0.02 * step
        for i, p in enumerate(module.matrices):
            g = generator.standard_normal(p.shape) * 10.0 ** generator.uniform(
                -1, 1, (p.shape[0], 1)
            )
            p.grad.copy_(torch.from_numpy(g))
            g = p.grad.double().numpy()
            want[i] = want[i] * (1 - 0.05 * lr * wd * taper) - 0.05 * lr * references[i].direction(
                g, momentum
            )
        optimiser.step(ramps(lr, momentum, wd=taper, alpha=1.5, beta3=0.99))
    assert torch.equal(module.vector, tagged().vector), "nothing else moves"
    for p, w, before in zip(module.matrices, want, start):
        assert np.abs(w - before).mean() > 0.01, "ten steps move the weights"
        error = np.linalg.norm(p.detach().numpy() - w) / np.linalg.norm(w - before)
        assert error < (0.02 if kind == "mud" else 2e-3), f"{tuple(p.shape)}: {error}"


@pytest.mark.parametrize("mode", ("inverse", "forward"))
def test_mousse_equals_float64_and_solves_its_problem(mode):
    hp = tg.Hyper(config(muon="mousse", mousse=mode, muon_refresh=2, muon_beta2=0.9).optim)
    state, left, right = {}, 0.0, 0.0
    torch.manual_seed(4)
    for step in range(4):
        g, u = torch.randn(3, 10, 14) * torch.linspace(0.1, 3, 14), torch.randn(3, 10, 14)
        x = tg.whitened_polar(u, state, replace(hp, gradient=g, step=step))
        g64 = g.double().numpy()
        left = 0.9 * left + 0.1 * g64 @ g64.transpose(0, 2, 1)
        right = 0.9 * right + 0.1 * g64.transpose(0, 2, 1) @ g64
        if step % 2 == 0:  # refreshed every second step
            powers = [np.stack([power(m) for m in side]) for side in (left, right)]
        white = powers[0] @ u.double().numpy() @ powers[1]
        y = np.stack([Reference("muon").quintics(m, (QUINTIC,) * 5) for m in white])
        back = powers if mode == "inverse" else [np.linalg.inv(p) for p in powers]
        want = back[0] @ y @ back[1]
        want *= np.linalg.norm(y, axis=(1, 2), keepdims=True) / np.linalg.norm(
            want, axis=(1, 2), keepdims=True
        )
        assert distance(x, torch.from_numpy(want)) < 1e-3


def power(m: np.ndarray) -> np.ndarray:
    """m^(-1/8) of a symmetric positive matrix made of mean eigenvalue 1."""
    values, vectors = np.linalg.eigh(m / np.trace(m) * len(m) + 1e-4 * np.eye(len(m)))
    return vectors * values**-0.125 @ vectors.T


def test_the_default_of_mousse_is_steepest_descent_bounded_in_whitened_coordinates():
    """Among all X with |L^(1/8) X R^(1/8)| <= 1 in the spectral norm, L^(-1/8) polar(L^(-1/8) U R^(-1/8)) R^(-1/8)
    has the largest inner product with U; the other sign has not."""
    torch.manual_seed(5)
    a, b = (
        torch.from_numpy(
            power((lambda z: z @ z.T)(np.random.default_rng(i).standard_normal((8, 12)) * 9**i))
        )
        for i in range(2)
    )
    u = torch.randn(8, 8, dtype=torch.float64)
    y = polar(a @ u @ b)

    def gain(x: Tensor) -> float:
        bounded = torch.linalg.inv(a) @ x @ torch.linalg.inv(b)
        return float((u * x).sum() / torch.linalg.matrix_norm(bounded, 2))

    best = gain(a @ y @ b)
    assert (
        gain(torch.linalg.inv(a) @ y @ torch.linalg.inv(b)) < 0.98 * best and gain(polar(u)) < best
    )
    assert all(
        gain(a @ polar(torch.randn(8, 8, dtype=torch.float64)) @ b) < best for _ in range(100)
    )


def test_newton_muon_whitens_by_what_each_matrix_reads():
    cfg = config(muon="newton_muon", num_loops=1, loop_start=1, loop_end=1)
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 4, 32)
    flat, optimiser = flattened(model, cfg)
    plan, inputs = tg.schedule(cfg.model), {}
    hooks = [
        m.register_forward_hook(
            lambda m, i, o: inputs.setdefault(m.weight, []).append(i[0].flatten(0, -2))
        )
        for m in model.modules()
        if isinstance(m, tg.Linear)
    ]
    model.logits(model.hidden(ids, plan))
    for hook in hooks:
        hook.remove()
    moments = tg.second_moments(model, ids, plan)
    head = moments.pop(model.output)
    assert set(moments) == {p for p in model.parameters() if p.opt == "matrix"} and head.shape == (
        24,
        24,
    )
    for p, k in moments.items():
        z = torch.cat(inputs.get(p, [torch.zeros(1, p.size(1))])).double().detach()
        assert distance(k, z.T @ z / ids.numel()) < 1e-5 if p in inputs else not k.any()
    assert not any(m._forward_pre_hooks for m in model.modules()), "no hook stays"
    watch = tg.InputWatch(model, optimiser)
    watch.after_backward(ids, ids, plan)
    watch.before_update()
    for bank in flat.banks:
        for p, inverse in zip(bank.params, bank.state["inverse"]):
            k = moments[p].double() / moments[p].trace() * p.size(1)
            torch.testing.assert_close(
                inverse.double() @ (k + 0.2 * torch.eye(len(k))),
                torch.eye(len(k)).double(),
                rtol=0,
                atol=1e-3,
            )
    before = [bank.state["inverse"].clone() for bank in flat.banks]
    for step in range(1, 11):  # refreshed every tenth step
        optimiser.hyper.step = step
        watch.before_step({})
        watch.after_backward(*random_batch(cfg, 4, 32, seed=step), plan)
        watch.before_update()
        same = [torch.equal(a, bank.state["inverse"]) for a, bank in zip(before, flat.banks)]
        assert all(same) if step < 10 else not any(same)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_agrees_with_torch():
    """torch averages the momentum, b <- mu*b + (1-mu)*g; orthogonalisation forgets that factor. Both run it in bf16."""
    module, flat, optimiser = tagged_optimiser(dtype=torch.bfloat16, matrix_lr=0.05, muon_wd=0.3)
    theirs = [nn.Parameter(p.detach().clone()) for p in module.matrices]
    start = [p.detach().clone() for p in module.matrices]
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, momentum=0.95, nesterov=True)
    for _ in range(10):
        flat.gradients.normal_()
        for p, q in zip(module.matrices, theirs):
            q.grad = p.grad.clone()
        optimiser.step(ramps(momentum=0.95))
        reference.step()
    for p, q, before in zip(module.matrices, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_what_bounds_the_matrices():
    def moved(**knobs):
        module, flat, optimiser = tagged_optimiser(**dict(matrix_lr=0.1, muon_wd=0.5) | knobs)
        before = [p.detach().clone() for p in module.matrices]
        flat.gradients.copy_(
            torch.randn(flat.gradients.shape, generator=torch.Generator().manual_seed(0))
        )
        optimiser.step(ramps(lr=0.7))
        return before, [p.detach() for p in module.matrices]

    start, free = moved(muon_wd=0)
    for (before, after), f in zip(zip(*moved(muon_decay="decoupled")), free):
        torch.testing.assert_close(after, f - 0.07 * 0.5 * before)
    for (before, after), f in zip(zip(*moved(muon_decay="cautious")), free):
        u = (before - f) / 0.07
        torch.testing.assert_close(
            after, f - 0.07 * 0.5 * before * (u * before > 0), rtol=1e-4, atol=1e-5
        )
    for (before, after), f in zip(zip(*moved(muon_decay="fixed_norm")), free):
        torch.testing.assert_close(
            after, f * before.norm() / f.norm() if f.norm() > before.norm() else f
        )


def test_fixed_norm_lets_what_starts_at_zero_grow_up_to_an_ordinary_start():
    module, flat, optimiser = tagged_optimiser(muon_decay="fixed_norm", matrix_lr=0.3)
    with torch.no_grad():
        module.matrices[1].zero_()
    flat, optimiser = flattened(module, config(muon_decay="fixed_norm", matrix_lr=0.3, scalar_lr=0))
    start = [float(p.norm()) for p in module.matrices]
    limits = [
        s
        or float(
            torch.empty(300, *p.shape)
            .uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5)
            .square()
            .sum()
            / 300
        )
        ** 0.5
        for s, p in zip(start, module.matrices)
    ]
    for _ in range(12):
        flat.gradients.normal_()
        optimiser.step(ramps())
        norms = [float(p.norm()) for p in module.matrices]
        assert all(n <= 1.02 * limit for n, limit in zip(norms, limits))
    assert norms[1] == pytest.approx(limits[1], rel=0.02)


# ---- Several ranks ----
RANKS = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, train_gpt as tg
from helpers import config
from test_06_optim import tagged
out, knobs = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
cfg = config(scalar_lr=0.125, **knobs)
rt = tg.Runtime(cfg, dict(os.environ))
module = tagged()
flat = tg.FlatParameters(module, rt)
optimiser = tg.Optimiser(flat, cfg.optim, rt, torch.bfloat16 if knobs.get("numerics") == "bf16" else torch.float32)
for step in range(4):
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():  # whole numbers over six: their sums are exact in any order
        parts = torch.randint(-64, 64, (6, *p.shape), generator=generator).float() / 64
        p.grad.copy_(parts[rt.rank::rt.world].sum(0))
    flat.rest[-1] = rt.rank + 1
    optimiser.step(tg.full_speed(cfg) | dict(momentum=0.9, lr=0.5, alpha=1.0, beta3=0.9))
    if step == 1:  # into a file and back, as at a resumption by any number of ranks
        state = optimiser.state_dict()
        optimiser.load_state_dict(state)
assert flat.rest[-1] == rt.world * (rt.world + 1) / 2, "the loss travels with the gradients"
shares = [len(bank.state["momentum"]) for bank in flat.banks if "momentum" in bank.state]
state = optimiser.state_dict()
if rt.main:
    torch.save(dict(weights=flat.weights, state=state, shares=shares), out)
rt.close()
"""


def on_ranks(tmp_path, world: int, **knobs) -> dict:
    """Weights, optimiser state and rank 0's shares after four steps on a number of gloo ranks."""
    script, out = tmp_path / "ranks.py", tmp_path / f"{world}.pt"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world}",
            str(script),
            str(out),
            *(f"{k}={v}" for k, v in knobs.items()),
        ],
        capture_output=True,
        text=True,
        env=clean_env(OMP_NUM_THREADS=1),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    "knobs",
    (
        dict(muon="muon", grad_clip_norm=0.5),
        dict(muon="normuon", muon_decay="cautious"),
        dict(muon="turbo_muon", numerics="bf16"),
        dict(muon="mousse", muon_refresh=2),
        dict(muon="rmnp", ademamix="all"),
    ),
    ids=lambda knobs: knobs["muon"],
)
def test_any_number_of_ranks_gives_the_same_weights_and_state(knobs, tmp_path):
    """Bit for bit: gradients are such that their sums are exact, so that only the optimiser could differ. Eigenvectors
    are the exception: LAPACK takes another path for another size of the stack."""
    worlds = (1, 2, 3) if knobs["muon"] == "muon" else (1, 3)
    found = [on_ranks(tmp_path, world, **knobs) for world in worlds]
    if knobs["muon"] == "muon":
        assert [sum(f["shares"]) for f in found] == [6, 4, 3], (
            "each rank remembers its own share only"
        )
    for other in found[1:]:
        exact = dict(rtol=0, atol=0) if knobs["muon"] != "mousse" else dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other["weights"], found[0]["weights"], **exact)
        torch.testing.assert_close(other["state"], found[0]["state"], **exact)
    assert (
        found[0]["weights"]
        - torch.cat([p.detach().flatten() for p in tg.FlatParameters(tagged(), ALONE).params])
    ).abs().mean() > 1e-3


def test_the_optimiser_continues_bit_identically_from_its_state():
    def steps(flat, optimiser, seeds):
        for seed in seeds:
            flat.gradients.copy_(
                torch.randn(flat.gradients.shape, generator=torch.Generator().manual_seed(seed))
            )
            optimiser.step(ramps(0.7, alpha=0.5, beta3=0.9))

    for kind in ("muon", "normuon", "mousse"):
        knobs = dict(muon=kind, scalar_lr=0.1, ademamix="all", matrix_lr=0.01)
        _, flat, optimiser = tagged_optimiser(**knobs)
        steps(flat, optimiser, range(3))
        file = io.BytesIO()
        torch.save(dict(weights=flat.weights, optimiser=optimiser.state_dict()), file)
        steps(flat, optimiser, range(3, 6))
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        fresh = tagged_optimiser(seed=9, **knobs)[2].state_dict()
        results = []
        for state in (saved["optimiser"], fresh):
            _, other, resumed = tagged_optimiser(seed=9, **knobs)
            other.weights.copy_(saved["weights"])
            resumed.load_state_dict(copy.deepcopy(state))
            steps(other, resumed, range(3, 6))
            results.append(torch.equal(other.weights, flat.weights))
        assert results == [True, False], "the state is all it takes, and it is needed"


# ---- Flat memory ----
def test_flat_memory_is_what_the_modules_see():
    cfg = config(**TECHNIQUES["all"])
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 2, 16)
    before = token_losses(model, ids, targets)
    flat = tg.FlatParameters(model, ALONE)
    assert torch.equal(token_losses(model, ids, targets), before), "flattening changes no value"
    assert (
        flat.weights.numel()
        == flat.gradients.numel() - 1
        == sum(p.numel() for p in model.parameters())
    )
    assert {id(p) for p in flat.params} == {id(p) for p in model.parameters()}
    for p in model.parameters():
        for part, whole in ((p, flat.weights), (p.grad, flat.gradients)):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    flat.weights.copy_(torch.arange(flat.weights.numel()))
    starts = sorted((int(p.flatten()[0]), p.numel()) for p in model.parameters())
    assert starts[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(starts, starts[1:])), (
        "no gap, no overlap"
    )


@pytest.mark.parametrize("world", (1, 2, 8))
def test_banks_hold_every_matrix_once_the_largest_first(world):
    model = random_model(config(num_layers=3, **TECHNIQUES["bigram"]))
    banks = [
        tg.FlatParameters(model, rt).banks
        for rt in (type("Rank", (), dict(rank=r, world=world)) for r in range(world))
    ]
    sizes = [bank.weights.numel() for bank in banks[0]]
    assert sizes == sorted(sizes, reverse=True)
    assert len({bank.weights.shape[1:] for bank in banks[0]}) == len(banks[0]), "one bank per shape"
    for ranks in zip(*banks):
        dealt = [p for bank in ranks for p in bank.params[bank.mine]]
        assert [id(p) for p in dealt] == [id(p) for p in ranks[0].params], (
            "each rank owns its own share"
        )
        assert all(bank.owned <= bank.share == -(-len(bank.params) // world) for bank in ranks)
    flat = tg.FlatParameters(model, ALONE)
    flat.gradients.normal_()
    owned = []
    for bank in flat.banks:
        for p, w, g in zip(bank.params, bank.weights, bank.gradients, strict=True):
            assert p.data_ptr() == w.data_ptr() and torch.equal(p, w) and torch.equal(p.grad, g)
            owned.append(id(p))
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.opt == "matrix")


def test_gradients_accumulate_in_the_flat_vector():
    cfg = config(**TECHNIQUES["all"])
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 2, 16)
    plan = tg.schedule(cfg.model)
    want = dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(model(ids, targets, plan)[0], list(model.parameters())),
        )
    )
    flat = tg.FlatParameters(model, ALONE)
    for times in (1, 2):
        model(ids, targets, plan)[0].backward()
        for name, p in model.named_parameters():
            assert (
                p.grad.untyped_storage().data_ptr() == flat.gradients.untyped_storage().data_ptr()
            )
            torch.testing.assert_close(p.grad, times * want[name], rtol=1e-4, atol=1e-5)
    assert flat.rest[-1] == 0, "the last number is not a gradient"


@pytest.mark.parametrize("kind", tg.MUON)
def test_a_step_of_every_variant_moves_all_weights_and_lowers_the_loss(kind):
    rate = 0.002 if kind == "rmnp" else 0.01
    cfg = config(tied_embed_lr=0.01, scalar_lr=0.01, muon=kind, matrix_lr=rate)
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 4, 16)
    (flat, optimiser), plan = flattened(model, cfg), tg.schedule(cfg.model)
    watchers = [tg.InputWatch(model, optimiser)] * (kind == "newton_muon")
    before, losses = {p: p.detach().clone() for p in model.parameters()}, []
    for _ in range(5):
        flat.gradients.zero_()
        loss = model(ids, targets, plan)[0] / ids.numel()
        loss.backward()
        for watch in watchers:
            watch.before_step({})
            watch.after_backward(ids, targets, plan)
            watch.before_update()
        optimiser.step(ramps())
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for p, old in before.items():
        assert (p != old).float().mean() > (0 if p.opt == "embed" else 0.9), (
            "only unseen tokens may rest"
        )


@pytest.mark.parametrize("bound", (0.3, 1e6, 0.0))
def test_clipping_equals_torch_and_spares_the_loss(bound):
    module = tagged()
    flat = tg.FlatParameters(module, ALONE)
    flat.gradients.normal_()
    before = flat.gradients.clone()
    copies = [nn.Parameter(p.detach().clone()) for p in flat.params]
    for p, q in zip(flat.params, copies):
        q.grad = p.grad.clone()
    flat.clip(bound)
    if bound:
        nn.utils.clip_grad_norm_(copies, bound)
    for p, q in zip(flat.params, copies):
        torch.testing.assert_close(p.grad, q.grad)
    assert flat.rest[-1] == before[-1]
    assert torch.equal(flat.gradients, before) == (bound != 0.3)


# ---- AdamW groups ----
GROUP_KNOBS = dict(
    tied_embed_lr=0.011,
    table_lr=0.022,
    scalar_lr=0.033,
    head_lr=0.044,
    embed_wd=0.5,
    table_wd=0.0,
    adam_wd=0.25,
    beta1=0.8,
    beta2=0.9,
    embed_beta1=0.7,
    table_beta2=0.99,
    head_beta1=0.6,
    adam_eps=1e-7,
    matrix_lr=0,
)


@pytest.mark.parametrize("tied", (0, 1))
def test_ten_steps_of_adamw_equal_torch_group_by_group(tied):
    cfg = config(**TECHNIQUES["all"], **GROUP_KNOBS, tie_embeddings=tied, embed_lr=0.055)
    model = random_model(cfg)
    flat, optimiser = flattened(model, cfg)
    own = dict(
        embed=dict(lr=0.011 if tied else 0.055, betas=(0.7, 0.9), weight_decay=0.5),
        table=dict(lr=0.022, betas=(0.8, 0.99), weight_decay=0.0),
        head=dict(lr=0.044, betas=(0.6, 0.9), weight_decay=0.25),
        scalar=dict(lr=0.033, betas=(0.8, 0.9), weight_decay=0.25),
    )
    theirs = {p: nn.Parameter(p.detach().clone()) for p in model.parameters() if p.opt != "matrix"}
    groups = [
        dict(params=[q for p, q in theirs.items() if p.opt == tag], **values)
        for tag, values in own.items()
    ]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], eps=1e-7)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(10):
        flat.gradients.normal_()
        for p, q in theirs.items():
            q.grad = p.grad.clone()
        optimiser.step(ramps(lr=1 - step / 20))
        reference.step()
        for group in reference.param_groups:
            tag = next(tag for tag, g in own.items() if g["betas"] == group["betas"])
            group["lr"] = own[tag]["lr"] * (1 - (step + 1) / 20)
    for p, old in zip(model.parameters(), before):
        if p.opt == "matrix":
            assert torch.equal(p, old), "a rate of zero"
        else:
            torch.testing.assert_close(p, theirs[p], rtol=1e-4, atol=1e-6)
    assert {p.opt for p in theirs} == {"embed", "table", "scalar"} | (
        {"head"} if not tied else set()
    )


def test_l2_equals_torch_adam():
    cfg = config(adam_l2=0.3, scalar_lr=0.02)
    module = tagged()
    flat, optimiser = flattened(module, cfg)
    theirs = nn.Parameter(module.vector.detach().clone())
    reference = torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.95), weight_decay=0.3)
    for _ in range(10):
        flat.gradients.normal_()
        theirs.grad = module.vector.grad.clone()
        optimiser.step(ramps())
        reference.step()
    torch.testing.assert_close(module.vector, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", ("none", "embed", "scalar", "all"))
def test_ademamix_equals_float64_where_it_is_chosen(choice):
    cfg = config(
        **TECHNIQUES["all"],
        ademamix=choice,
        matrix_lr=0,
        **{f"{g}_lr": 0.01 for g in ("tied_embed", "table", "scalar")},
    )
    model = random_model(cfg)
    flat, optimiser = flattened(model, cfg)
    slow = dict(
        none=(), embed=("embed", "table"), scalar=("scalar",), all=("embed", "table", "scalar")
    )[choice]
    want = {p: p.detach().double() for p in model.parameters() if p.opt != "matrix"}
    memory = {p: [torch.zeros(p.shape, dtype=torch.float64) for _ in range(3)] for p in want}
    for t in range(1, 11):
        alpha, beta3 = 0.2 * t, 0.9 + 0.009 * t
        flat.gradients.normal_()
        for p, w in want.items():
            m1, v, m2 = memory[p]
            g = p.grad.double()
            m1.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            m2.mul_(beta3).add_((1 - beta3) * g)
            mean = m1 / (1 - 0.9**t) + (alpha * m2 if p.opt in slow else 0)
            want[p] = w - 0.01 * mean / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimiser.step(ramps(alpha=alpha, beta3=beta3))
    for p, w in want.items():
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-4, atol=1e-6)


def test_a_parameter_without_an_optimiser_is_refused():
    model = random_model(config())
    model.skip_weights.opt = "nobody"
    with pytest.raises(RuntimeError, match="optimiser group"):
        flattened(model, config())


# ---- Parameters that a plan does not reach ----
GATE_SPY = """
import torch, train_gpt
step, run = train_gpt.Optimiser.step, train_gpt.Trainer.run
def spying_run(self):
    train_gpt.Optimiser.trainer = self
    return run(self)
def spying_step(self, ramps):
    trainer = getattr(train_gpt.Optimiser, "trainer", None)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.opt == "scalar"] if trainer else []
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in named}
    step(self, ramps)
    if trainer:
        content = dict(before=before, after={n: p.detach().clone() for n, p in named}, lr=ramps["lr"])
        torch.save(content, trainer.rt.folder / f"{trainer.step_number}.pt")
train_gpt.Optimiser.step, train_gpt.Trainer.run = spying_step, spying_run
"""


def spied(tmp_path, spy: str):
    """A script that runs train_gpt.py with some of its methods wrapped."""
    script = tmp_path / "spied.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n{spy}\n"
        "sys.exit(train_gpt.main(sys.argv[1:], train_gpt.environment()))\n"
    )
    return script


@pytest.mark.parametrize(
    "decay", (dict(ADAM_L2=0.095, ADAM_WD=0), dict(ADAM_L2=0, ADAM_WD=0.5)), ids=("l2", "decoupled")
)
def test_a_late_loop_finds_its_gates_as_they_started(decay, toy, tmp_path):
    """Finding M1: loop gates fell by a whole learning-rate step per update before their loop began, because Adam
    normalises the decay of what has no gradient. A run's gates equal, gate for gate, those of the framework's Adam that
    were frozen until then: exactly 1 until the loop begins, moments and their bias correction from there."""
    done = train(
        toy,
        tmp_path,
        "late",
        script=spied(tmp_path, GATE_SPY),
        PRESET="depth_recurrent+tiny",
        ITERATIONS=9,
        LOOP_AT_STEP=5,
        QAT="none",
        AVERAGING="none",
        SCALAR_LR=0.02,
        **decay,
    )
    assert done.code == 0, done.err
    history = [torch.load(done.folder / f"{i}.pt", weights_only=True) for i in range(9)]
    for name, (start, _) in history[0]["before"].items():
        frozen = 5 if name == "loop_gates" else 0
        theirs = nn.Parameter(start.clone())
        kind = torch.optim.Adam if decay["ADAM_L2"] else torch.optim.AdamW
        wd = decay["ADAM_L2"] or decay["ADAM_WD"]
        reference = kind([theirs], lr=0.02, betas=(0.9, 0.999), weight_decay=wd)
        for i, seen in enumerate(history):
            reference.param_groups[0]["lr"] = 0.02 * seen["lr"]
            if i >= frozen:
                theirs.grad = seen["before"][name][1]
                reference.step()
            torch.testing.assert_close(seen["after"][name], theirs.detach(), rtol=1e-5, atol=1e-7)
            if i < frozen:
                assert torch.equal(seen["after"][name], torch.ones_like(start)), (i, name)
    moved = history[-1]["after"]["loop_gates"]
    assert (moved != 1).all(), "and they do move once the loop has begun"


def trainer_of(toy, **knobs) -> tg.Trainer:
    """A trainer of a small model, before its first step."""
    cfg = config(data_path=toy, **knobs)
    rt = tg.Runtime(cfg, {})
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics(), cfg.optim)
    return tg.Trainer(cfg, rt, tg.open_data(cfg, rt), model, tg.Numerics())


def test_rows_of_skips_and_lanes_join_with_their_plan_and_resume_so(toy):
    """Finding M1, its kind: a row of skip weights or gates joins when a plan has its slot; what no plan reaches never
    moves; a checkpoint from before or after the join continues bit for bit."""
    knobs = dict(
        num_layers=4, num_loops=2, loop_start=1, loop_end=1, loop_at_step=4, skips="gated",
        parallel="D", parallel_start=3, scalar_lr=0.02, adam_wd=0.5, adam_l2=0.1, muon_wd=0.3,
    )  # fmt: skip
    trainer = trainer_of(toy, **knobs)
    counts = [sum(len(slot.skips) for slot in plan) for plan in trainer.plans]
    assert len(counts) == 2 and counts[0] < counts[1]
    model = trainer.model
    parameters = dict(model.named_parameters())
    pieces = {}  # (name, row) -> (the framework's copy, its optimiser)
    for name, p in parameters.items():
        if p.opt == "scalar":
            rows = p.detach() if name.startswith("skip_") else p.detach().unsqueeze(0)
            for i, row in enumerate(rows):
                copied = nn.Parameter(row.clone())
                # L2 and decoupled decay at once: the framework's AdamW on a gradient with L2 added
                pieces[name, i] = copied, torch.optim.AdamW([copied], 0.02, (0.9, 0.95), 1e-8, 0.5)
    saved = {}
    for step in range(8):
        if step in (3, 6):
            saved[step] = copy.deepcopy(trainer.state())
        plan = int(step >= 4)
        rows, update = trainer.loader.next(0, 1), trainer.optimiser.step

        def spying(ramps, plan=plan, update=update):
            for (name, i), (copied, reference) in pieces.items():
                p = parameters[name]
                late = name.startswith("skip_") and i >= counts[0]
                never = "routing" in name and not name.startswith("blocks.3.")
                if never or late and plan == 0:
                    continue
                g = p.grad[i] if name.startswith("skip_") else p.grad
                copied.grad = (g + 0.1 * copied.detach()).clone()
                reference.step()
            update(ramps)

        trainer.optimiser.step = spying
        trainer.step(rows, tg.full_speed(trainer.cfg) | dict(momentum=0.9, plan=plan))
        trainer.optimiser.step = update
        for (name, i), (copied, _) in pieces.items():
            p = parameters[name].detach()
            p = p[i] if name.startswith("skip_") else p
            torch.testing.assert_close(
                p, copied.detach(), rtol=1e-4, atol=1e-6, msg=f"{step} {name}"
            )
        if step == 3:
            assert (model.skip_weights[counts[0] :] == 1).all()
    for begin, state in saved.items():
        other = trainer_of(toy, **knobs)
        other.restore(state)
        for step in range(begin, 8):
            other.step(
                other.loader.next(0, 1),
                tg.full_speed(other.cfg) | dict(momentum=0.9, plan=int(step >= 4)),
            )
        assert torch.equal(other.flat.weights, trainer.flat.weights)


@pytest.mark.parametrize("decay", tg.DECAYS)
def test_a_matrix_outside_the_plan_stands_still(decay):
    """Finding M1 for Muon: a matrix that a plan does not reach keeps its weights under every decay, and its momentum
    and second moments begin when it joins."""
    for kind in ("muon", "normuon", "rmnp"):
        knobs = dict(
            muon=kind, matrix_lr=0.1, muon_wd=0.5, muon_decay=decay, scalar_lr=0.1, adam_wd=1
        )
        module = tagged()
        cfg = config(**knobs)
        flat = tg.FlatParameters(module, ALONE)
        outside = {module.matrices[2], module.vector}
        reach = [
            {p: torch.full(p.shape, p not in outside or late) for p in module.parameters()}
            for late in (False, True)
        ]
        optimiser = tg.Optimiser(flat, cfg.optim, ALONE, torch.float32, True, reach)
        start = [p.detach().clone() for p in module.parameters()]
        for _ in range(3):
            flat.gradients.normal_()
            for p in outside:
                p.grad.zero_()
            optimiser.step(ramps(plan=0))
        for p, before in zip(module.parameters(), start):
            assert torch.equal(p, before) == (p in outside) or decay == "fixed_norm"
            if p in outside:
                torch.testing.assert_close(p.detach(), before)
        flat.gradients.normal_()
        fresh = tagged_optimiser(**knobs)
        with torch.no_grad():
            for p, q in zip(module.parameters(), fresh[0].parameters()):
                q.copy_(p)
                q.grad.copy_(p.grad)
        for mine, theirs in zip(flat.banks, fresh[1].banks):
            theirs.norms.copy_(mine.norms)
        optimiser.step(ramps(plan=1))
        fresh[2].step(ramps(plan=1))
        for p, q in zip(module.parameters(), fresh[0].parameters()):
            if p in outside:
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---- Ramps ----
def at(
    step: int = 0, frac: float = 0.0, remaining: float = 0.0, step_cost: float = 0.0
) -> tg.Progress:
    return tg.Progress(step, frac, remaining, step_cost)


def test_momentum_rises_linearly():
    cfg = config(
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500
    )
    values = [tg.RAMPS["momentum"](at(step), cfg) for step in (0, 250, 500, 501, 10**6)]
    assert values == pytest.approx([0.85, 0.90, 0.95, 0.95, 0.95])
    assert tg.RAMPS["momentum"](at(0), config(muon_momentum_warmup_steps=0)) == 0.95


def test_momentum_falls_back_over_the_last_steps():
    cfg = config(
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=10,
        muon_momentum_cooldown_steps=20,
    )
    points = {(5, 95): 0.90, (50, 50): 0.95, (80, 20): 0.95, (90, 10): 0.90, (100, 0): 0.85}
    for (step, left), value in points.items():
        for cost in (1.0, 0.25):  # counted in steps, whatever a step costs
            assert tg.RAMPS["momentum"](at(step, 0, left * cost, cost), cfg) == pytest.approx(value)
    assert tg.RAMPS["momentum"](at(50, 0.9, 1.0, 0.0), cfg) == 0.95, "not before the pace is known"


def test_weight_decay_tapers_linearly():
    cfg = config(muon_wd=0.1, wd_taper_at=0.7, wd_taper_to=0.5)
    assert [tg.RAMPS["wd"](at(frac=f), cfg) for f in (0, 0.7, 0.85, 1)] == pytest.approx(
        [1, 1, 0.75, 0.5]
    )
    assert {tg.RAMPS["wd"](at(frac=f), config(muon_wd=0.1)) for f in (0, 0.5, 1)} == {1.0}


def test_the_slow_momentum_is_warmed_up_by_its_half_life():
    cfg = config(ademamix="all", ademamix_alpha=4, ademamix_beta3=0.999, beta1=0.9)
    values = [tg.RAMPS["beta3"](at(frac=f), cfg) for f in (0, 0.25, 0.5, 1)]
    lives = [math.log(0.5, beta) - 1 for beta in values]
    assert values[0] == pytest.approx(0.9) and values[-1] == pytest.approx(0.999)
    assert np.diff(lives) == pytest.approx(
        [(lives[-1] - lives[0]) * part for part in (0.25, 0.25, 0.5)]
    )
    assert [tg.RAMPS["alpha"](at(frac=f), cfg) for f in (0, 0.5, 1)] == [0, 2, 4]
    assert tg.RAMPS["beta3"](at(frac=0), config(beta1=0)) == 0


def test_cosine_is_half_a_wave_over_the_last_part():
    cfg = config(lr_schedule="cosine", warmdown_frac=0.3, min_lr=0.01)
    values = [tg.RAMPS["lr"](at(frac=f), cfg) for f in (0, 0.7, 0.775, 0.85, 0.925, 1)]
    assert values == pytest.approx([1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.01])


def test_rows_grow_over_their_part_of_the_run():
    cfg = config(
        train_seq_len=64,
        seq_ramp_start=16,
        seq_ramp_frac=0.4,
    )
    assert tg.row_lengths(cfg) == [16, 32, 64] and tg.row_lengths(config(train_seq_len=64)) == [64]
    assert [tg.RAMPS["row"](at(frac=f), cfg) for f in (0, 0.19, 0.2, 0.39, 0.4, 1)] == [
        16,
        16,
        32,
        32,
        64,
        64,
    ]
    assert tg.RAMPS["row"](at(), config()) == 64


def test_warmdown_frac_is_constant_then_linear():
    cfg = config(lr_schedule="warmdown_frac", warmdown_frac=0.6)
    points = {0: 1, 0.2: 1, 0.4: 1, 0.7: 0.5, 0.85: 0.25, 1: 0}
    assert [tg.RAMPS["lr"](at(frac=f), cfg) for f in points] == pytest.approx(list(points.values()))
    floored = config(lr_schedule="warmdown_frac", warmdown_frac=0.6, min_lr=0.1)
    assert [tg.RAMPS["lr"](at(frac=f), floored) for f in (0, 0.7, 0.97, 1)] == pytest.approx(
        [1, 0.5, 0.1, 0.1]
    )
    assert tg.RAMPS["lr"](at(frac=1), config(lr_schedule="warmdown_frac", warmdown_frac=0)) == 1


def stand(cfg: tg.Config, step: int, elapsed: float, memory: SimpleNamespace) -> tg.Progress:
    """Trainer.progress without a trainer; `memory` keeps what it remembers between steps."""
    memory.cfg, memory.step_number = cfg, step
    return tg.Trainer.progress(memory, elapsed)


def test_warmdown_iters_without_a_clock_counts_steps():
    cfg = config(
        lr_schedule="warmdown_iters", warmdown_iters=20, iterations=100, max_wallclock_seconds=0
    )
    memory = SimpleNamespace(recent=[])
    values = [
        tg.RAMPS["lr"](stand(cfg, step, 5.0 * step, memory), cfg)
        for step in (0, 79, 80, 90, 95, 100)
    ]
    assert values == pytest.approx([1, 1, 1, 0.5, 0.25, 0])


def drive(cfg: tg.Config, seconds) -> list[tuple[float, float]]:
    """(elapsed, learning-rate multiplier) before each step of a run whose step i lasts seconds(i)."""
    memory, elapsed, step, seen = SimpleNamespace(recent=[]), 0.0, 0, []
    while elapsed < cfg.optim.max_wallclock_seconds and step < cfg.optim.iterations:
        seen.append((elapsed, tg.RAMPS["lr"](stand(cfg, step, elapsed, memory), cfg)))
        elapsed += seconds(step)
        memory.recent = (memory.recent + [seconds(step)] * (step >= 3))[
            -50:
        ]  # as the training loop remembers them
        step += 1
    return seen


@pytest.mark.parametrize("slow", (0, 1, 2))
def test_a_slow_first_step_does_not_start_the_decay(slow):
    cfg = config(
        lr_schedule="warmdown_iters", warmdown_iters=100, iterations=10**6, max_wallclock_seconds=60
    )
    seen = drive(cfg, lambda step: 30.0 if step == slow else 0.1)
    assert all(mult == 1 for elapsed, mult in seen if elapsed < 49.9), (
        "100 steps of 0.1 s: the last 10 s decay"
    )
    decay = [(elapsed, mult) for elapsed, mult in seen if elapsed >= 50.1]
    for elapsed, mult in decay:
        assert mult == pytest.approx((60 - elapsed) / 10, rel=1e-6)
    assert decay[-1][1] < 0.02


def test_warmdown_iters_obeys_whichever_limit_comes_first():
    knobs = dict(lr_schedule="warmdown_iters", warmdown_iters=100, min_lr=0.05)
    by_clock = drive(config(iterations=10**6, max_wallclock_seconds=60, **knobs), lambda step: 0.1)
    by_steps = drive(config(iterations=300, max_wallclock_seconds=60, **knobs), lambda step: 0.1)
    for seen, steps in ((by_clock, 600), (by_steps, 300)):
        mults = [mult for _, mult in seen]
        assert (
            len(mults) in (steps, steps + 1)
            and mults[0] == 1
            and mults[-1] == pytest.approx(0.05, abs=0.02)
        )
        assert mults == sorted(mults, reverse=True)
        assert sum(mult < 1 for mult in mults) == pytest.approx(100, abs=3)


def test_progress_follows_the_faster_of_clock_and_steps():
    cfg = config(iterations=100, max_wallclock_seconds=60, reserve_seconds=10)
    for step, elapsed, frac in (
        (0, 0, 0),
        (10, 25, 0.5),
        (50, 5, 0.5),
        (80, 49, 0.98),
        (3, 70, 1.0),
    ):
        assert stand(cfg, step, elapsed, SimpleNamespace(recent=[])).frac == pytest.approx(frac)


def test_qat_switches_on_at_its_part_of_the_run():
    values = [
        tg.RAMPS["qat"](at(frac=f), config(qat="ste", qat_start_frac=0.5))
        for f in (0, 0.49, 0.5, 1)
    ]
    assert values[:2] == [0, 0] and 0 < values[2] < 1e-3 and values[3] == 1
    assert tg.RAMPS["qat"](at(frac=0.75), config(qat="ste", qat_start_frac=0.5)) == pytest.approx(
        0.5
    )
    assert tg.RAMPS["qat"](at(frac=0), config(qat="ste", qat_start_frac=0)) > 0


def test_ramped_runs_train_on_the_same_text_in_shorter_rows(toy, tmp_path):
    """The text dealt is the same and every token of it is trained on once; micro-batches and ranks change nothing."""
    knobs = dict(
        ITERATIONS=8,
        SEQ_RAMP_START=16,
        SEQ_RAMP_FRAC=0.5,
        TRAIN_LOG_EVERY=1,
    )
    runs = [
        train(toy, tmp_path, "a", **knobs),
        train(toy, tmp_path, "b", MICRO_BATCH_TOKENS=64, **knobs),
        train(toy, tmp_path, "c", nproc=2, **knobs),
    ]
    for run in runs:
        assert run.code == 0, run.err
        events = metrics(run.folder, "train")
        assert [e["row"] for e in events] == [16, 16, 32, 32, 64, 64, 64, 64]
        losses = [
            [e["loss"] for e in metrics(folder, "train")] for folder in (run.folder, runs[0].folder)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    refused(train(toy, tmp_path, "d", SEQ_RAMP_START=24), "SEQ_RAMP_START=24", "TRAIN_SEQ_LEN=64")


def test_every_mid_run_switch_really_switches_compiled_code(toy, tmp_path):
    """Fake quantisation to two bits, longer rows and the loop each begin at a known step: until then the loss is that
    of a run without it, at that step it is not, and compiled code says the same as eager code."""
    base = dict(
        ITERATIONS=6,
        WARMUP_STEPS=1,
        TRAIN_LOG_EVERY=1,
        MATRIX_LR=0.05,
        MATRIX_BITS=2,
        INIT="uniform",
    )
    switches = {
        "QAT": dict(QAT="ste", QAT_START_FRAC=0.5),
        "ROWS": dict(SEQ_RAMP_START=32, SEQ_RAMP_FRAC=0.5),
        "LOOP": dict(NUM_LOOPS=1, LOOP_START=1, LOOP_END=1, ENABLE_LOOPING_AT=3),
    }
    without = {
        "QAT": dict(QAT="none"),
        "ROWS": dict(SEQ_RAMP_START=32, SEQ_RAMP_FRAC=1.0),
        "LOOP": dict(NUM_LOOPS=1, LOOP_START=1, LOOP_END=1, ENABLE_LOOPING_AT=10**6),
    }
    for name, knobs in switches.items():
        compiled = knobs | dict(
            COMPILE="on" if name == "ROWS" else "off"
        )  # the others are compiled in other tests
        eager, again, never = (
            [e["loss"] for e in metrics(run.folder, "train")]
            for run in (
                train(toy, tmp_path, f"{name}{i}", **base | what)
                for i, what in enumerate((knobs, compiled, without[name]))
            )
        )
        assert again == pytest.approx(eager, rel=1e-4), name
        assert (
            eager[:3] == pytest.approx(never[:3], rel=1e-6) and abs(eager[3] - never[3]) > 1e-3
        ), name


# ---- Averaging ----
def averager(kind: str, size: int = 50, **knobs):
    """(live weights, averager)."""
    weights = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return weights, tg.AVERAGERS[kind](weights, config(averaging=kind, **knobs).optim)


def follow(weights: Tensor, average, steps: int, lr: float = 0.1) -> list[Tensor]:
    """Weights after each of some steps of a random walk."""
    history = []
    for step in range(1, steps + 1):
        weights.normal_()
        history.append(weights.double().clone())
        average.update(step, lr)
    return history


def test_ema_equals_its_closed_form():
    weights, average = averager("ema", ema_decay=0.9)
    history, decay = [weights.double().clone()], 0.9
    history += follow(weights, average, 7)
    parts = [decay**7 * history[0]] + [
        (1 - decay) * decay ** (7 - i) * history[i] for i in range(1, 8)
    ]
    assert torch.equal(weights.double(), history[-1]), "averaging leaves the live weights alone"
    average.apply(None)
    torch.testing.assert_close(weights.double(), torch.stack(parts).sum(0), rtol=1e-5, atol=1e-6)


def test_swa_is_the_mean_of_late_snapshots():
    weights, average = averager("swa", swa_start=0.5, swa_every=3)
    follow(weights, average, 6, lr=0.5)  # too early
    history = follow(weights, average, 10, lr=0.49)
    assert "3 snapshots" in average.apply(None)
    want = torch.stack([history[i] for i in (2, 5, 8)]).mean(0)
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-6)
    weights, average = averager("swa")
    before = weights.clone()
    assert "no snapshot" in average.apply(None) and torch.equal(weights, before)


def distance_to(goal: Tensor, weights: Tensor):
    """A held-out loss: the mean square distance of the live weights to a goal."""
    return lambda: float((weights - goal).double().square().mean())


def test_weighted_swa_weighs_the_last_snapshots_by_their_loss():
    weights, average = averager(
        "iw_swa", swa_start=1, swa_every=2, swa_snapshots=3, swa_temperature=0.5
    )
    history = follow(weights, average, 10)
    loss, kept = distance_to(torch.zeros(50), weights), [history[i] for i in (5, 7, 9)]
    losses = np.array([float((h.float()).double().square().mean()) for h in kept])
    shares = np.exp(-(losses - losses.min()) / 0.5)
    assert all(f":{share:.3f}" in average.apply(loss) for share in shares / shares.sum())
    want = sum(share * h for share, h in zip(shares / shares.sum(), kept))
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-6)


def test_a_greedy_soup_keeps_what_helps():
    weights, average = averager("soup", size=2, swa_start=1, swa_every=1)
    points = torch.tensor([[1.0, 0.1], [-0.9, 0.1], [5.0, 5.0], [1.3, 0.0]])
    for step, point in enumerate(points, 1):
        weights.copy_(point)
        average.update(step, 0.1)
    loss = distance_to(torch.zeros(2), weights)
    average.apply(loss)
    # best first: -0.9; with 1.0 the mean is (0.05, 0.1), better; with 1.3 it is worse, with (5, 5) far worse
    torch.testing.assert_close(weights, points[:2].mean(0))
    best = min(float((p**2).mean()) for p in points)
    assert loss() <= best, "never worse than the best snapshot"
    for seed in range(20):
        weights, average = averager("soup", size=8, swa_start=1, swa_every=1)
        torch.manual_seed(seed)
        history, loss = follow(weights, average, 8), distance_to(torch.zeros(8), weights)
        average.apply(loss)
        assert loss() <= min(float(h.square().mean()) for h in history) + 1e-6


@pytest.mark.parametrize("kind", tg.AVERAGERS)
def test_averages_continue_from_their_state(kind):
    knobs = dict(swa_start=1, swa_every=2, swa_snapshots=3)
    weights, average = averager(kind, **knobs)
    torch.manual_seed(1)
    follow(weights, average, 5)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    walk = follow(weights, average, 4)
    loss = distance_to(torch.ones(50), weights)
    average.apply(loss)
    other, resumed = averager(kind, **knobs)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step, w in enumerate(walk, 1):
        other.copy_(w)
        resumed.update(step, 0.1)
    resumed.apply(distance_to(torch.ones(50), other))
    assert torch.equal(other, weights)


def test_no_averaging_exports_the_last_weights():
    weights, last = averager("none")
    before = weights.clone()
    last.update(1, 0.1)
    last.apply(None)
    assert torch.equal(weights, before) and last.state_dict() == {} and not last.needs_scores


@pytest.mark.parametrize("kind", [kind for kind in tg.AVERAGERS if kind != "none"])
def test_what_was_averaged_is_what_is_exported(kind, toy, tmp_path):
    """The whole script: weights after every step are written down, averaged here, and compared with the artifact."""
    spy = """
step = train_gpt.Trainer.step
def spying_step(self, rows, ramps):
    loss = step(self, rows, ramps)
    if self.clock.since is not None:
        import torch
        torch.save(dict(weights=self.flat.weights.clone(), names=[[n for n, p in self.model.named_parameters()
                   if p is q][0] for q in self.flat.params]), self.rt.folder / f"{self.step_number}.pt")
    return loss
train_gpt.Trainer.step = spying_step
scored = train_gpt.Trainer.held_out_loss
def spying_loss(self):
    print("scored", len(self.held_out), self.data.train.length)
    return scored(self)
train_gpt.Trainer.held_out_loss = spying_loss
"""
    script = tmp_path / "spied.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n{spy}\n"
        "sys.exit(train_gpt.main(sys.argv[1:], train_gpt.environment()))\n"
    )
    done = train(
        toy,
        tmp_path,
        kind,
        script=script,
        AVERAGING=kind,
        ITERATIONS=12,
        SWA_START=0.9,
        SWA_EVERY=2,
        EMA_DECAY=0.8,
        MATRIX_BITS=16,
        EMBED_BITS=16,
        SWA_TEMPERATURE=0.5,
        WARMUP_STEPS=0,
    )
    assert done.code == 0, done.err
    history = [torch.load(done.folder / f"{i}.pt", weights_only=True) for i in range(12)]
    walk = torch.stack([h["weights"].double() for h in history])
    lr = [e["lr"] for e in metrics(done.folder, "train")]
    taken = [i for i in range(12) if lr[i] < 0.9 and (i + 1) % 2 == 0][-8:]
    assert len(taken) >= 3
    _, tensors = tg.unpack_artifact((done.folder / "model.golf").read_bytes())
    exported = torch.cat(
        [tensors[name].dequant().flatten() for name in history[0]["names"]]
    ).double()
    if kind == "ema":
        torch.manual_seed(1337)
        start = dict(tg.GPT(config().model, 1024, tg.Numerics()).named_parameters())
        want = torch.cat([start[name].detach().flatten() for name in history[0]["names"]]).double()
        for w in walk:
            want = 0.8 * want + 0.2 * w
        assert distance(exported, want) < 2e-3 < 0.1 * distance(exported, walk[-1])
    else:
        log = (done.folder / "log.txt").read_text()
        if kind == "swa":
            shares = np.full(len(taken), 1 / len(taken))
        else:
            line = next(x for x in log.splitlines() if x.startswith("averaging:")).split()[1:]
            assert len(line) == len(taken)
            shares = np.array([float(pair.split(":")[1]) for pair in line])
            losses = np.array([float(pair.split(":")[0]) for pair in line])
            weighted = np.exp(-(losses - losses.min()) / 0.5)
            if kind == "iw_swa":
                assert shares == pytest.approx(weighted / weighted.sum(), abs=0.01)
            assert "scored 512 " in done.out and "phase:average" in log
        want = sum(share * walk[i] for share, i in zip(shares, taken))
        assert distance(exported, want) < 2e-3
        assert kind == "soup" or distance(exported, walk[-1]) > 3 * distance(exported, want), (
            "not the last weights"
        )


def test_held_out_text_is_never_trained_on(toy):
    stream = tg.TokenStream(toy, "train", 1024)
    total, last = len(stream), stream.read(len(stream) - 700, 700)
    held = stream.hold_out(700)
    assert np.array_equal(held, last) and len(stream) == total - 700
    ends, read = [], stream.read
    stream.read = lambda start, count: ends.append(start + count) or read(start, count)
    for kind in tg.LOADERS:
        loader = tg.LOADERS[kind](stream, config(loader=kind))
        for _ in range(2 * loader.rows_in_epoch() // loader.rows + 1):
            loader.next(0, 1)
        loader.reader.shutdown()
        assert total - 700 - 2 * loader.seq < max(ends) <= total - 700 and loader.epoch >= 1
        ends.clear()
    with pytest.raises(tg.UserError, match="HELD_OUT_TOKENS"):
        stream.hold_out(total)


def test_unknown_variants_are_refused_by_name(toy, tmp_path):
    refused(train(toy, tmp_path, "x", MUON="shampoo"), "MUON=shampoo", "turbo_muon")
    refused(
        train(toy, tmp_path, "y", AVERAGING="mean", LR_SCHEDULE="step"),
        "AVERAGING=mean",
        "LR_SCHEDULE=step",
        lines=2,
    )
    refused(
        train(toy, tmp_path, "v", AVERAGING="soup", HELD_OUT_TOKENS=64),
        "HELD_OUT_TOKENS=64",
        "TRAIN_SEQ_LEN=64",
    )
    refused(
        train(toy, tmp_path, "w", AVERAGING="iw_swa", HELD_OUT_TOKENS=10**7),
        "HELD_OUT_TOKENS=10000000",
    )
    done = train(
        toy,
        tmp_path,
        "z",
        RUN_MODE="plan",
        MUON_TABLE="library",
        ADEMAMIX_ALPHA=3,
        **{k: v for k, v in FAST.items() if k not in ("PRESET",)},
    )
    assert "MUON_TABLE has no effect unless MUON == turbo_muon" in done.out


def test_every_registry_entry_is_a_choice_of_its_knob():
    for knob, registry in (
        ("muon", tg.MUON),
        ("muon_decay", tg.DECAYS),
        ("averaging", tg.AVERAGERS),
        ("lr_schedule", tg.LR_SCHEDULES),
        ("muon_post_norm", tg.POST_NORMS),
        ("muon_table", tg.TURBO),
    ):
        assert tg.KNOBS[knob][1].metadata["choices"] == tuple(registry), knob
    assert list(tg.full_speed(config())) == list(tg.RAMPS)

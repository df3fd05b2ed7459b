"""Orthogonalisation against float64 SVD, Muon against plain loops and torch, flat memory, ramps and averaging."""
import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import train_gpt as tg
from helpers import TECHNIQUES, config, random_batch, random_model, token_losses

ALONE = SimpleNamespace(rank=0, world=1)
SHAPES = [(24, 24)] + [(48, 16)] * 3 + [(16, 48)] * 2  # square, tall, wide; the last two stacked
QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def polar(u: Tensor) -> Tensor:
    """The exact polar factor in float64."""
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    return left @ right


def tagged(shapes=SHAPES, seed: int = 0) -> nn.Module:
    """A module of matrices that Muon owns and one vector that it does not."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.matrices = nn.ParameterList(tg.param(shape, tg.normal(1.0), "matrix", "matrix") for shape in shapes)
    module.vector = tg.param((5,), tg.normal(1.0), "scalar", "keep")
    return module


def flat_muon(seed: int = 0, rt=ALONE, dtype=torch.float32, **knobs):
    """(module, its flat memory, a Muon over it)."""
    module = tagged(seed=seed)
    flat = tg.FlatParameters(module)
    return module, flat, tg.Muon(flat, config(**knobs).optim, rt, dtype)


# ---- Stages ----
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("stage, closeness", ((tg.newton_schulz, 0.97), (tg.polar_express, 0.99)))
@pytest.mark.parametrize("case", ("square", "tall", "wide", "row-imbalanced"))
def test_orthogonalisation_is_close_to_the_polar_factor(case, stage, closeness, dtype):
    torch.manual_seed(0)
    u = torch.randn(2, *{"tall": (1024, 256), "wide": (256, 1024)}.get(case, (256, 256)))
    if case == "row-imbalanced":
        u = tg.row_norm(u * 10 ** (4 * torch.rand(2, 256, 1) - 2), {}, {})
    x = stage(u, {}, dict(dtype=dtype))
    assert x.dtype == torch.float32 and x.shape == u.shape
    cosine = nn.functional.cosine_similarity(x.double().flatten(1), polar(u).flatten(1))
    assert cosine.mean() >= closeness
    assert torch.linalg.matrix_norm(x.double(), 2).max() <= 1.25


@pytest.mark.parametrize("shape", ((24, 24), (48, 16), (16, 48)))
@pytest.mark.parametrize("name", ("newton_schulz", "polar_express"))
def test_orthogonalisation_is_its_polynomial_of_the_singular_values(name, shape):
    torch.manual_seed(1)
    u = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) * (1.02 if name == "polar_express" else 1))
    for a, b, c in POLAR_EXPRESS if name == "polar_express" else (QUINTIC,) * 5:
        s = a * s + b * s**3 + c * s**5
    got = getattr(tg, name)(u, {}, dict(dtype=torch.float32))
    torch.testing.assert_close(got.double(), left * s[:, None] @ right, rtol=1e-3, atol=2e-4)


def test_stacked_matrices_are_orthogonalised_one_by_one():
    torch.manual_seed(2)
    for shape in {*SHAPES}:
        u = torch.randn(4, *shape) * torch.tensor([1e-4, 1.0, 30.0, 0.0])[:, None, None]
        for stage in (tg.newton_schulz, tg.polar_express, tg.row_norm, tg.aspect_scale):
            hp = dict(dtype=torch.float32)
            single = torch.stack([stage(m[None], {}, hp)[0] for m in u])
            torch.testing.assert_close(stage(u, {}, hp), single, rtol=1e-4, atol=1e-6)
            assert not single[3].any(), "a zero gradient moves nothing"


def test_simple_stages_equal_their_formulas():
    torch.manual_seed(3)
    u, state, momentum = torch.randn(2, 6, 4), {}, 0.9
    buffer = torch.zeros(2, 6, 4, dtype=torch.float64)
    for _ in range(4):
        g = torch.randn(2, 6, 4)
        buffer = momentum * buffer + g.double()
        out = tg.nesterov(g, state, dict(momentum=torch.tensor(momentum)))
        torch.testing.assert_close(out.double(), g + momentum * buffer, rtol=1e-5, atol=1e-6)
    rows = tg.row_norm(u * 100, {}, {})
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 6))
    torch.testing.assert_close(rows * u.norm(dim=-1, keepdim=True), u)
    assert not tg.row_norm(torch.zeros(1, 3, 3), {}, {}).any()
    torch.testing.assert_close(tg.aspect_scale(u, {}, {}), u * 1.5**0.5)       # 6 rows, 4 columns
    assert torch.equal(tg.aspect_scale(u.mT, {}, {}), u.mT)                    # wide: as it is


# ---- Muon ----
def plain_muon(w: Tensor, gradients: list[Tensor], lrs, momenta, wd: float, row_normed: bool) -> Tensor:
    """The published update of one matrix in float64."""
    w, buffer = w.double(), torch.zeros(w.shape, dtype=torch.float64)
    for g, lr, mu in zip(gradients, lrs, momenta):
        buffer = mu * buffer + g.double()
        x = g.double() + mu * buffer
        if row_normed:
            x = x / x.norm(dim=1, keepdim=True)
        x = x / x.norm()
        if w.size(0) > w.size(1):
            x = x.T
        for _ in range(5):
            gram = x @ x.T
            x = QUINTIC[0] * x + (QUINTIC[1] * gram + QUINTIC[2] * gram @ gram) @ x
        if w.size(0) > w.size(1):
            x = x.T
        w = w * (1 - lr * wd) - lr * math.sqrt(max(1, w.size(0) / w.size(1))) * x
    return w


@pytest.mark.parametrize("kind", ("muon", "muoneq_r"))
@pytest.mark.parametrize("wd", (0.0, 0.3))
def test_ten_steps_of_muon_equal_a_plain_loop(kind, wd):
    module, flat, muon = flat_muon(muon=kind, matrix_lr=0.05, muon_wd=wd)
    start = [p.detach().clone() for p in module.matrices]
    scales, momenta = [1 - 0.05 * i for i in range(10)], [0.85 + 0.01 * i for i in range(10)]
    gradients = []
    for scale, momentum in zip(scales, momenta):
        flat.gradients.normal_()
        gradients.append([p.grad.clone() for p in module.matrices])
        muon.step(scale, momentum)
    assert torch.equal(module.vector, tagged().vector), "Muon leaves other parameters alone"
    for i, p in enumerate(module.matrices):
        lrs = [0.05 * scale for scale in scales]
        want = plain_muon(start[i], [g[i] for g in gradients], lrs, momenta, wd, kind == "muoneq_r")
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-3, atol=1e-3)
        assert (want - start[i]).abs().mean() > 0.01, "ten steps move the weights"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_agrees_with_torch():
    """torch averages the momentum, b <- mu*b + (1-mu)*g; orthogonalisation forgets that factor. Both run it in bf16."""
    module, flat, muon = flat_muon(dtype=torch.bfloat16, matrix_lr=0.05, muon_wd=0.3)
    theirs = [nn.Parameter(p.detach().clone()) for p in module.matrices]
    start = [p.detach().clone() for p in module.matrices]
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, momentum=0.95, nesterov=True)
    for _ in range(6):
        flat.gradients.normal_()
        for p, q in zip(module.matrices, theirs):
            q.grad = p.grad.clone()
        muon.step(1.0, 0.95)
        reference.step()
    for p, q, before in zip(module.matrices, theirs, start):
        moved = (q - before).norm()
        assert (p - q).norm() < 0.02 * moved


def test_shares_of_the_ranks_add_up_to_the_whole_update():
    def update(rank: int, world: int) -> Tensor:
        rt = SimpleNamespace(rank=rank, world=world, all_reduce=lambda x: x)  # each keeps to its own share
        _, flat, muon = flat_muon(rt=rt, matrix_lr=1.0)
        before = flat.weights.clone()
        flat.gradients.copy_(torch.randn(flat.gradients.shape, generator=torch.Generator().manual_seed(7)))
        muon.step(1.0, 0.9)
        return flat.weights - before

    whole = update(0, 1)
    for world in (2, 3, 8):
        parts = torch.stack([update(rank, world) for rank in range(world)])
        torch.testing.assert_close(parts.sum(0), whole, rtol=1e-4, atol=1e-5)
        assert ((parts != 0).sum(0) <= 1).all(), "each entry has one owner"


def test_muon_continues_bit_identically_from_its_state():
    def steps(flat, muon, seeds):
        for seed in seeds:
            flat.gradients.copy_(torch.randn(flat.gradients.shape, generator=torch.Generator().manual_seed(seed)))
            muon.step(0.7, 0.9)

    _, flat, muon = flat_muon()
    steps(flat, muon, range(3))
    file = io.BytesIO()
    torch.save(dict(weights=flat.weights, muon=muon.state_dict()), file)
    steps(flat, muon, range(3, 6))
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    results = []
    for state in (saved["muon"], [{} for _ in muon.stacks]):
        _, other, resumed = flat_muon(seed=9)
        other.weights.copy_(saved["weights"])
        resumed.load_state_dict(copy.deepcopy(state))
        steps(other, resumed, range(3, 6))
        results.append(torch.equal(other.weights[:-5], flat.weights[:-5]))
    assert results == [True, False], "the state is all it takes, and it is needed"


# ---- Flat memory ----
def test_flat_memory_is_what_the_modules_see():
    cfg = config(**TECHNIQUES["all"])
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 2, 16)
    before = token_losses(model, ids, targets)
    flat = tg.FlatParameters(model)
    assert torch.equal(token_losses(model, ids, targets), before), "flattening changes no value"
    assert flat.weights.numel() == flat.gradients.numel() - 1 == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in flat.params} == {id(p) for p in model.parameters()}
    for p in model.parameters():
        for part, whole in ((p, flat.weights), (p.grad, flat.gradients)):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    flat.weights.copy_(torch.arange(flat.weights.numel()))
    starts = sorted((int(p.flatten()[0]), p.numel()) for p in model.parameters())
    assert starts[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(starts, starts[1:])), "no gap, no overlap"


def test_stacks_hold_every_matrix_once():
    model = random_model(config(num_layers=3, **TECHNIQUES["bigram"]))
    flat = tg.FlatParameters(model)
    flat.gradients.normal_()
    owned = []
    for weights, gradients in flat.stacks():
        assert weights.shape == gradients.shape and weights.dim() == 3
        for w, g in zip(weights, gradients):
            owner = [p for p in model.parameters() if p.data_ptr() == w.data_ptr()]
            assert len(owner) == 1 and torch.equal(owner[0], w) and torch.equal(owner[0].grad, g)
            owned.append(id(owner[0]))
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.opt == "matrix")
    assert len({w.shape[1:] for w, _ in flat.stacks()}) == len(flat.stacks()), "one stack per shape"


def test_gradients_accumulate_in_the_flat_vector():
    cfg = config(**TECHNIQUES["all"])
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 2, 16)
    plan = tg.schedule(cfg.model)
    want = dict(zip((name for name, _ in model.named_parameters()),
                    torch.autograd.grad(model(ids, targets, plan)[0], list(model.parameters()))))
    flat = tg.FlatParameters(model)
    for times in (1, 2):
        model(ids, targets, plan)[0].backward()
        for name, p in model.named_parameters():
            assert p.grad.untyped_storage().data_ptr() == flat.gradients.untyped_storage().data_ptr()
            torch.testing.assert_close(p.grad, times * want[name], rtol=1e-4, atol=1e-5)
    assert flat.gradients[-1] == 0, "the last number is not a gradient"


def test_an_optimiser_step_moves_the_flat_weights_and_lowers_the_loss():
    cfg = config(tied_embed_lr=0.01, scalar_lr=0.01, matrix_lr=0.01)
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 4, 16)
    flat, plan = tg.FlatParameters(model), tg.schedule(cfg.model)
    muon, adam = tg.Muon(flat, cfg.optim, ALONE, torch.float32), tg.adamw(model, cfg.optim)
    before, losses = flat.weights.clone(), []
    for _ in range(5):
        flat.gradients.zero_()
        loss = model(ids, targets, plan)[0] / ids.numel()
        loss.backward()
        muon.step(1.0, 0.9)
        adam.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for p, offset in zip(flat.params, flat.offsets):
        assert torch.equal(p.flatten(), flat.weights[offset:offset + p.numel()])
        moved = (p.flatten() != before[offset:offset + p.numel()]).float().mean()
        assert moved > (0 if p.opt == "embed" else 0.9), "only unseen tokens may rest"


@pytest.mark.parametrize("bound", (0.3, 1e6, 0.0))
def test_clipping_equals_torch_and_spares_the_loss(bound):
    module = tagged()
    flat = tg.FlatParameters(module)
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
    assert flat.gradients[-1] == before[-1]
    assert torch.equal(flat.gradients, before) == (bound != 0.3)


# ---- AdamW groups ----
def test_adamw_owns_every_other_parameter_once_at_its_rate():
    cfg = config(**TECHNIQUES["all"], tied_embed_lr=0.011, table_lr=0.022, scalar_lr=0.033, adam_wd=0.1, beta1=0.8,
                 beta2=0.9, adam_eps=1e-7)
    model = random_model(cfg)
    adam = tg.adamw(model, cfg.optim)
    rate = {id(p): (g["lr"], g["base_lr"]) for g in adam.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in adam.param_groups) == len(rate)
    for name, p in model.named_parameters():
        if name.endswith(".weight"):
            assert id(p) not in rate, f"{name} belongs to Muon"
        else:
            lr = {"embed": 0.011, "embed_sites.0.table": 0.022}.get(name, 0.033)
            assert rate[id(p)] == (lr, lr), name
    for group in adam.param_groups:
        assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 and group["weight_decay"] == 0.1


def test_a_parameter_without_an_optimiser_is_refused():
    cfg = config()
    model = random_model(cfg)
    model.skip_weights.opt = "nobody"
    with pytest.raises(RuntimeError, match="optimiser group"):
        tg.adamw(model, cfg.optim)


# ---- Ramps ----
def at(step: int = 0, frac: float = 0.0, remaining: float = 0.0, step_cost: float = 0.0) -> tg.Progress:
    return tg.Progress(step, frac, remaining, step_cost)


def test_momentum_rises_linearly():
    cfg = config(muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500)
    values = [tg.RAMPS["momentum"](at(step), cfg) for step in (0, 250, 500, 501, 10**6)]
    assert values == pytest.approx([0.85, 0.90, 0.95, 0.95, 0.95])
    assert tg.RAMPS["momentum"](at(0), config(muon_momentum_warmup_steps=0)) == 0.95


def test_warmdown_frac_is_constant_then_linear():
    cfg = config(lr_schedule="warmdown_frac", warmdown_frac=0.6)
    points = {0: 1, 0.2: 1, 0.4: 1, 0.7: 0.5, 0.85: 0.25, 1: 0}
    assert [tg.RAMPS["lr"](at(frac=f), cfg) for f in points] == pytest.approx(list(points.values()))
    floored = config(lr_schedule="warmdown_frac", warmdown_frac=0.6, min_lr=0.1)
    assert [tg.RAMPS["lr"](at(frac=f), floored) for f in (0, 0.7, 0.97, 1)] == pytest.approx([1, 0.5, 0.1, 0.1])
    assert tg.RAMPS["lr"](at(frac=1), config(lr_schedule="warmdown_frac", warmdown_frac=0)) == 1


def stand(cfg: tg.Config, step: int, elapsed: float, memory: SimpleNamespace) -> tg.Progress:
    """Trainer.progress without a trainer; `memory` keeps what it remembers between steps."""
    memory.cfg, memory.step_number = cfg, step
    return tg.Trainer.progress(memory, elapsed)


def test_warmdown_iters_without_a_clock_counts_steps():
    cfg = config(lr_schedule="warmdown_iters", warmdown_iters=20, iterations=100, max_wallclock_seconds=0)
    memory = SimpleNamespace(recent=[])
    values = [tg.RAMPS["lr"](stand(cfg, step, 5.0 * step, memory), cfg) for step in (0, 79, 80, 90, 95, 100)]
    assert values == pytest.approx([1, 1, 1, 0.5, 0.25, 0])


def drive(cfg: tg.Config, seconds) -> list[tuple[float, float]]:
    """(elapsed, learning-rate multiplier) before each step of a run whose step i lasts seconds(i)."""
    memory, elapsed, step, seen = SimpleNamespace(recent=[]), 0.0, 0, []
    while elapsed < cfg.optim.max_wallclock_seconds and step < cfg.optim.iterations:
        seen.append((elapsed, tg.RAMPS["lr"](stand(cfg, step, elapsed, memory), cfg)))
        elapsed += seconds(step)
        memory.recent = (memory.recent + [seconds(step)] * (step >= 3))[-50:]  # as the training loop remembers them
        step += 1
    return seen


@pytest.mark.parametrize("slow", (0, 1, 2))
def test_a_slow_first_step_does_not_start_the_decay(slow):
    cfg = config(lr_schedule="warmdown_iters", warmdown_iters=100, iterations=10**6, max_wallclock_seconds=60)
    seen = drive(cfg, lambda step: 30.0 if step == slow else 0.1)
    assert all(mult == 1 for elapsed, mult in seen if elapsed < 49.9), "100 steps of 0.1 s: the last 10 s decay"
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
        assert len(mults) in (steps, steps + 1) and mults[0] == 1 and mults[-1] == pytest.approx(0.05, abs=0.02)
        assert mults == sorted(mults, reverse=True)
        assert sum(mult < 1 for mult in mults) == pytest.approx(100, abs=3)


def test_progress_follows_the_faster_of_clock_and_steps():
    cfg = config(iterations=100, max_wallclock_seconds=60, reserve_seconds=10)
    for step, elapsed, frac in ((0, 0, 0), (10, 25, 0.5), (50, 5, 0.5), (80, 49, 0.98), (3, 70, 1.0)):
        assert stand(cfg, step, elapsed, SimpleNamespace(recent=[])).frac == pytest.approx(frac)


def test_qat_switches_on_at_its_part_of_the_run():
    values = [tg.RAMPS["qat"](at(frac=f), config(qat="ste", qat_start_frac=0.5)) for f in (0, 0.49, 0.5, 1)]
    assert values == [0, 0, 1, 1]
    assert tg.RAMPS["qat"](at(frac=0), config(qat="ste", qat_start_frac=0)) == 1


# ---- Averaging ----
def test_ema_equals_its_closed_form():
    cfg, decay = config(averaging="ema", ema_decay=0.9).optim, 0.9
    weights = torch.randn(50)
    history, average = [weights.double().clone()], tg.AVERAGERS["ema"](weights, cfg)
    for _ in range(7):
        weights.normal_()
        history.append(weights.double().clone())
        average.update()
    parts = [decay**7 * history[0]] + [(1 - decay) * decay**(7 - i) * history[i] for i in range(1, 8)]
    saved = {name: value.clone() for name, value in average.state_dict().items()}
    assert torch.equal(weights.double(), history[-1]), "averaging leaves the live weights alone"
    average.apply()
    torch.testing.assert_close(weights.double(), torch.stack(parts).sum(0), rtol=1e-5, atol=1e-6)
    other = torch.zeros(50)
    resumed = tg.AVERAGERS["ema"](other, cfg)
    resumed.load_state_dict(saved)
    resumed.apply()
    assert torch.equal(other, weights)


def test_no_averaging_exports_the_last_weights():
    weights = torch.randn(9)
    before, last = weights.clone(), tg.AVERAGERS["none"](weights, config().optim)
    last.update()
    last.apply()
    assert torch.equal(weights, before) and last.state_dict() == {}

"""Rounding and its error bounds, clips, GPTQ, the training grid against the export grid, filling the budget."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg
from conftest import official
from helpers import ALONE, TECHNIQUES, config, random_batch, random_model
from running import train

QUANTILE = 0.9999984
BITS = (2, 3, 4, 5, 6, 7, 8)
some_bits = st.sampled_from(BITS)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None)


def random_rows(seed: int, columns: int, low: float = -2, high: float = 2) -> Tensor:
    """Four rows whose sizes span 10^low to 10^high."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (low + (high - low) * torch.rand(4, 1, generator=generator))
    return torch.randn(4, columns, generator=generator) * sizes


# ---- Round to nearest ----
@quick
@given(seeds, st.integers(1, 700), some_bits, st.floats(0.5, 1))
def test_error_is_at_most_half_a_scale_inside_the_clip(seed, columns, bits, quantile):
    w, top = random_rows(seed, columns, -1, 2), 2 ** (bits - 1) - 1
    stored = tg.RoundToNearest(bits, quantile, 0.0).fit(w)
    clip = torch.quantile(w.abs().double(), quantile, dim=1, keepdim=True)
    scale = stored.scale.double()[:, None]
    inside = w.abs() <= clip
    error = (stored.dequant().double() - w.double()).abs()
    assert (error <= 0.5001 * scale + 1e-12)[inside].all()
    torch.testing.assert_close(scale, clip / top, rtol=1e-3, atol=2**-14)  # fp16: 11 bits
    assert (stored.dequant().abs().double() <= top * scale)[~inside].all(), "what is outside is clipped"


@quick
@given(seeds, st.integers(1, 300), some_bits, st.floats(-38, 38))
def test_levels_and_scales_fit_their_types_for_rows_of_any_size(seed, columns, bits, exponent):
    w, top = random_rows(seed, columns, -1, 0) * 10.0**exponent, 2 ** (bits - 1) - 1
    w[0], w[1, 0], w[2] = 0, 1e-30, w[2].sign() * 1e30
    stored = tg.RoundToNearest(bits, QUANTILE, 0.0).fit(w)
    assert stored.values.dtype == torch.int8 and stored.scale.dtype == torch.float16
    assert stored.values.shape == w.shape and stored.scale.shape == (4,)
    assert stored.values.min() >= -top and stored.values.max() <= top
    assert stored.scale.isfinite().all() and (stored.scale > 0).all()
    back = stored.dequant()
    assert back.dtype == torch.float32 and back.isfinite().all() and not back[0].any()
    assert (stored.values[2].abs() == top).all() and torch.equal(back[2].sign(), w[2].sign())


@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_used_and_the_grid_is_symmetric(bits):
    top = 2 ** (bits - 1) - 1
    w = torch.linspace(-1, 1, 4097)[None]
    stored = tg.RoundToNearest(bits, 1.0, 0.0).fit(w)
    assert stored.values.unique().tolist() == list(range(-top, top + 1))
    assert torch.equal(tg.RoundToNearest(bits, 1.0, 0.0).fit(-w).values, -stored.values)


@quick
@given(seeds, st.integers(1, 2000), st.one_of(st.floats(0, 1), st.sampled_from((0.0, 0.5, QUANTILE, 1.0))))
def test_row_quantile_is_the_linear_one(seed, columns, q):
    a = random_rows(seed, columns).abs()
    want = torch.quantile(a.double(), q, dim=1)
    torch.testing.assert_close(tg.row_quantile(a, q).double(), want, rtol=1e-6, atol=0)


@quick
@given(seeds, st.integers(1, 300))
def test_scale_floor_of_one_gives_the_published_int8_scales(seed, columns):
    w = random_rows(seed, columns, -3, 2)
    clip = np.quantile(w.abs().double().numpy(), QUANTILE, axis=1)
    stored = tg.RoundToNearest(8, QUANTILE, 1.0).fit(w)
    np.testing.assert_allclose(stored.scale.double().numpy(), np.maximum(clip, 1) / 127, rtol=2**-11 + 1e-6)
    small = w.abs().amax(1) < 0.5 / 127
    assert not stored.values[small].any(), "rows below half the floor's step vanish"
    adaptive = tg.RoundToNearest(8, QUANTILE, 0.0).fit(w)
    assert adaptive.values[w.abs().amax(1) > 2**-14].any(1).all(), "without the floor none above the least scale does"


def test_cast_stores_the_float_type():
    w = torch.tensor([[1.0, 0.1, 70000.0], [-1e-9, 3.14159265, 2.0]])
    half, full = tg.Cast(torch.float16).fit(w), tg.Cast(torch.float32).fit(w)
    assert half.scale is None and half.values.dtype == torch.float16 and torch.equal(half.values, w.half())
    assert full.scale is None and torch.equal(full.dequant(), w)
    assert half.dequant().dtype == torch.float32


# ---- The training grid ----
def rules():
    return [tg.RoundToNearest(bits, q, floor) for bits in BITS for q, floor in ((QUANTILE, 0.0), (0.9, 0.0))] + [
        tg.RoundToNearest(8, QUANTILE, 1.0), tg.Cast(torch.float16)]


def awkward(rows: int = 40, columns: int = 96) -> Tensor:
    """Rows of very different sizes, with a zero row, a tiny one and entries that lie on rounding borders."""
    torch.manual_seed(0)
    w = torch.randn(rows, columns) * 10 ** (5 * torch.rand(rows, 1) - 3)
    w[0], w[1] = 0, 1e-9
    w[2] = torch.linspace(-4, 4, columns).mul(2).round() / 2
    return w


def fake(rule, on: float) -> tg.FakeQuant:
    site = tg.FakeQuant(rule)
    site.on.fill_(on)
    return site


@pytest.mark.parametrize("rule", rules(), ids=str)
def test_fake_quantisation_is_the_export_in_value_and_the_identity_in_gradient(rule):
    w, upstream = awkward().requires_grad_(), torch.randn(40, 96)
    out = fake(rule, 1)(w)
    assert torch.equal(out, rule.fit(w.detach()).dequant()) and not torch.equal(out, w)
    out.backward(upstream)
    assert torch.equal(w.grad, upstream)
    w.grad = None
    out = fake(rule, 0)(w)
    assert torch.equal(out, w)
    out.backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_switch_works_inside_a_compiled_graph(monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    linear, x = tg.Linear(24, 16), torch.eye(24)
    linear.weight_sites.append(fake(tg.RoundToNearest(3, QUANTILE, 0.0), 0))
    forward, site = tg.compiled(linear, tg.Numerics(compile=True)), linear.weight_sites[0]
    grid = site.rule.fit(linear.weight.detach()).dequant()
    for on, want in ((0, linear.weight), (1, grid), (0, linear.weight), (1, grid)):
        site.on.fill_(on)
        torch.testing.assert_close(forward(x), want.T, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("bits", (6, 8))
def test_compiled_training_grid_is_the_export_grid(bits):
    """Inductor computes in fp32 what is written in fp16 unless it cannot, so this needs the real compiler."""
    if not tg.can_compile():
        pytest.skip("no compiler on this machine")
    torch._dynamo.reset()
    site, w = fake(tg.RoundToNearest(bits, QUANTILE, 0.0), 1), awkward(200, 256)
    compiled = tg.compiled(site, tg.Numerics(compile=True))
    assert torch.equal(compiled(w), site.rule.fit(w).dequant())


def test_qat_covers_exactly_the_block_matrices():
    cfg = config(**TECHNIQUES["all"], qat="ste", matrix_bits=6, scale_floor=0.0)
    model = random_model(cfg)
    attached = tg.attach_qat(model, cfg.quant)
    carriers = {name for name, m in model.named_modules() if isinstance(m, tg.Linear) and len(m.weight_sites) == 1}
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.opt == "matrix"}
    assert carriers == matrices and len(attached) == len(matrices) == 3 * 6 + 1  # per block q k v proj up down; bigram
    assert all(site.rule == tg.RoundToNearest(6, QUANTILE, 0.0, 10, "quantile", 12.85) for site in attached)
    assert len({id(site) for site in attached}) == len(attached) and not any(site.on for site in attached)
    untouched = random_model(config(qat="none"))
    assert tg.attach_qat(untouched, config(qat="none").quant) == []
    assert not any(len(m.weight_sites) for m in untouched.modules() if isinstance(m, tg.Linear))


@pytest.mark.parametrize("mode", ("fp32", "bf16"))
@pytest.mark.parametrize("bits", (3, 6, 8))
def test_reloaded_artifact_computes_what_the_last_training_forward_did(mode, bits):
    cfg = config(**TECHNIQUES["all"], qat="ste", matrix_bits=bits, embed_bits=16, scale_floor=0.0)
    numerics = tg.Numerics(mode, "blocked")
    model, (ids, targets) = random_model(cfg, numerics), random_batch(cfg, 2, 24)
    for p in model.parameters():
        if p.quant == "embed":  # not part of QAT: let its export be lossless
            p.data = p.data.half().float()
    switches, plan = tg.attach_qat(model, cfg.quant), tg.schedule(cfg.model)
    tg.FlatParameters(model, ALONE)
    used, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, tg.FakeQuant):
            keep = partial(used.__setitem__, name.removesuffix("weight_sites.0") + "weight")
            handles.append(module.register_forward_hook(lambda m, i, out, keep=keep: keep(out.detach().clone())))
    off = model(ids, targets, plan)[1].item()
    for site in switches:
        site.on.fill_(1.0)
    last = model(ids, targets, plan)[1].item()
    blob = tg.pack_artifact(tg.quantise(model, cfg.quant), {}, tg.PACKINGS["zlib"])
    _, tensors = tg.unpack_artifact(blob)
    assert set(used) == {name for name, p in model.named_parameters() if p.opt == "matrix"}
    for name, weight in used.items():
        assert torch.equal(tensors[name].dequant(), weight), name
    reloaded = tg.build_from_artifact(cfg, tensors, numerics)
    assert reloaded(ids, targets, plan)[1].item() == last != off


# ---- Export ----
@pytest.mark.parametrize("matrix_bits, embed_bits", ((8, 8), (6, 16), (16, 4)))
def test_each_parameter_is_stored_by_the_rule_of_its_tag(matrix_bits, embed_bits):
    cfg = config(**TECHNIQUES["all"], matrix_bits=matrix_bits, embed_bits=embed_bits, scale_floor=0.0)
    model = random_model(cfg)
    stored = tg.quantise(model, cfg.quant)
    assert list(stored) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        t, bits = stored[name], {"matrix": matrix_bits, "mlp": matrix_bits, "embed": embed_bits, "keep": 32}[p.quant]
        assert t.values.shape == p.shape
        if bits >= 16:
            assert t.scale is None and torch.equal(t.values, p.half() if bits == 16 else p)
            continue
        top = 2 ** (bits - 1) - 1
        assert t.scale.shape == p.shape[:1] and int(t.values.abs().max()) == top
        error = (t.dequant() - p.detach()).abs() / t.scale.float()[:, None]
        assert error.max() < 0.51 + 1e-4 * top and 0.22 < error.mean() < 0.28


@pytest.mark.parametrize("bits", (1, 3, 4, 10))
def test_scales_keep_their_mantissa_bits_and_stay_exact_in_fp16(bits):
    x = torch.exp2(torch.linspace(-14, math.log2(49152), 10_001)).clamp(2**-14, 49152)
    rounded = tg.rounded_mantissa(x, bits)
    mantissa, exponent = torch.frexp(rounded.double())
    assert torch.equal((mantissa * 2 ** (bits + 1)).round(), mantissa * 2 ** (bits + 1)), "no more bits than these"
    assert ((rounded - x).abs() / x).max() <= 2.0 ** -(bits + 1) and torch.equal(rounded.half().float(), rounded)
    assert bits < 10 or torch.equal(rounded, x.half().float()), "ten bits are fp16"
    cfg = config(matrix_bits=6, scale_bits=bits)
    w = random_rows(40, 300)
    t = tg.quantiser(6, 0.0, cfg.quant).fit(w)
    assert torch.equal(t.scale, tg.rounded_mantissa(t.scale.float(), bits).half())
    error, scale = (t.dequant() - w).abs(), t.scale.float()[:, None]
    assert (error <= 0.5001 * scale)[w.abs() <= 31 * scale].all(), "the levels belong to the rounded scale"


def test_more_bits_lose_less():
    w = random_rows(3, 400)
    errors = [float((tg.RoundToNearest(bits, QUANTILE, 0.0).fit(w).dequant() - w).norm() / w.norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    for coarse, fine in zip(errors[3:], errors[4:]):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15), "one bit halves the step"


# ---- Hessians: what a matrix reads decides where its errors hurt ----
def inputs(columns: int, seed: int = 0) -> Tensor:
    """Second moment (n,n) of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    z = z * 10 ** (2 * torch.rand(columns, generator=generator) - 1)
    return z.T @ z / len(z)


def grid(rounding: str, bits: int = 4, clip: str = "sigma", sigmas: float = 4.0):
    return tg.ROUNDINGS[rounding](bits, QUANTILE, 0.0, 10, clip, sigmas)


def weighted_error(w: Tensor, t: tg.QTensor, h: Tensor) -> float:
    """What the errors do to the outputs: tr(E H E^T)."""
    e = (t.dequant() - w).double()
    return float(((e @ h.double()) * e).sum())


def optimal_brain_quantiser(w: np.ndarray, h: np.ndarray, scale: np.ndarray, top: int) -> np.ndarray:
    """Column by column in float64, with the inverse Hessian of the columns that remain updated explicitly."""
    h = h + 0.01 * np.trace(h) / len(h) * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    w, inverse, levels = w[:, order].copy(), np.linalg.inv(h[np.ix_(order, order)]), np.zeros(w.shape)
    for j in range(w.shape[1]):
        levels[:, j] = np.clip(np.round(w[:, j] / scale), -top, top)
        error = (w[:, j] - levels[:, j] * scale) / inverse[j, j]
        w[:, j:] -= np.outer(error, inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return levels[:, np.argsort(order)]


@pytest.mark.parametrize("columns", (16, 130, 300))
def test_gptq_agrees_with_an_independent_float64_one(columns):
    w, h, rule = torch.randn(24, columns), inputs(columns), grid("gptq")
    found, scale = rule.fit(w, h), rule.scale(w)
    want = optimal_brain_quantiser(w.double().numpy(), h.double().numpy(), scale.double().numpy(), 7)
    same = (found.values.numpy() == want).mean()
    assert same > 0.98, "all but a few ties, after which a row goes its own way"
    exact = tg.QTensor(torch.from_numpy(want).to(torch.int8), scale.half())
    assert weighted_error(w, found, h) == pytest.approx(weighted_error(w, exact, h), rel=0.02)


@pytest.mark.parametrize("clip", tg.CLIPS)
@pytest.mark.parametrize("bits", (3, 4, 6, 8))
def test_gptq_hurts_the_outputs_less_than_rounding(bits, clip):
    for seed in range(3):
        w, h = random_rows(seed, 200, -1, 1), inputs(200, seed)
        nearest, gptq = grid("nearest", bits, clip).fit(w, h), grid("gptq", bits, clip).fit(w, h)
        assert torch.equal(nearest.scale, gptq.scale), "the same grid"
        assert weighted_error(w, gptq, h) < 0.8 * weighted_error(w, nearest, h)


def test_gptq_is_rounding_where_inputs_are_alike_or_unknown():
    w = torch.randn(8, 200)
    for h in (None, torch.zeros(200, 200), 3 * torch.eye(200)):
        assert torch.equal(grid("gptq").fit(w, h).values, grid("nearest").fit(w).values)
    h = inputs(200)
    h[:, 7] = h[7] = 0  # an input that is always zero
    t = grid("gptq").fit(w, h)
    assert t.dequant().isfinite().all()
    assert torch.equal(t.values[:, 7], grid("nearest").fit(w).values[:, 7]), "nothing to make up for"


def test_clips_equal_their_formulas():
    w, h = random_rows(1, 500), inputs(500)
    rows = w.double().numpy()
    sigma = 12.85 * rows.std(1, ddof=1)
    met = (np.abs(rows) * np.diag(h)).mean(1)
    want = dict(sigma=sigma, sigma_hessian=sigma * (1 + 0.175 * (met / met.mean() - 1)))
    for clip, values in want.items():
        np.testing.assert_allclose(tg.CLIPS[clip](grid("nearest", 6, clip, 12.85), w, h), values, rtol=1e-4)
    np.testing.assert_allclose(tg.CLIPS["sigma_hessian"](grid("nearest", 6, "sigma_hessian", 12.85), w, None), sigma,
                               rtol=1e-4)
    for hessian in (None, h):
        weight = np.ones(500) if hessian is None else np.diag(hessian)
        chosen = tg.CLIPS["search"](grid("nearest", 4), w, hessian)
        for i, row in enumerate(rows):
            errors = []
            for q in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
                clip = np.quantile(np.abs(row), q)
                level = np.clip(np.round(row / (clip / 7)), -7, 7)
                errors.append((float((weight * (row - level * clip / 7)**2).sum()), clip))
            assert float(chosen[i]) == pytest.approx(min(errors)[1], rel=1e-4), "per row, as the name promises"


def test_observed_inputs_are_those_of_the_forward_and_of_all_ranks(toy, tmp_path):
    cfg = config("prequant_ttt+plain+tiny", data_path=toy, calibration_tokens=2000)
    rt = tg.Runtime(cfg, {})
    torch.manual_seed(0)
    model = random_model(cfg)
    trainer = tg.Trainer(cfg, rt, tg.open_data(cfg, rt), model, tg.Numerics())
    trainer.plan = len(trainer.plans) - 1
    place = trainer.loader.state_dict()
    found = trainer.observe_inputs(2000)
    trainer.loader.load_state_dict(place)
    rows = np.concatenate([trainer.loader.next(0, 1) for _ in range(4)])  # 4 steps of 512 tokens
    seen: dict[Tensor, list[Tensor]] = {}
    for m in model.modules():
        if isinstance(m, tg.Linear):
            m.register_forward_pre_hook(lambda m, i: seen.setdefault(m.weight, []).append(i[0].detach().flatten(0, -2)))
    ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
    h = model.hidden(ids, trainer.plans[trainer.plan]).detach().flatten(0, -2)
    assert len(trainer.plans[trainer.plan]) > cfg.model.num_layers, "a loop: some matrices read several times"
    for p in (p for p in model.parameters() if p.opt == "matrix"):
        z = torch.cat(seen[p]).double()
        torch.testing.assert_close(found[p].double(), z.T @ z / ids.numel(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[model.output], h.T @ h / ids.numel(), rtol=1e-3, atol=1e-4)
    knobs = dict(PRESET="prequant_ttt+plain+tiny", TTT="none", ITERATIONS=3, TRAIN_BATCH_TOKENS=448,
                 CALIBRATION_TOKENS=448)
    scores = [float(official(train(toy, tmp_path, f"r{n}", nproc=n, **knobs).out).split("val_loss:")[1].split()[0])
              for n in (0, 2)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4), "seven rows on two ranks: one pass has a row missing"
    done = train(toy, tmp_path, "idle", nproc=3, **knobs | dict(TRAIN_BATCH_TOKENS=128))
    assert done.code == 0 and "phase:inputs" in done.out, "two rows on three ranks: one has nothing to look at"


# ---- Filling the budget ----
def budget_case(budget: int, **knobs):
    """(model, quantisation, a runtime that remembers what it logged)."""
    cfg = config(clip="sigma", fill_budget=1, codec="rans", artifact_budget_bytes=budget + tg.code_bytes(), **knobs)
    return random_model(cfg), cfg.quant, type("Log", (), dict(lines=[], log=lambda self, x: self.lines.append(x)))()


@pytest.mark.parametrize("bits", (4, 6))
@pytest.mark.parametrize("share", (0.3, 0.55, 0.8, 1.2))
def test_the_budget_is_filled_and_never_exceeded(bits, share):
    model, cfg, log = budget_case(10**9, model_dim=128, vocab_size=2048, matrix_bits=bits)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    budget = int(weights * 0.42 * share)
    model, cfg, log = budget_case(budget, model_dim=128, vocab_size=2048, matrix_bits=bits)
    blob = tg.pack_to_fit(model, cfg, {}, {}, log)
    assert 0.998 * budget <= len(blob) <= budget, log.lines
    assert int(log.lines[0].split(":")[1].split()[0]) <= 6, "a handful of packings"
    _, tensors = tg.unpack_artifact(blob)
    error = sum(float((tensors[n].dequant() - p).square().sum()) for n, p in model.exported().items())
    assert error < 0.5 * sum(float(p.square().sum()) for p in model.parameters())


def test_a_budget_that_cannot_be_met_says_why():
    model, cfg, log = budget_case(3000)
    with pytest.raises(tg.RunFailed, match="ARTIFACT_BUDGET_BYTES"):
        tg.pack_to_fit(model, cfg, {}, {}, log)
    model, cfg, log = budget_case(10**8)
    assert len(tg.pack_to_fit(model, cfg, {}, {}, log)) < 10**8 and "beyond eight bits" in log.lines[0]


@quick
@given(st.integers(2, 8), st.floats(1, 40), st.floats(0.05, 20))
def test_finer_steps_bring_more_levels_and_the_same_ratio_everywhere(bits, sigmas, factor):
    cfg = config(clip="sigma", matrix_bits=bits, matrix_clip_sigmas=sigmas, mlp_bits=6, embed_bits=16).quant
    found = tg.with_steps(cfg, factor)
    step = lambda b, s: s / (2 ** (b - 1) - 1)  # noqa: E731
    assert step(found.matrix_bits, found.matrix_clip_sigmas) == pytest.approx(factor * step(bits, sigmas))
    assert step(found.mlp_bits, found.mlp_clip_sigmas) == pytest.approx(factor * step(6, sigmas))
    assert found.embed_bits == 16 and (found.matrix_clip_sigmas >= 6 or found.matrix_bits == 8)

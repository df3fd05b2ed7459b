"""Architecture techniques one by one: equivalences, starts, schedules, objectives; and every preset
as a whole."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALONE,
    SYSTEMS,
    config,
    distance,
    exact,
    exact_losses,
    flattened,
    random_batch,
    random_model,
    token_losses,
)
from running import train
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

RUN = SimpleNamespace(lines=[], log=lambda line: RUN.lines.append(line))


def meta_model(cfg: tg.Config) -> tg.GPT:
    with torch.device("meta"):
        return tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics(), cfg.optim)


# ---- Presets ----
TOTALS = {
    # From the published logs; depth_recurrent has none: table 2,097,152 + 8 blocks of 2,359,296 +
    # 8 * 1,032 scales and gains + 2 * 512 skips + 8 * 3 loop gates, without a blend with the
    # embedding.
    "depth_recurrent": (20_980_824, 4096),
    "turbo_engram": (30_666_843, 1024),
    "prequant_ttt": (36_311_132, 8192),
    "score_first_ttt": (35_944_536, 8192),
    "phased_ttt": (35_945_671, 8192),
}


@pytest.mark.parametrize("preset", TOTALS)
def test_parameter_totals_of_the_systems(preset):
    total, vocab = TOTALS[preset]
    model = meta_model(config(f"{preset}", vocab_size=vocab))
    assert sum(p.numel() for p in model.exported().values()) == total


def test_skill_forge_without_its_techniques_is_the_published_run():
    plain = dict(
        num_kv_heads=8,
        mlp_mult=2,
        xsa_last_n=0,
        rope_dims=0,
        smear_gate="none",
        init="default",
        mup_base_width=0,
    )
    model = meta_model(config("skill_forge", **plain))
    assert sum(p.numel() for p in model.parameters()) == 15_220_280


# ---- Schedule ----
VIRTUAL = {  # segment, loops -> the published lists, encoder / decoder
    ((4, 5), 2): "0 1 2 3 4 5 4 / 5 4 5 6 7 8 9 10",
    ((3, 5), 2): "0 1 2 3 4 5 3 4 / 5 3 4 5 6 7 8 9 10",
    ((4, 5), 1): "0 1 2 3 4 5 / 4 5 6 7 8 9 10",
    ((3, 5), 1): "0 1 2 3 4 5 3 / 4 5 6 7 8 9 10",
    ((3, 5), 0): "0 1 2 3 4 / 5 6 7 8 9 10",
}


@pytest.mark.parametrize("case", VIRTUAL)
def test_virtual_layer_lists_are_the_published_ones(case):
    (start, end), loops = case
    cfg = config(num_layers=11, num_loops=loops, loop_start=start, loop_end=end, skips="gated")
    RUN.lines.clear()
    tg.parameter_report(meta_model(cfg), cfg, RUN)
    printed = [line for line in RUN.lines if line.startswith("plan:")]
    assert f"slots:{VIRTUAL[case]} skips:" in printed[-1]
    assert len(printed) == (2 if loops else 1) and f"slots:{VIRTUAL[(3, 5), 0]} " in printed[0]


def test_skips_of_the_leaderboards_last_system():
    """4b->5b, 3b->3c, 5a->4c, 4a->5c, 3a->6, 2->7, 1->8, 0->9, nothing into 10."""
    plan = tg.schedule(config("phased_ttt").model)
    seen, names = {}, []
    for slot in plan:
        seen[slot.block] = seen.get(slot.block, 0) + 1
        names.append(f"{slot.block}{'abc'[seen[slot.block] - 1] if 3 <= slot.block <= 5 else ''}")
    pairs = [f"{names[s]}>{names[t]}" for t, slot in enumerate(plan) for _, s in slot.skips]
    assert pairs == "4b>5b 3b>3c 5a>4c 4a>5c 3a>6 2>7 1>8 0>9".split()
    flat = tg.plans(config("phased_ttt").model)[0]
    assert [(s, t) for t, slot in enumerate(flat) for _, s in slot.skips] == [
        (4, 5),
        (3, 6),
        (2, 7),
        (1, 8),
        (0, 9),
    ]


def test_skips_around_the_loop_and_a_limit_of_skips():
    cfg = config("depth_recurrent").model
    plan = tg.schedule(cfg)
    assert [s.block for s in plan] == [0, 1] + [2, 3, 4] * 9 + [5, 6, 7] and len(plan) == 32
    assert {plan[t].block: s for t in range(32) for _, s in plan[t].skips} == {5: 1, 6: 0}
    assert [s.gates for s in plan if s.gates] == [((p, b),) for p in range(8) for b in range(3)]
    limited = tg.schedule(config("prequant_ttt").model)
    pairs = [(s, t) for t, slot in enumerate(limited) for _, s in slot.skips]
    assert pairs == [(6, 7), (5, 8), (4, 9), (3, 10), (2, 11)]


def test_plan_of_a_step_follows_time_or_step():
    def indices(frac_knobs, points):
        cfg = config(num_loops=2, num_layers=9, **frac_knobs).model
        return [tg.plan_index(tg.Progress(step, frac, 0, 0), cfg) for step, frac in points], len(
            tg.plans(cfg)
        )

    points = [(0, 0.0), (10, 0.34), (11, 0.36), (20, 0.7), (30, 1.0)]
    assert indices({}, points) == ([0, 0, 1, 1, 1], 2)
    assert indices(dict(enable_looping_at=11), points) == ([0, 0, 1, 1, 1], 2)
    assert indices(dict(enable_looping_at=0), points) == ([0] * 5, 1)
    assert [tg.plan_index(tg.Progress(9, f, 0, 0), tg.ModelConfig()) for f in (0, 1)] == [0, 0]


def test_loop_ramp_rises_over_its_steps():
    cfg = config(num_loops=1, num_layers=9, loop_ramp_steps=4, enable_looping_at=100).model
    assert [
        tg.loop_strength(tg.Progress(s, 0.5, 0, 0), cfg) for s in (99, 100, 101, 103, 104, 500)
    ] == [0, 0.25, 0.5, 1, 1, 1]
    cfg = config(num_loops=1, num_layers=9, loop_ramp_steps=4, enable_looping_at=0.5).model
    by_time = [
        tg.loop_strength(tg.Progress(s, s / 200, 0, 0), cfg) for s in (99, 100, 101, 103, 200)
    ]
    assert by_time == pytest.approx([0, 0.25, 0.5, 1, 1])
    assert tg.loop_strength(tg.Progress(0, 0, 0, 0), tg.ModelConfig()) == 1


# ---- Equivalences ----
LOOPED = dict(num_layers=4, num_loops=2, loop_start=1, loop_end=2)


def same_weights(model: tg.GPT, source: tg.GPT):
    """Copy what both have, as much of it as both have."""
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(theirs[name][: len(p)])


def test_recurrence_of_no_extra_pass_is_no_recurrence():
    looped, plain = (
        random_model(config(**LOOPED, loop_ramp_steps=1)),
        random_model(config(num_layers=4), seed=9),
    )
    same_weights(plain, looped)
    ids, targets = random_batch(config(), 2, 20)
    want = token_losses(plain, ids, targets)
    got = looped.losses(looped.hidden(ids, tg.schedule(looped.cfg, 0)), targets)
    assert torch.equal(got, want)
    none = tg.schedule(config(**LOOPED, loop_ramp_steps=1, skips="none").model)
    with torch.no_grad():
        looped.loops.strength.zero_()
    silent = looped.losses(looped.hidden(ids, none), targets)
    torch.testing.assert_close(
        silent,
        plain.losses(
            plain.hidden(ids, tuple(s._replace(skips=()) for s in tg.schedule(plain.cfg))), targets
        ),
        msg="a pass of strength 0 changes nothing",
    )


def test_lanes_of_form_d_with_identity_routing_are_two_independent_streams():
    cfg = config(num_layers=3, parallel="D", parallel_start=0, skips="none")
    model = random_model(cfg)
    with torch.no_grad():
        for block in model.blocks:
            block.routing[0].fill_(1.0)
            block.routing[1].copy_(torch.eye(2))
    ids, _ = random_batch(cfg, 2, 12)
    x = tg.norm(F.embedding(ids, model.embed))
    attention, mlp, context = x, x, tg.Context(ids, x)
    for block in model.blocks:
        mixed = block.residual_sites[0](attention, x)
        attention = attention + block.attn_scale * block.attn(tg.norm(mixed), context)
        mlp = mlp + block.mlp_scale * block.mlp(tg.norm(mlp))
    torch.testing.assert_close(
        model.hidden(ids, tg.schedule(cfg.model)), tg.norm((attention + mlp) / 2)
    )


@pytest.mark.parametrize("kernel", tg.ATTENTION)
@pytest.mark.parametrize("length", (40, 300))
def test_packed_documents_equal_each_document_alone(kernel, length):
    cfg = config(doc_attention=1, smear_gate="D", num_layers=3, vocab_size=61)
    model = random_model(cfg, tg.Numerics("fp32", kernel))
    ids, targets = random_batch(cfg, 1, length)
    ids = 2 + ids % 59
    starts = [0, 7, 8, length // 2]
    ids[0, starts] = 1
    packed = token_losses(model, ids, targets)
    for lo, hi in zip(starts, starts[1:] + [length]):
        alone = token_losses(model, ids[:, lo:hi], targets[:, lo:hi])
        torch.testing.assert_close(
            packed[:, lo:hi], alone, rtol=1e-4, atol=2e-4
        )  # rotation by other absolute angles


def test_both_kernels_read_what_they_may_and_nothing_else():
    torch.manual_seed(0)
    T, ids = 300, torch.randint(2, 50, (2, 300))
    ids[0, [0, 100, 101]] = ids[1, [17, 250]] = 1
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 8)
    visible = tg.visible_keys(ids, tg.ModelConfig(doc_attention=True))
    out = torch.zeros(2, T, 4, 8, dtype=torch.float64)
    for b in range(2):
        document = (ids[b] == 1).cumsum(0).tolist()
        for t in range(T):
            keys = [j for j in range(t + 1) if document[j] == document[t]]
            assert visible[b, t].nonzero().flatten().tolist() == keys
            for h in range(4):
                scores = k[b, keys, h // 2].double() @ q[b, t, h].double() / math.sqrt(8)
                out[b, t, h] = scores.softmax(0) @ v[b, keys, h // 2].double()
    for kernel in tg.ATTENTION.values():
        assert distance(kernel(q, k, v, visible), out) < 1e-6


def test_smear_gate_d_lets_nothing_into_a_document():
    ids, x = torch.tensor([[1, 5, 6, 1, 7, 1]]), torch.randn(1, 6, 16)
    for form, isolated in (("C", []), ("D", [0, 3, 5])):
        site = tg.SmearGateC(tg.ModelConfig(model_dim=16, smear_gate=form), 0)
        assert torch.equal(site(x, ids), x), "the identity at start"
        with torch.no_grad():
            site.gate.weight.normal_()
            site.strength.fill_(2.0)
        moved = (site(x, ids) != x).any(-1)[0].tolist()
        assert moved == [t > 0 and t not in isolated for t in range(6)]
    assert sum(p.numel() for p in site.parameters()) == 13


@pytest.mark.parametrize("buckets", (1, 7, 8192))
def test_engram_rows_are_the_published_hashes(buckets):
    from test_05_model import engram_rows

    site = tg.EngramLite(tg.ModelConfig(model_dim=16, engram_buckets=buckets, engram_dim=2), 0)
    ids = torch.tensor([[0, 65_534, 65_534, 1, 0, 3], [5, 4, 3, 2, 1, 0]])
    for row, found in zip(ids, site.rows(ids)):
        assert found.tolist() == engram_rows(row.numpy(), buckets).tolist()
    x = torch.randn(2, 6, 16)
    assert torch.equal(site(x, ids), x), "the identity at start"


def test_the_rotary_base_of_two_published_systems():
    assert 10_000 * 2 ** (16 / 14) == pytest.approx(22_081, abs=1)


# ---- Starts ----
def test_orthogonal_start_and_its_zero_outputs():
    model = tg.GPT(
        config(
            model_dim=128,
            num_layers=2,
            init="orthogonal",
            value_embed_last_n=1,
            value_embed_dim=64,
            engram_buckets=8,
            engram_dim=32,
        ).model,
        100,
        tg.Numerics(),
    )
    for name, p in model.named_parameters():
        if p.opt == "matrix":
            zero = name.endswith(("attn.proj.weight", "down.weight")) or name.startswith(
                "embed_sites"
            )
            small = p.double() @ p.double().T if len(p) <= p.size(1) else p.double().T @ p.double()
            want = torch.zeros_like(small) if zero else torch.eye(len(small), dtype=torch.float64)
            assert distance(small + 1, want + 1) < 1e-5, name


@pytest.mark.parametrize("rows", (False, True))
def test_mimetic_start_undoes_values_head_by_head(rows):
    cfg = config(
        model_dim=128, num_heads=4, num_kv_heads=2, init="mimetic_rows" if rows else "mimetic"
    ).model
    attn = tg.GPT(cfg, 50, tg.Numerics()).blocks[0].attn
    for h in range(4):
        values, out = attn.v.weight[32 * (h // 2) : 32 * (h // 2 + 1)], attn.proj.weight
        if rows:
            torch.testing.assert_close(out[32 * h : 32 * (h + 1)], -0.05 * values)
        else:
            torch.testing.assert_close(
                values @ out[:, 32 * h : 32 * (h + 1)], -0.05 * torch.eye(32), atol=1e-6, rtol=0
            )


def test_uniform_start():
    model = tg.GPT(config(num_layers=5, init="uniform").model, 50, tg.Numerics())
    for block in model.blocks:
        for weight in (block.attn.proj.weight, block.mlp.down.weight):
            bound = weight.size(1) ** -0.5
            assert weight.abs().max() <= bound
            assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_svd_start_belongs_to_the_tokens_in_use(toy):
    """Ids that occur in the same company get near vectors; an independent count and SVD give the
    same geometry."""
    cfg = config(embed_init="svd", objective="byte", vocab_size=40, model_dim=32)
    generator = np.random.default_rng(0)
    kinds = np.arange(40) % 2  # even ids follow odd ones and the other way round
    tokens = np.array(
        [generator.choice(np.flatnonzero(kinds == t % 2)) for t in range(20_000)], np.uint16
    )

    class Stream:
        def __len__(self):
            return len(tokens)

        def read(self, start, count):
            return tokens[start : start + count]

    data = tg.Data(Stream(), tokens, tokens, "", {}, np.arange(40, dtype=np.int16))
    tables = []
    for seed in (0, 1):
        model = random_model(cfg, seed=seed)
        tg.see_data(model, data)
        tables.append(model.embed.detach().clone())
    assert torch.equal(*tables), "no randomness but the data"
    table = tables[0].double()
    assert table.square().mean().sqrt() == pytest.approx(0.005, rel=1e-4)
    near = F.normalize(table, dim=1) @ F.normalize(table, dim=1).T
    same = torch.from_numpy(kinds[:, None] == kinds)
    assert near[same].mean() > near[~same].mean() + 0.5
    counts = np.zeros((40, 40))
    for a, b in zip(tokens, tokens[1:]):
        counts[a, b] += 1
    counts = np.log1p(counts)
    counts = counts - counts.mean(0) - counts.mean(1, keepdims=True) + counts.mean()
    u, s, _ = np.linalg.svd(counts)
    want = torch.from_numpy((u[:, :1] * s[:1]) @ u[:, :1].T)
    got = table[:, :1] @ table[:, :1].T
    assert distance(got / got.norm(), want / want.norm()) < 1e-3
    mean = np.mean(range(1, 40))  # over the ids that have bytes, as published; at least 0.1
    want = [max(0.1, n / mean) for n in range(40)]
    assert model.objective.weights.tolist() == pytest.approx(want)


def coordinate(width: int, base: int) -> float:
    """RMS of the logits after a few steps on the same tokens."""
    cfg = config(
        model_dim=width,
        num_heads=width // 32,
        num_kv_heads=width // 64,
        vocab_size=64,
        num_layers=2,
        mup_base_width=base,
        init="orthogonal",
        tied_embed_lr=0.01,
        matrix_lr=0.02,
        scalar_lr=0.01,
    )
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, 64, tg.Numerics())
    (flat, optimiser), (ids, targets), plan = (
        flattened(model, cfg),
        random_batch(cfg, 8, 32),
        tg.schedule(cfg.model),
    )
    for _ in range(5):
        flat.gradients.zero_()
        (model(ids, targets, plan)[0] / ids.numel()).backward()
        optimiser.step(tg.full_speed() | dict(momentum=0.9))
    with torch.no_grad():
        return float(model.logits(model.hidden(ids, plan)).square().mean().sqrt())


def test_width_transfer_keeps_activations_equal_and_its_absence_does_not():
    with_, without = ([coordinate(width, base) for width in (64, 128, 256)] for base in (64, 0))
    assert max(with_) / min(with_) < 1.5, with_
    assert max(without) / min(without) > 1.5, without


# ---- Losses ----
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("cap", (5.0, 30.0))
def test_shifted_softcap_has_the_loss_and_gradient_of_float64(dtype, cap):
    torch.manual_seed(0)
    z, targets = (torch.randn(3, 5, 11) * 20).to(dtype).requires_grad_(), torch.randint(11, (3, 5))
    targets[1, 2] = -100
    exact = z.detach().double().requires_grad_()
    logits = cap * torch.tanh(exact / cap)
    want = logits.exp().sum(-1).log() - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    want = torch.where(targets == -100, 0.0, want)
    loss = tg.SOFTCAPS["shifted"](z, targets, cap)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    slope = torch.randn(3, 5)
    (loss * slope).sum().backward()
    (want * slope.double()).sum().backward()
    assert z.grad.dtype == dtype and distance(z.grad, exact.grad) < (
        1e-5 if dtype == torch.float32 else 1e-2
    )
    sure = tg.SOFTCAPS["shifted"](torch.tensor([[1e8, -1e8]]), torch.tensor([1]), 30.0)
    assert float(sure) == pytest.approx(60, rel=1e-6)


def exact_objective(kind, z, further, targets, byte_weights, cap):
    """Sum over targets in float64, written from the definitions."""

    def nats(z, targets):
        logits = cap * torch.tanh(z / cap)
        own = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(targets < 0, 0.0, torch.logsumexp(logits, -1) - own)

    seen, ce = targets >= 0, nats(z, targets)
    if kind == "byte":
        w = byte_weights[targets.clamp(min=0)] * seen
        return (w * ce).sum()
    if kind == "mtp":
        means = []
        for k, head in enumerate(further, 1):
            later = targets[:, k:]
            means.append(nats(head[:, :-k], later).sum() / (later >= 0).sum())
        return ce.sum() + 0.2 * sum(means) / len(means) * seen.sum()
    return ce.sum()


@pytest.mark.parametrize("softcap", tg.SOFTCAPS)
@pytest.mark.parametrize("kind", tg.OBJECTIVES)
def test_objectives_equal_float64_and_the_log_stays_plain(kind, softcap):
    cfg = config(
        objective=kind,
        softcap=softcap,
        vocab_size=61,
    )
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, 61, tg.Numerics(), cfg.optim)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    byte_weights = torch.randint(1, 9, (61,)).double()
    if kind == "byte":
        model.objective.weights.copy_(byte_weights)
    ids, targets = random_batch(cfg, 3, 20)
    targets[2, 4:] = -100
    plan = tg.schedule(cfg.model)
    objective, nats = model(ids, targets, plan)
    h = model.hidden(ids, plan).detach()
    z, further = (
        model.logits(h).detach().double(),
        [
            (h @ head.T).detach().double()
            for head in ([model.objective.head] if kind == "mtp" else [])
        ],
    )
    want = exact_objective(kind, z, further, targets, byte_weights, 30.0)
    assert float(objective.detach()) == pytest.approx(float(want), rel=1e-5)
    assert float(nats) == pytest.approx(
        float(exact_objective("ce", z, further, targets, None, 30.0)), rel=1e-5
    )
    assert kind == "ce" or abs(float(objective.detach()) - float(nats)) > 1e-3 * float(nats)
    objective.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters()
    )


def test_heads_of_further_tokens_read_what_the_main_head_reads():
    """Finding M10: under MUP_BASE_WIDTH main logits were scaled, those of further tokens not."""
    cfg = config(mup_base_width=16, objective="mtp", mtp_weight=1, vocab_size=61)
    model, (ids, targets) = random_model(cfg), random_batch(cfg, 2, 20)
    with torch.no_grad():
        model.objective.head.copy_(model.embed)
    plan = tg.schedule(cfg.model)
    objective, nats = model(ids, targets, plan)
    h = model.hidden(ids, plan)
    further = model.losses(h[:, :-1], targets[:, 1:]).mean() * targets.numel()
    assert float(objective.detach() - nats) == pytest.approx(float(further.detach()), rel=1e-5)
    unscaled = F.linear(h * cfg.model.model_dim / 16, model.embed)
    assert not torch.allclose(model.logits(h), unscaled)


@pytest.mark.slow
def test_heads_of_further_tokens_are_trained_but_neither_counted_nor_exported(toy, tmp_path):
    done = train(toy, tmp_path, "mtp", OBJECTIVE="mtp")
    assert done.code == 0, done.err
    assert f"model_params:{sum(p.numel() for p in meta_model(config()).parameters())}\n" in done.out
    _, tensors = tg.unpack_artifact((done.folder / "model.golf").read_bytes())
    assert set(tensors) == set(meta_model(config()).exported())


# ---- Training ----
# The four that differ most; the others, of the same parts, are compiled by -m survey.
COMPILED = ("baseline", "depth_recurrent", "turbo_engram", "phased_ttt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=[] if name in COMPILED else pytest.mark.survey) for name in SYSTEMS],
)
def test_a_run_compiles_one_graph_per_plan_and_nothing_at_the_switch(preset, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    cfg = config(f"{preset}+tiny")
    model, grid = random_model(cfg), config(qat="ste", matrix_bits=4).quant
    sites = tg.attach_qat(model, grid).values()
    flat = tg.FlatParameters(model, ALONE)
    loss, plans = tg.compiled(model.forward, tg.Numerics(compile=True)), tg.plans(cfg.model)
    for plan in plans:
        loss(*random_batch(cfg, 2, 16), plan)[0].backward()
    assert counter.frame_count == len(plans) <= 2
    for step, plan in enumerate((plans[0], plans[0], plans[-1], plans[-1])):
        ids, targets = random_batch(cfg, 2, 16, seed=step)
        for site in sites:
            site.on.fill_(float(step >= 2))
        flat.weights.mul_(1.01)
        if model.loops:
            model.loops.strength.fill_(step / 3)
        got, want = loss(ids, targets, plan), model(ids, targets, plan)
        assert float(got[0].detach()) == pytest.approx(float(want[0].detach()), rel=1e-4)
    assert counter.frame_count == len(plans), "compiled again"


@pytest.mark.slow
@pytest.mark.parametrize("steps, plan", ((2, 0), (6, 1)))
def test_a_run_scores_with_the_plan_that_it_ended_with(steps, plan, toy, tmp_path):
    knobs = dict(PRESET="prequant_ttt+tiny", ITERATIONS=steps, TTT="none")
    done = train(toy, tmp_path, "loop", **knobs)
    assert done.code == 0, done.err
    header, _ = tg.unpack_artifact((done.folder / "model.golf").read_bytes())
    assert header["plan"] == plan
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["plan"] for row in rows if row["event"] == "train"] == [
        int(step >= 3) for step in range(steps)
    ]
    cfg = tg.load({"PRESET": "prequant_ttt+tiny", "DEVICE": "cpu", "TTT": "none"})
    assert tg.stored_plan(cfg, header) == tg.plans(cfg.model)[plan]
    for bad in (2, -1, "0", None, 0.5):
        with pytest.raises(tg.UserError, match="plan"):
            tg.stored_plan(cfg, header | {"plan": bad})


@pytest.mark.slow
@pytest.mark.parametrize("preset", SYSTEMS)
def test_after_some_steps_a_token_still_changes_no_earlier_loss(preset, toy):
    """Trained weights reach what zero starts hide; every plan of the run is looked at."""
    cfg = config(f"{preset}+tiny", data_path=toy)
    rt = tg.Runtime(cfg, {})
    data = tg.open_data(cfg, rt)
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics(), cfg.optim)
    tg.see_data(model, data)
    trainer, last = tg.Trainer(cfg, rt, data, model, tg.Numerics()), len(tg.plans(cfg.model)) - 1
    for step in range(4):
        trainer.step(
            trainer.loader.next(0, 1), tg.full_speed() | dict(momentum=0.9, plan=min(step, last))
        )
    ids, targets = random_batch(cfg, 2, 24)
    plain = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics(), cfg.optim)  # without fake grids
    plain.load_state_dict(model.state_dict(), strict=False)
    model = exact(plain)
    for plan in tg.plans(cfg.model):
        before = exact_losses(model, ids, targets, plan)
        for place in (1, 9, 23):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 7) % cfg.data.vocab_size
            moved = (exact_losses(model, changed, targets, plan) - before).abs()
            assert moved[:, :place].max() < 1e-11 < 1e-4 < moved[:, place:].max()

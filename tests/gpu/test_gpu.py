"""What only a CUDA device can show; skipped without one. One command, under ten minutes: python -m
pytest tests/gpu"""

import re

import pytest
import torch
from conftest import official, run_script
from helpers import (
    TECHNIQUES,
    config,
    distance,
    exact_attention,
    flattened,
    random_batch,
    random_model,
    token_losses,
)
from torch._dynamo.utils import counters

import train_gpt as tg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="this machine has no usable CUDA device"
    ),
]
CUDA = torch.device("cuda")


def official_bpb(done) -> float:
    """Bits per byte of a finished run."""
    assert done.code == 0, done.err[-3000:]
    return float(re.search(r"val_bpb:(\S+)", official(done.out))[1])


def trainer_on_cuda(toy, compile: bool, **knobs) -> tg.Trainer:
    """A trainer of the shrunk baseline, ready to step."""
    cfg = config(device="cuda", data_path=toy, **knobs)
    rt = tg.Runtime(cfg, {})
    numerics = tg.Numerics("bf16", "sdpa", compile)
    tg.apply_numerics(numerics, rt)
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, cfg.data.vocab_size, numerics).to(rt.device)
    return tg.Trainer(cfg, rt, tg.open_data(cfg, rt), model, numerics)


def take_steps(trainer: tg.Trainer, count: int) -> list[float]:
    """Losses of some optimiser steps, with the quantisation switch and both ramps moving."""
    losses = []
    for i in range(count):
        moving = dict(lr=1 - i / (2 * count), momentum=0.85 + 0.01 * i, qat=float(i % 2))
        losses.append(trainer.step(trainer.loader.next(0, 1), tg.full_speed() | moving))
    return [x.item() for x in losses]


# ---- Numbers ----
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize(
    "mode, precision, tolerance",
    (("fp32", "highest", 3e-5), ("fp32", "high", 1e-2), ("bf16", "high", 3e-2)),
    ids=("fp32", "tf32", "bf16"),
)
def test_losses_on_cuda_equal_those_on_the_cpu(technique, mode, precision, tolerance):
    cfg = config(**TECHNIQUES[technique], num_layers=4)
    ids, targets = random_batch(cfg, 4, 200)
    want = token_losses(random_model(cfg), ids, targets).detach()
    model = random_model(cfg, tg.Numerics(mode)).to(CUDA)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    got = token_losses(model, ids.to(CUDA), targets.to(CUDA)).detach().cpu()
    torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32 and distance(got, want) < tolerance
    assert float(got.mean()) == pytest.approx(float(want.mean()), rel=tolerance)


@pytest.mark.parametrize("kernel", tg.ATTENTION.values(), ids=tg.ATTENTION.keys())
@pytest.mark.parametrize("heads, groups", ((4, 4), (4, 2), (8, 2)))
@pytest.mark.parametrize("length", (1, 100, 1024, 1100))
def test_attention_on_cuda_equals_float64(kernel, heads, groups, length):
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, length, n, 64, device=CUDA).bfloat16() for n in (heads, groups, groups)
    ]
    inputs[0] *= 2
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    weights = torch.randn(2, length, heads, 64, device=CUDA)
    out, want = kernel(*leaves), exact_attention(*exact)
    assert distance(out, want) < 2e-2
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    assert distance(leaves[2].grad, exact[2].grad) < 2e-2
    if length > 1:  # a single key has a constant softmax: no gradient to compare
        assert max(distance(a.grad, b.grad) for a, b in zip(leaves[:2], exact[:2])) < 3e-2


@pytest.mark.parametrize("compile", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("bits", (4, 6, 8))
def test_training_grid_on_cuda_is_the_export_grid(bits, compile):
    torch.manual_seed(0)
    w = torch.randn(1024, 512) * 10 ** (2 * torch.rand(1024, 1) - 2)
    site = tg.FakeQuant(tg.RoundToNearest(bits)).to(CUDA)
    site.on.fill_(1.0)
    torch._dynamo.reset()
    used = tg.compiled(site, tg.Numerics(compile=compile))(w.to(CUDA)).cpu()
    stored = site.rule.fit(w)  # as the export does it, on the CPU
    off_grid = (used - stored.dequant()).abs() > 1e-6 * stored.scale.float()[:, None]
    assert off_grid.float().mean() <= 1e-4, (
        "division may round differently in a few borderline cases, no more"
    )


@pytest.mark.parametrize("compile", (False, True), ids=("eager", "compiled"))
def test_bigram_hash_wraps_on_cuda_as_on_the_cpu(compile):
    site = tg.BigramHash(tg.ModelConfig(model_dim=16, bigram_buckets=10_240), 0)
    with torch.no_grad():
        site.table[:, 0] = torch.arange(10_240)
        site.proj.weight.zero_()[:, 0] = 1.0
    ids, zeros = torch.randint(65_535, (8, 300)), torch.zeros(8, 300, 16)
    want = site(zeros, ids)
    torch._dynamo.reset()
    found = tg.compiled(site.to(CUDA), tg.Numerics(compile=compile))(zeros.to(CUDA), ids.to(CUDA))
    torch.testing.assert_close(found.cpu(), want)


@pytest.mark.parametrize("kind", tg.MUON)
def test_muon_on_cuda_equals_the_cpu(kind):
    results = []
    for device in ("cpu", "cuda"):
        cfg = config(muon=kind, matrix_lr=1.0)
        rt = tg.Runtime(config(device=device), {})
        flat, optimiser = flattened(random_model(cfg).to(device), cfg, rt, torch.bfloat16)
        flat.gradients.copy_(
            torch.randn(flat.gradients.shape, generator=torch.Generator().manual_seed(0))
        )
        before = flat.weights.clone()
        optimiser.step(tg.full_speed() | dict(momentum=0.9))
        results.append((flat.weights - before).cpu())
    assert distance(results[1], results[0]) < 2e-2


# ---- Compilation and memory ----
def test_compiled_training_is_one_graph_that_never_recompiles(toy):
    torch._dynamo.reset()
    counters.clear()
    knobs = dict(qat="ste", matrix_bits=6, scale_floor=0.0, warmup_steps=2)
    trainer = trainer_on_cuda(toy, compile=True, **knobs)
    trainer.prewarm()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = take_steps(trainer, 6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager = take_steps(trainer_on_cuda(toy, compile=False, **knobs), 6)
    assert compiled == pytest.approx(eager, rel=2e-2)


def test_steps_leave_no_memory_behind(toy):
    trainer = trainer_on_cuda(toy, compile=False)
    take_steps(trainer, 2)
    torch.cuda.synchronize()
    settled = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    take_steps(trainer, 6)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= settled + 4096
    assert torch.cuda.max_memory_allocated() < settled + (256 << 20), (
        "512 tokens of a 64-wide model"
    )


# ---- Whole runs ----
def test_shrunk_baseline_runs_end_to_end_alone_and_under_nccl(toy, tmp_path):
    knobs = dict(
        PRESET="baseline+tiny", DATA_PATH=toy, DEVICE="cuda", ITERATIONS=40, RUNS_DIR=tmp_path
    )
    alone = run_script(RUN_ID="alone", **knobs)
    bpb = official_bpb(alone)
    assert 1 < bpb < 4 and "numerics:bf16 attention:sdpa" in alone.out
    artifact = tmp_path / "alone" / "model.golf"
    again = run_script(
        RUN_MODE="eval", ARTIFACT=artifact, **{k: v for k, v in knobs.items() if k != "RUNS_DIR"}
    )
    assert official_bpb(again) == pytest.approx(bpb, rel=1e-4)
    on_cpu = run_script(
        RUN_MODE="eval",
        ARTIFACT=artifact,
        PRESET="baseline+tiny",
        DATA_PATH=toy,
        DEVICE="cpu",
        NUMERICS="fp32",
    )
    assert official_bpb(on_cpu) == pytest.approx(bpb, rel=1e-2)
    nccl = run_script(nproc=1, RUN_ID="nccl", **knobs)
    assert official_bpb(nccl) == pytest.approx(bpb, rel=2e-2) and "world_size:1" in nccl.out


def test_full_size_baseline_compiles_and_fits_into_80_gb(toy, tmp_path):
    done = run_script(
        PRESET="baseline",
        DATA_PATH=toy,
        DEVICE="cuda",
        ITERATIONS=5,
        WARMUP_STEPS=2,
        VAL_LOSS_EVERY=0,
        RUNS_DIR=tmp_path,
        RUN_ID="full",
        timeout=420,
    )
    assert (
        0 < official_bpb(done) < 6
        and "compile:1" in done.out
        and "model_params:17059912" in done.out
    )
    reserved = int(re.search(r"peak memory allocated: \d+ MiB reserved: (\d+) MiB", done.out)[1])
    assert reserved < 75_000

"""Attention, loss and the automatic choice of arithmetic, against float64."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import config, distance, exact_attention
from torch import Tensor

import train_gpt as tg

KERNELS = pytest.mark.parametrize("kernel", tg.ATTENTION.values(), ids=tg.ATTENTION.keys())
# length -> shape of the problem: one token, less than a block, one block, a ragged second one, more than eight
LENGTHS = {1: (2, 16), 7: (2, 16), 128: (2, 16), 200: (2, 16), 1100: (1, 8)}  # (rows, head width)


def random_qkv(
    length: int, heads: int, groups: int, dtype=torch.float32, sharpness: float = 2.0
) -> list[Tensor]:
    torch.manual_seed(length * 100 + heads * 10 + groups)
    rows, width = LENGTHS[length]
    q, k, v = (torch.randn(rows, length, n, width) for n in (heads, groups, groups))
    return [(q * sharpness).to(dtype), k.to(dtype), v.to(dtype)]


@KERNELS
@pytest.mark.parametrize("ratio", (1, 2, 4))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "dtype, tolerance", ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)), ids=("fp32", "bf16")
)
def test_attention_and_its_gradients_equal_float64(kernel, ratio, length, dtype, tolerance):
    inputs = [t.requires_grad_() for t in random_qkv(length, 4, 4 // ratio, dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weights = torch.randn(inputs[0].shape).to(dtype)
    out, want = kernel(*inputs), exact_attention(*exact)
    assert out.shape == inputs[0].shape and out.dtype == dtype
    assert distance(out, want) < tolerance
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    for got, reference in zip(inputs, exact):
        if reference.grad.abs().max() < 1e-12:  # one visible key: the softmax is constant
            assert got.grad.abs().max() < 1e-6
        else:
            assert distance(got.grad, reference.grad) < tolerance


@KERNELS
@pytest.mark.parametrize("length", (7, 200))
def test_attention_sees_no_later_key_or_value(kernel, length):
    q, k, v = random_qkv(length, 4, 2, sharpness=0.5)
    for t in {1, length // 2, length - 1}:
        later_k, later_v = k.clone(), v.clone()
        later_k[:, t:] += 1
        later_v[:, t:] -= 5
        before, after = kernel(q, k, v), kernel(q, later_k, later_v)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] - after[:, t]).norm(dim=-1).min() > 1e-3, (
            "a position sees its own key and value"
        )


def exact_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """log sum exp - own logit, written out in float64."""
    logits = cap * torch.tanh(z.double() / cap)
    own = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, logits.exp().sum(-1).log() - own)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("cap", (5.0, 30.0))
def test_loss_equals_float64(dtype, cap):
    torch.manual_seed(0)
    z, targets = (torch.randn(3, 5, 11) * 20).to(dtype), torch.randint(11, (3, 5))
    loss = tg.softcapped_cross_entropy(z, targets, cap)
    assert loss.dtype == torch.float32 and loss.shape == targets.shape
    torch.testing.assert_close(loss.double(), exact_loss(z, targets, cap), rtol=1e-5, atol=1e-5)


def test_loss_gradient_equals_finite_differences():
    torch.manual_seed(1)
    z, targets, cap = torch.randn(4, 7) * 8, torch.tensor([0, 6, 3, -100]), 10.0
    leaf = z.clone().requires_grad_()
    tg.softcapped_cross_entropy(leaf, targets, cap).sum().backward()
    slope = torch.zeros(4, 7, dtype=torch.float64)
    for i in range(4):
        for j in range(7):
            nudge = torch.zeros(4, 7, dtype=torch.float64)
            nudge[i, j] = 1e-5
            rise = exact_loss(z.double() + nudge, targets, cap) - exact_loss(
                z.double() - nudge, targets, cap
            )
            slope[i, j] = rise.sum() / 2e-5
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=1e-4, atol=1e-6)


def test_ignored_target_gives_no_loss_and_no_gradient():
    z = torch.randn(2, 3, 9, requires_grad=True)
    targets = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    loss = tg.softcapped_cross_entropy(z, targets, 30.0)
    loss.sum().backward()
    ignored = targets == -100
    assert (loss[ignored] == 0).all() and (z.grad[ignored] == 0).all()
    assert (loss[~ignored] > 0).all() and (z.grad[~ignored] != 0).all()


def test_loss_of_absurd_logits_is_bounded_by_the_cap():
    z = torch.tensor([[1e8, -1e8, -1e8]])
    sure, wrong = (float(tg.softcapped_cross_entropy(z, torch.tensor([t]), 30.0)) for t in (0, 1))
    assert sure == pytest.approx(
        math.log1p(2 * math.exp(-60)), abs=1e-6
    ) and wrong == pytest.approx(60, rel=1e-6)


def test_chosen_arithmetic_is_accurate_quick_to_find_and_leaves_no_trace():
    lines, before, begin = [], torch.get_float32_matmul_precision(), time.perf_counter()
    torch.set_float32_matmul_precision("high")
    mode = tg.fastest_cpu_mode(lines.append)
    assert time.perf_counter() - begin < 20 and torch.get_float32_matmul_precision() == "high"
    assert (
        mode in ("fp32", "medium", "bf16") and len(lines) == 1 and lines[0].endswith(f"-> {mode}")
    )
    torch.manual_seed(3)
    a, b = torch.randn(300, 500), torch.randn(200, 500)
    torch.set_float32_matmul_precision("medium" if mode == "medium" else "highest")
    dtype = tg.Numerics(mode).dtype
    out = F.linear(a.to(dtype), b.to(dtype))
    torch.set_float32_matmul_precision(before)
    assert distance(out, a.double() @ b.double().T) < (1e-2 if mode == "bf16" else 1e-5)


@pytest.mark.parametrize(
    "order", (("bf16", "medium", "fp32"), ("medium", "bf16", "fp32"), ("fp32", "bf16", "medium"))
)
@pytest.mark.parametrize("wrong", (None, "bf16", "medium"))
def test_chosen_arithmetic_is_the_fastest_among_the_accurate(monkeypatch, order, wrong):
    def current(x: Tensor) -> str:
        medium = torch.get_float32_matmul_precision() == "medium"
        return "bf16" if x.dtype == torch.bfloat16 else "medium" if medium else "fp32"

    def linear(x: Tensor, w: Tensor) -> Tensor:
        product = (
            x.double() @ w.double().mT
        )  # on some machines "medium" itself would be too inaccurate
        return product.to(x.dtype) * (1.05 if current(x) == wrong else 1.0)

    monkeypatch.setattr(tg.F, "linear", linear)
    monkeypatch.setattr(tg, "best_time", lambda run: 1.0 + order.index(current(run())))
    assert tg.fastest_cpu_mode(lambda line: None) == next(mode for mode in order if mode != wrong)


def test_fastest_attention_is_one_of_the_kernels(monkeypatch):
    lines, small = [], tg.ModelConfig(model_dim=64, num_heads=4, num_kv_heads=2)
    assert (
        tg.fastest_cpu_attention(small, 64, torch.float32, lines.append) in tg.ATTENTION
        and len(lines) == 1
    )
    for slow, fast in (("sdpa", "blocked"), ("blocked", "sdpa")):
        times = {name: float(name == slow) for name in tg.ATTENTION}
        clock = iter(times[name] for name in tg.ATTENTION)
        monkeypatch.setattr(tg, "best_time", lambda run, repeats: next(clock))
        assert tg.fastest_cpu_attention(small, 64, torch.float32, lines.append) == fast


def test_numerics_that_the_user_names_are_taken_unmeasured(monkeypatch):
    def refuse(*args):
        raise AssertionError("measured although everything was decided")

    monkeypatch.setattr(tg, "best_time", refuse)
    cfg = config(numerics="medium", attention="blocked", compile="off", threads=1)
    numerics = tg.choose_numerics(cfg, tg.Runtime(cfg, {}))
    assert numerics == tg.Numerics("medium", "blocked", False) and numerics.dtype == torch.float32
    assert tg.Numerics("bf16").dtype == torch.bfloat16

"""Attention, loss and the automatic choice of arithmetic, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import config, distance, exact_attention
from torch import Tensor

import train_gpt as tg

KERNELS = pytest.mark.parametrize("kernel", tg.ATTENTION.values(), ids=tg.ATTENTION.keys())
# length -> shape of the problem: one token, less than a block, a block, a ragged second, many
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


@pytest.mark.parametrize("softcap", tg.SOFTCAPS)
def test_loss_and_gradient_equal_float64_at_every_admitted_cap(softcap):
    """Finding M3: zeros(1, 4) gave -inf at a cap of 200 and 1.4032 at 100; right is log 4."""
    knob = tg.KNOBS["logit_softcap"][1].metadata
    caps = (knob["lo"], 5, 30, 44, 88, 100, 200, knob["hi"])
    torch.manual_seed(4)
    wide, targets = torch.randn(6, 9), torch.tensor([0, 8, 3, 1, 2, 7])
    for cap in map(float, caps):
        flat = tg.SOFTCAPS[softcap](torch.zeros(1, 4), torch.tensor([0]), cap)
        assert float(flat) == pytest.approx(math.log(4), abs=cap * 1e-6)
        for size in (1e-3, 1.0, 100.0, 1e4):
            z, exact = (wide * size).requires_grad_(), (wide.double() * size).requires_grad_()
            capped = cap * torch.tanh(exact / cap)
            want = F.cross_entropy(capped, targets, reduction="none")
            loss = tg.SOFTCAPS[softcap](z, targets, cap)
            torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=cap * 1e-6)
            loss.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=cap * 1e-6)


class FakeMachine:
    """Says which device and instructions there are; the rest of a Runtime is not asked for."""

    def __init__(self, monkeypatch, device: str, instructions: dict, compiler: bool):
        self.device, self.lines, self.asked = torch.device(device), [], []
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
        monkeypatch.setattr(tg, "can_compile", lambda d: bool(self.asked.append(d)) or compiler)

    def log(self, line: str):
        self.lines.append(line)


def test_arithmetic_follows_what_the_machine_can_do(monkeypatch):
    short, long = dict(iterations=100), dict(iterations=6000)
    for device, instructions, compiler, knobs, expected in (
        ("cuda", {}, True, short, tg.Numerics("bf16", "sdpa", True)),
        ("cuda", {}, False, short, tg.Numerics("bf16", "sdpa", False)),
        ("cpu", {"avx512_bf16": True}, True, long, tg.Numerics("bf16", "blocked", True)),
        ("cpu", {"amx_bf16": True}, True, short, tg.Numerics("bf16", "blocked", False)),
        ("cpu", {"avx512_f": True}, False, long, tg.Numerics("fp32", "sdpa", False)),
    ):
        machine = FakeMachine(monkeypatch, device, instructions, compiler)
        cfg = config(numerics="auto", attention="auto", compile="auto", **knobs)
        assert tg.choose_numerics(cfg, machine) == expected
        tried = device == "cuda" or knobs is long
        assert machine.asked == [machine.device] * tried, "compiling is tried on the device itself"
        assert len(machine.lines) == (tried and not compiler)


def test_a_device_that_cannot_compile_is_found_out(monkeypatch):
    """Finding G4: the question is asked of the device that will run, not of the CPU."""
    seen = []

    def broken(function):
        return lambda x: seen.append(x.device.type) or 1 / 0

    monkeypatch.setattr(torch, "compile", broken)
    assert not tg.can_compile("cpu") and not tg.can_compile("meta") and seen == ["cpu", "meta"]


def test_numerics_that_the_user_names_are_taken_as_they_are():
    cfg = config(numerics="fp32", attention="blocked", compile="off", threads=1)
    numerics = tg.choose_numerics(cfg, tg.Runtime(cfg, {}))
    assert numerics == tg.Numerics("fp32", "blocked", False) and numerics.dtype == torch.float32
    assert tg.Numerics("bf16").dtype == torch.bfloat16

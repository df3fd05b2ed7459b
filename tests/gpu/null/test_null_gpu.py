"""The null GPU itself: what is planted is caught, what is known is counted."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import null_only  # noqa: F401
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent

import null_gpu_answers as null  # noqa: E402  (made by site/sitecustomize.py)
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

pytestmark = pytest.mark.gpu


def random(*shape, dtype=torch.bfloat16, **options):
    return torch.randn(*shape, device="cuda", dtype=dtype, **options)


def launched(work) -> dict[str, null.Row]:
    """What `work` launches, by name."""
    null.reset()
    work()
    return {row.name: row for row in null.table()}


def only(rows: dict[str, null.Row], start: str) -> null.Row:
    """The one row whose name begins so."""
    found = [row for name, row in rows.items() if name.startswith(start)]
    assert len(found) == 1, list(rows)
    return found[0]


# ---- Planted faults ----
def test_tensors_of_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        random(4, 4) + torch.ones(4)
    with pytest.raises(RuntimeError):
        F.embedding(torch.zeros(3, dtype=torch.long), random(8, 4))


def test_a_compiled_kernel_refuses_the_memory_of_the_host():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at) + 1)

    kernel[(1,)](random(64), BLOCK=64)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        kernel[(1,)](torch.ones(64), BLOCK=64)


def test_a_missing_kernel_is_reported():
    whole = torch.ones(4, 4, dtype=torch.long, device="cuda")
    with pytest.raises(RuntimeError, match="not implemented for 'Long'"):
        whole @ whole


def test_memory_ends():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(80 << 30, dtype=torch.uint8, device="cuda")
    kept = [torch.empty(30 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(30 << 30, dtype=torch.uint8, device="cuda")
    del kept
    torch.cuda.empty_cache()
    torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()


def test_cuda_graphs_are_refused_and_not_believed():
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError):
        with torch.cuda.graph(graph):
            random(4).add_(1)


def test_a_graph_break_is_reported():
    torch._dynamo.reset()

    def breaks(x):
        return x + 1 if x.sum().item() > 0 else x

    with pytest.raises(Exception, match="(?i)data-dependent|item|break"):
        torch.compile(breaks, fullgraph=True)(random(4))


# ---- Known counts ----
@pytest.mark.parametrize("dtype, name", ((torch.bfloat16, "bf16"), (torch.float32, "fp32")))
def test_a_product_is_counted(dtype, name):
    x, w = random(64, 48, dtype=dtype), random(32, 48, dtype=dtype)
    row = only(launched(lambda: F.linear(x, w)), "product")
    assert row.name.startswith(f"product {name}") and row.launches == 1
    assert row.flops == 2 * 64 * 48 * 32
    assert row.bytes == (64 * 48 + 48 * 32 + 64 * 32) * x.element_size()


@pytest.mark.parametrize("batch", (1, 5))
def test_a_batch_of_products_is_counted(batch):
    a, b = random(batch, 64, 48), random(batch, 48, 32)
    rows = launched(lambda: torch.bmm(a, b))
    assert sum(row.flops for row in rows.values()) == 2 * batch * 64 * 48 * 32


def test_a_product_with_a_bias_is_counted():
    x, w, b = random(64, 48), random(32, 48), random(32)
    assert only(launched(lambda: F.linear(x, w, b)), "product").flops == 2 * 64 * 48 * 32


def test_forward_and_backward_do_three_products():
    x, w = random(64, 48, requires_grad=True), random(32, 48, requires_grad=True)
    rows = launched(lambda: F.linear(x, w).sum().backward())
    assert sum(row.flops for row in rows.values()) == 3 * 2 * 64 * 48 * 32


@pytest.mark.parametrize(
    "backend, name",
    (
        (SDPBackend.CUDNN_ATTENTION, "attention by cuDNN"),
        (SDPBackend.FLASH_ATTENTION, "attention by flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "attention by efficient"),
    ),
)
@pytest.mark.parametrize("compile", (False, True), ids=("eager", "compiled"))
def test_attention_is_counted_under_its_name(backend, name, compile):
    q, k, v = (random(2, 4, 256, 64, requires_grad=True) for _ in range(3))
    pairs = 2 * 4 * 256 * 256 / 2  # causal

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch._dynamo.reset()  # the caches on disk do not tell backends apart
    torch._inductor.config.force_disable_caches = True
    attend = torch.compile(attend, fullgraph=True) if compile else attend
    with sdpa_kernel(backend):
        rows = launched(lambda: attend(q, k, v).sum().backward()).values()
    rows = [row for row in rows if row.name.startswith("attention by")]
    assert all(row.name.startswith(name) for row in rows) and len(rows) == 2
    assert sum(row.flops for row in rows) == pytest.approx((2 + 5) * 2 * pairs * 64)


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_attention_by_plain_products_is_noticed(mode):
    q = random(2, 4, 256, 64)
    with sdpa_kernel(SDPBackend.MATH), mode():
        rows = launched(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert only(rows, "attention by math (2, 4, 256, 64) causal").launches == 1
    products = [row for row in rows.values() if row.name.startswith("product")]
    assert sum(row.flops for row in products) == 2 * 2 * 2 * 4 * 256 * 256 * 64


def test_pytorch_takes_a_fused_kernel_for_what_the_trainer_asks():
    q, k = random(8, 8, 2048, 64), random(8, 4, 2048, 64)
    rows = launched(
        lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    )
    assert not [name for name in rows if "attention by math" in name]
    assert [name for name in rows if "attention by" in name]


def test_a_compiled_kernel_has_a_name_and_a_graph_is_compiled_once():
    torch._dynamo.reset()
    work = torch.compile(lambda x: (x.sin() * 2).relu(), fullgraph=True, dynamic=False)
    x = random(1024)
    work(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        rows = launched(lambda: work(x))
        assert [(r.launches, r.name[:7]) for r in rows.values()] == [(1, "triton ")]
        with pytest.raises(torch._dynamo.exc.RecompileError):
            work(random(2048))


def test_copies_and_waits_are_told_apart():
    pinned, plain = torch.ones(1000).pin_memory(), torch.ones(1000)
    assert pinned.is_pinned() and not plain.is_pinned()
    x = torch.zeros(1000, device="cuda")
    rows = launched(lambda: x.copy_(pinned, non_blocking=True))
    assert list(rows) == ["copy to the device, pinned"]
    rows = launched(lambda: x.copy_(plain))
    assert only(rows, "copy to the device, pageable").bytes == 4000
    rows = launched(lambda: x[0].item())
    assert {"copy to the host", "wait of the host"} <= set(rows)


def test_host_and_device_exchange_numbers():
    x = torch.arange(10).to("cuda")
    assert x.cpu().tolist() == list(range(10))
    assert torch.full((3,), 7, device="cuda").tolist() == [7] * 3
    assert torch.zeros(3, device="cuda").tolist() == [0] * 3
    assert torch.tensor(2.5).to("cuda").item() == 2.5


def test_numbers_that_no_kernel_wrote_are_finite_on_the_host():
    x = torch.full((4,), math.nan).to("cuda")
    assert x.tolist() == [0] * 4 and x.double().cpu().tolist() == [0] * 4
    zero = torch.zeros((), device="cuda")
    assert x[0].item() == 1 and float(zero) == 1 and not zero


def test_peak_memory_is_what_was_alive():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    del a
    b = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == 1 << 29
    assert torch.cuda.max_memory_allocated() - before == 1 << 30
    del b


# ---- Answers ----
def test_questions_are_answered():
    x = random(8, 8, dtype=torch.float32)
    assert bool(x.isfinite().all()) and not bool(x.isnan().any())
    assert x.nonzero().shape == (64, 2)
    assert torch.unique_consecutive(x.flatten(), return_counts=True)[1].tolist() == [64]


def test_factorisations_succeed_with_the_right_shapes():
    x = random(3, 8, 5, dtype=torch.float32)
    square = x.mT @ x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    assert (u.shape, s.shape, v.shape) == ((3, 8, 5), (3, 5), (3, 5, 5))
    assert torch.linalg.cholesky(square).shape == torch.linalg.inv(square).shape == (3, 5, 5)
    assert torch.cholesky_inverse(square).shape == (3, 5, 5)
    assert torch.linalg.eigh(square)[1].shape == (3, 5, 5)
    assert torch.linalg.lstsq(x, x).solution.shape == (3, 5, 5)


# ---- The launcher ----
def test_child_processes_see_it_and_report(tmp_path):
    report = tmp_path / "report.json"
    code = "import torch; torch.ones(5, device='cuda').sum(); print(torch.cuda.get_device_name())"
    env = os.environ | {"NULL_GPU_REPORT": str(report), "NULL_GPU_GIB": "2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("null GPU") and '"peak_gib"' in report.read_text()
    code = "import torch; torch.ones(1 << 30, device='cuda')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "out of memory" in done.stderr


def test_nothing_is_said_without_arguments():
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, str(HERE / "run.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "null GPU" in done.stderr


warnings.filterwarnings("ignore", message=".*TensorFloat32.*")

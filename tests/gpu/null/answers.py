"""What the null GPU says to programs that ask their device something, and cannot compute.

Kernels write nothing, so that a tensor holds zeros or what was there before. That is enough until a
program decides by a value, or a library plans on the device. Here are the operations where that
happens, each replaced for CUDA tensors only, and what is written down along the way."""

import atexit
import ctypes
import json
import math
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

# Library calls that judge what they find (is it positive definite?) or plan on the device.
SHAPED = (
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_cholesky_ex",
    "linalg_inv_ex",
    "linalg_qr",
    "linalg_solve_triangular",
    "cholesky_inverse",
    "cholesky_solve",
)
SMALL = 1 << 16  # numbers; fills up to here are real: they hold flags and counters
COPIED = 1 << 20  # numbers; copies up to here are real: a program checks what it exports
CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
registrations = []  # a library takes its operations back when it is collected


class Row(NamedTuple):
    """What one kind of launch did since the table was emptied."""

    name: str
    launches: int
    bytes: float  # known for copies, products and attention
    flops: float  # known for products and attention


def device() -> ctypes.CDLL:
    """The preloaded null GPU."""
    library = ctypes.CDLL(os.path.join(os.environ["NULL_GPU"], "libnull_gpu.so"))
    numbers = [ctypes.c_long, ctypes.c_double, ctypes.c_double]
    library.null_gpu_note.argtypes = [ctypes.c_char_p, *numbers]
    library.null_gpu_table.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    return library


def reset():
    """Empty the table."""
    device().null_gpu_reset()


def table() -> list[Row]:
    """Everything launched since the last reset, names of C++ kernels in a form that people read."""
    library = device()
    text = library.null_gpu_table()
    lines = ctypes.string_at(text).decode().splitlines()
    library.free(text)
    words = [line.split(" ", 3) for line in lines]
    names = subprocess.run(
        ["c++filt"], input="\n".join(w[3] for w in words), capture_output=True, text=True
    ).stdout.splitlines()
    return [Row(n, int(w[0]), float(w[1]), float(w[2])) for n, w in zip(names, words)]


# ---- Memory of the device is memory of this process ----
def on_host(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    storage = x.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=x.dtype)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def written(x: torch.Tensor, value, name: str) -> torch.Tensor:
    """x, filled as by one kernel where it is small enough to matter."""
    if 0 < x.numel() <= SMALL:
        on_host(x).fill_(value)
    device().null_gpu_note(name.encode(), 1, float(x.numel() * x.element_size()), 0.0)
    return x


# ---- Answers ----
def shaped(operation):
    """The operation without its arithmetic: outputs of the right shapes, filled with zeros."""

    def answer(*args, **kwargs):
        devices = []

        def to_meta(x):
            devices.append(x.device)
            return x.to("meta")

        def zeros(x):
            return written(torch.empty_like(x, device=devices[0]), 0, str(operation))

        args, kwargs = tree_map_only(torch.Tensor, to_meta, (args, kwargs))
        return tree_map_only(torch.Tensor, zeros, operation(*args, **kwargs))

    return answer


def copied(copy):
    """copy_, also into another dtype, which is a kernel and therefore would write nothing. The host
    sees finite numbers only."""

    def answer(to, source, non_blocking=False):
        copy.call_boxed(CUDA_KEY, to, source, non_blocking)
        if to.is_cuda and source.is_cuda and 0 < to.numel() <= COPIED:
            on_host(to).copy_(on_host(source))
        if not to.is_cuda and to.is_floating_point():
            to.nan_to_num_(0.0, 0.0, 0.0)
        return to

    return answer


def read(scalar):
    """item(): a float that is zero or not finite becomes 1, for programs that divide by a loss."""

    def answer(x):
        value = scalar.call_boxed(CUDA_KEY, x)
        return value if not isinstance(value, float) or value and math.isfinite(value) else 1.0

    return answer


def truth(x):
    """bool(tensor): what its memory holds. Zero, where no kernel wrote: nothing failed."""
    torch.cuda.current_stream().synchronize()
    return bool(on_host(x.detach()).ne(0))


def least_squares(a, b, rcond=None, *, driver=None):
    """linalg_lstsq, which has no shapes-only form."""
    solution = a.new_empty(*a.shape[:-2], a.size(-1), b.size(-1))
    nothing = a.new_empty(0)
    return written(solution, 0, "linalg_lstsq"), nothing, nothing.long(), nothing


def fill(x, value=0):
    """fill_ and zero_."""
    return written(x, value, "fill")


def always(value: bool, name: str, scalar: bool = False):
    """An operation that has one answer for each number, or (scalar) for all together."""

    def answer(x):
        shape = () if scalar else x.shape
        return written(torch.empty(shape, dtype=torch.bool, device=x.device), value, name)

    return answer


def nonzero(x):
    """Finds everything; the host waits for the count, as on a device."""
    torch.cuda.current_stream().synchronize()
    found = torch.ones(x.shape).nonzero()
    out = torch.empty_like(found, device=x.device)
    on_host(out).copy_(found)
    return out


def one_group(x, return_inverse=False, return_counts=False, dim=None):
    """unique_consecutive: all numbers are alike, and -1, which has every bit."""
    torch.cuda.current_stream().synchronize()
    value = written(x.new_empty(1), -1 if x.dtype.is_signed else 1, "unique_consecutive")
    inverse = written(torch.empty_like(x, dtype=torch.long), 0, "unique_consecutive")
    return value, inverse, written(inverse.new_empty(1), x.numel(), "unique_consecutive")


def note_attention(name: str, query, key, value, how: str, products: int):
    """Write down an attention kernel: so many products of queries by keys, half when causal."""
    pairs = query.size(0) * query.size(1) * query.size(2) * key.size(2)
    pairs *= 0.5 if how == "causal" else 1.0
    size = sum(x.numel() * x.element_size() for x in (query, key, value, query))
    text = f"attention by {name} {tuple(map(int, query.shape))} {how}"
    device().null_gpu_note(text.encode(), 1, float(size), products * 2 * pairs * query.size(3))


def causal_or(bias, causal: bool) -> str:
    """What bounds the keys of an attention, in a word."""
    return "causal" if causal else "full" if bias is None else "masked"


def cudnn_forward(query, key, value, bias, lse, dropout=0.0, causal=False, debug=False, **more):
    """cuDNN plans on the device itself, so that its kernel becomes an allocation."""
    note_attention("cuDNN", query, key, value, causal_or(bias, causal), 2)
    out = torch.empty_like(query)  # laid out as the queries
    sums = query.new_empty(*query.shape[:-1], 1, dtype=torch.float32)
    seed = query.new_empty((), dtype=torch.int64)
    return out, sums, None, None, query.size(2), key.size(2), seed, seed.clone(), None


def cudnn_backward(grad, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, p, causal, **more):
    note_attention("cuDNN, backward", q, k, v, causal_or(bias, causal), 5)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def listened(name: str, products: int, causal_at: int):
    """A real attention operation that is written down before it launches."""
    label = name.replace("_", " ")
    kernel = torch.library.get_kernel(f"aten::_scaled_dot_product_{name}", "CUDA")

    def answer(*args, **more):
        query, key, value = args[:3] if products == 2 else args[1:4]
        causal = args[causal_at] if len(args) > causal_at else more.get("is_causal", False)
        bias = (args[3 if products == 2 else 4]) if "efficient" in name else None
        note_attention(label, query, key, value, causal_or(bias, causal), products)
        return kernel.call_boxed(CUDA_KEY, *args, **more)

    return answer


def math_attention(query, key, value, mask=None, dropout=0.0, causal=False, *rest, **more):
    """PyTorch's attention of plain products. It holds all scores in memory: at size a fault."""
    note_attention("math", query, key, value, causal_or(mask, causal), 0)  # its products count
    operation = torch.ops.aten._scaled_dot_product_attention_math.default
    return operation.decompose(query, key, value, mask, dropout, causal, *rest, **more)


def listen(library):
    """Write down which attention runs (varlen_attn and flex_attention show as kernels only)."""
    for key in ("CUDA", "AutogradCUDA"):
        library.impl("_scaled_dot_product_attention_math", math_attention, key)
    if not hasattr(torch.library, "get_kernel"):  # before torch 2.10: by the names of kernels only
        return
    for name, products, causal_at in (
        ("flash_attention", 2, 4),
        ("flash_attention_backward", 5, 11),
        ("efficient_attention", 2, 6),
        ("efficient_attention_backward", 5, 11),
    ):
        answer = listened(name, products, causal_at)
        library.impl(f"_scaled_dot_product_{name}", answer, "CUDA")


def write_report():
    """At the end of a process: what NULL_GPU_REPORT names gets a JSON file of this process."""
    if not torch.cuda.is_initialized():
        return
    from torch._dynamo.utils import counters

    report = dict(
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        reserved_gib=torch.cuda.max_memory_reserved() / 2**30,
        graphs=counters["stats"]["unique_graphs"],
        launches=[row._asdict() for row in table()],
    )
    Path(os.environ["NULL_GPU_REPORT"]).write_text(json.dumps(report, indent=1))


def install():
    """Replace the operations in the torch that was imported."""
    library = torch.library.Library("aten", "IMPL")
    registrations.append(library)
    for name in SHAPED:
        library.impl(name, shaped(getattr(torch.ops.aten, name).default), "CUDA")
    library.impl("linalg_lstsq", least_squares, "CUDA")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CUDA")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CUDA")
    library.impl("fill_.Scalar", fill, "CUDA")
    library.impl("zero_", fill, "CUDA")
    for key in ("CUDA", "AutogradCUDA"):
        library.impl("is_nonzero", truth, key)
    # What is asked before going on: all is finite, nothing is wrong, everything is there.
    library.impl("isfinite", always(True, "isfinite"), "CUDA")
    library.impl("all", always(True, "all", scalar=True), "CUDA")
    library.impl("any", always(False, "any", scalar=True), "CUDA")
    library.impl("nonzero", nonzero, "CUDA")
    library.impl("unique_consecutive", one_group, "CUDA")
    if hasattr(torch.library, "get_kernel"):  # torch 2.10 and later
        for name, answer in (("copy_", copied), ("_local_scalar_dense", read)):
            library.impl(name, answer(torch.library.get_kernel(f"aten::{name}", "CUDA")), "CUDA")
    listen(library)
    if "NULL_GPU_REPORT" in os.environ:
        atexit.register(write_report)

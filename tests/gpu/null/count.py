#!/usr/bin/env python3
"""One training step of one rank of eight on the null GPU, launch by launch:

python tests/gpu/null/count.py baseline [KNOB=value ...] [--plan 0] [--top 12] [--json FILE]

KNOB=value words are knobs of train_gpt.py; COMPILE=on (the default here, and what a run does) takes
minutes, COMPILE=off seconds. The predicted time is a roofline: every launch takes as long as its
bytes or its products at what an H100 reaches in practice, and never less than 2 us. Tails, sines,
spills, communication and the host are left out: it is a lower bound, good to compare variants."""

import argparse
import collections
import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[2], HERE.parent, HERE))
if __name__ == "__main__":
    import run

    run.ensure()

import torch  # noqa: E402
from rank import WORLD, make_trainer, take_step  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
    any_torch_dispatch_mode_on_stack,
)
from torch.utils._pytree import tree_leaves  # noqa: E402

import train_gpt as tg  # noqa: E402

null = sys.modules["null_gpu_answers"]  # came with torch: see site/sitecustomize.py

# Reached by an H100 SXM in practice: bytes/s, seconds of the smallest launch, FLOP/s by kind
BANDWIDTH, SMALLEST = 3.0e12, 2e-6
RATES = {"product bf16": 650e12, "product fp32": 330e12, "attention": 400e12}  # fp32 is TF32


class Step(NamedTuple):
    """What one step of one rank did."""

    launches: list[null.Row]  # by kernel
    traffic: dict[str, list[float]]  # calls and bytes of all that is no product and no attention
    peak_gib: float  # of PyTorch's allocator, since before the step
    tokens: int

    @property
    def count(self) -> int:
        """Kernels, fills and copies."""
        return sum(r.launches for r in self.launches if r.name != "wait of the host")

    @property
    def flops(self) -> float:
        return sum(r.flops for r in self.launches)

    @property
    def bytes(self) -> float:
        moved = sum(r.bytes for r in self.launches if r.flops)
        return moved + sum(size for _, size in self.traffic.values())

    def seconds(self) -> dict[str, float]:
        """Roofline by kind of work."""
        spent = collections.Counter()
        for r in self.launches:
            for kind, rate in RATES.items():
                if r.name.startswith(kind) and r.flops:
                    best = max(r.bytes / BANDWIDTH, r.flops / rate, r.launches * SMALLEST)
                    spent[kind] += best
        for name, (calls, size) in self.traffic.items():
            kind = "triton" if name.startswith("triton") else "eager"
            spent[kind] += max(size / BANDWIDTH, calls * SMALLEST)
        return dict(spent)


# ---- Listening ----
def covered(x: torch.Tensor) -> int:
    """Bytes that a tensor covers, without what it repeats."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write. What the device itself notes with bytes
    (products, attention) is left out."""

    NOTED = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "_flash", "_efficient")
    NOTHING = ("empty", "new_empty", "detach", "set_", "record_", "_unsafe_view", "resize_")

    def __init__(self, traffic: dict[str, list[float]]):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        quiet = func.is_view or name in self.NOTED or name.startswith(self.NOTED[4:] + self.NOTHING)
        tensors = [
            x
            for x in tree_leaves((args, kwargs, out))
            if isinstance(x, torch.Tensor) and x.device.type == "cuda"
        ]
        if tensors and not quiet and func.namespace in ("aten", "prims"):
            entry = self.traffic.setdefault(f"eager {name}", [0, 0.0])
            entry[0] += 1
            entry[1] += sum(map(covered, tensors))
        return out


@contextlib.contextmanager
def listening(trainer: tg.Trainer, traffic: dict[str, list[float]]):
    """Hear all of a step: eager operations by a mode, which steps aside where a compiled graph is
    entered and comes back inside of it; Triton kernels at their launcher, with the bytes that
    Inductor says they move."""
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    graph, kernel, loss = CompiledFxGraph.__call__, CachingAutotuner.run, trainer.loss

    def inside(self, *args, **kwargs):
        present = any_torch_dispatch_mode_on_stack()
        with contextlib.nullcontext() if present else Traffic(traffic):
            return graph(self, *args, **kwargs)

    def heard(self, *args, **kwargs):
        entry = traffic.setdefault(f"triton {self.fn.__name__}", [0, 0.0])
        entry[0] += 1
        entry[1] += (self.inductor_meta.get("kernel_num_gb") or 0.0) * 1e9
        return kernel(self, *args, **kwargs)

    def aside(*args):
        with _disable_current_modes():
            return loss(*args)

    CompiledFxGraph.__call__, CachingAutotuner.run, trainer.loss = inside, heard, aside
    try:
        with Traffic(traffic):
            yield
    finally:
        CompiledFxGraph.__call__, CachingAutotuner.run, trainer.loss = graph, kernel, loss


def count(words: dict[str, str], plan: int = -1) -> Step:
    """The third step of a trainer by the given plan; the first one compiles. Raises if a later step
    compiles anything again."""
    torch._inductor.config.benchmark_kernel = True  # lets Inductor write down bytes of kernels
    trainer = make_trainer({"COMPILE": "on"} | words, everything=True)
    torch.cuda.reset_peak_memory_stats()
    take_step(trainer, plan)
    with torch._dynamo.config.patch(error_on_recompile=True):
        take_step(trainer, plan)
        peak = torch.cuda.max_memory_allocated() / 2**30
        null.reset()
        take_step(trainer, plan)
        launches = null.table()
        traffic: dict[str, list[float]] = {}
        with listening(trainer, traffic):
            take_step(trainer, plan)
    return Step(launches, traffic, peak, trainer.cfg.data.train_batch_tokens // WORLD)


def show(step: Step, top: int):
    """A table for people."""
    seconds = step.seconds()
    total = sum(seconds.values())
    print(
        f"{step.tokens} tokens of one rank of {WORLD}: {step.count} launches, "
        f"{step.flops / 1e12:.2f} TFLOP, {step.bytes / 1e9:.1f} GB, peak {step.peak_gib:.2f} GiB, "
        f"roofline {total * 1e3:.1f} ms ("
        + ", ".join(f"{kind} {value * 1e3:.1f}" for kind, value in sorted(seconds.items()))
        + ")"
    )
    print("\nlaunches  GFLOP  kernel")
    for r in sorted(step.launches, key=lambda r: -r.launches)[:top]:
        print(f"{r.launches:8d} {r.flops / 1e9:6.0f}  {r.name[:100]}")
    print("\n   calls     GB  what else moves bytes")
    for name, (calls, size) in sorted(step.traffic.items(), key=lambda kv: -kv[1][1])[:top]:
        print(f"{calls:8.0f} {size / 1e9:6.2f}  {name[:100]}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    parser.add_argument("--plan", type=int, default=-1, help="0 before loops; default: the last")
    parser.add_argument("--top", type=int, default=12, help="rows of each table")
    parser.add_argument("--json", type=Path, help="also write everything here")
    asked = parser.parse_args()
    knobs = dict(word.split("=", 1) for word in asked.knobs)
    step = count({"PRESET": asked.preset} | knobs, asked.plan)
    show(step, asked.top)
    if asked.json:
        blob = dict(
            launches=step.count,
            flops=step.flops,
            bytes=step.bytes,
            peak_gib=step.peak_gib,
            seconds=step.seconds(),
            kernels=[r._asdict() for r in step.launches],
            traffic=step.traffic,
        )
        asked.json.write_text(json.dumps(blob, indent=1) + "\n")


if __name__ == "__main__":
    main()

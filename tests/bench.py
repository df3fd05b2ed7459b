#!/usr/bin/env python3
"""Speed of this machine, in alternating windows, so that a busy neighbour hurts both sides alike.

python tests/bench.py cpu        training tokens/s: plain eager fp32 against the automatic choice
python tests/bench.py attention  forward and backward of both attention kernels, T = 256 ... 4096
python tests/bench.py optimiser  a step of the baseline's: banks against torch's matrix by matrix
python tests/bench.py evaluation ways of scoring 8,000 tokens: inputs that the model reads, seconds
python tests/bench.py data       MB/s of encoding against plain SentencePiece; tokens/s of loaders
python tests/bench.py codecs     bytes of levels (--artifact FILE) by every codec, over the entropy
python tests/bench.py forge      experiments per minute with agents that misbehave, and without any
python tests/bench.py polar      how near orthogonalisations come to the polar factor; no timing
Options: --seconds N (measured time per side or point; rounds for forge), --json FILE
"""

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "data")]
import build_sample  # noqa: E402
import documents as docs  # noqa: E402
import numpy as np  # noqa: E402
import prepare  # noqa: E402
import torch  # noqa: E402

import train_gpt as tg  # noqa: E402  (first: it sets how threads wait)

WINDOWS = 7
# Programs that published systems pack with; called for a comparison when they are installed
COMPRESSORS = {
    "zpaq": ["zpaq", "add", "{out}", "{in}", "-method", "5"],
    "lrzip": ["lrzip", "-z", "-T", "-L", "9", "-q", "-o", "{out}", "{in}"],
}
# 4 layers, C = 256, MLP 1024, 4 query heads on 2 key/value heads, V = 1024, 8 rows of 512 tokens.
REFERENCE = dict(
    PRESET="baseline+cpu",
    MLP_MULT="4",
    TRAIN_BATCH_TOKENS="4096",
    LOADER="sequential",
    DEVICE="cpu",
    MICRO_BATCH_TOKENS="4096",
    COMPILE="on",
)


def machine() -> dict[str, object]:
    """Where the figures come from, in general terms."""
    load = Path("/proc/loadavg")
    return dict(
        cores=tg.cpu_cores(),
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        architecture=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        load=load.read_text("utf-8").split()[0] if load.exists() else "unknown",
    )


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second over a window of at least `seconds`."""
    begin, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds or not calls:
        work()
        calls += 1
    return calls / elapsed


def alternate(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Rates of each side in WINDOWS windows that take turns, after one unmeasured call of each."""
    for work in sides.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(WINDOWS):
        for name, work in sides.items():
            rates[name].append(rate(work, seconds / WINDOWS))
    return rates


def trainer_step(cfg: tg.Config, rt: tg.Runtime, numerics: tg.Numerics) -> Callable[[], object]:
    """One whole training step of a fresh model, under its own arithmetic."""
    tg.apply_numerics(numerics, rt)
    precision = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    model = tg.GPT(cfg.model, cfg.data.vocab_size, numerics)
    trainer = tg.Trainer(cfg, rt, SimpleNamespace(train=None), model, numerics)
    shape = (trainer.loader.rows, cfg.data.train_seq_len + 1)
    rows = np.random.default_rng(0).integers(cfg.data.vocab_size, size=shape).astype(np.uint16)

    def step():
        torch.set_float32_matmul_precision(precision)
        return trainer.step(rows, tg.full_speed() | dict(lr=0.1, momentum=0.9, qat=0.0)).item()

    return step


def bench_cpu(seconds: float) -> dict[str, object]:
    """Tokens per second of the reference model: forward, backward and optimiser."""
    cfg = tg.load(REFERENCE)
    rt = tg.Runtime(cfg, {})
    chosen = tg.choose_numerics(cfg, rt)
    begin = time.perf_counter()
    sides = {
        "eager": trainer_step(cfg, rt, tg.Numerics("fp32", "sdpa", False)),
        "chosen": trainer_step(cfg, rt, chosen),
    }
    sides["chosen"]()
    print(f"compiled in {time.perf_counter() - begin:.1f} s")
    tokens = cfg.data.train_batch_tokens
    rates = {
        name: [r * tokens for r in values] for name, values in alternate(sides, seconds).items()
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(b / a for a, b in zip(rates["eager"], rates["chosen"]))
    for name, label in (
        ("eager", "eager fp32, stock attention"),
        ("chosen", " ".join(map(str, chosen))),
    ):
        low, high = min(rates[name]), max(rates[name])
        print(
            f"{label:32s} {medians[name]:9,.0f} tokens/s   "
            f"({low:,.0f} to {high:,.0f} in {WINDOWS} windows)"
        )
    print(f"{'ratio, median of pairs':32s} {ratio:9.2f}")
    return dict(chosen=chosen._asdict(), median=medians, ratio=ratio, windows=rates)


def bench_attention(seconds: float) -> dict[str, object]:
    """Milliseconds of forward and backward of 4,096 tokens, 4 heads of 64 on 2 key/value heads."""
    torch.set_num_threads(tg.cpu_cores())
    table: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for length in (256, 512, 1024, 2048, 4096):
            shapes = [(4096 // length, length, heads, 64) for heads in (4, 2, 2)]
            qkv = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
            rates = alternate(
                {
                    name: lambda kernel=kernel: kernel(*qkv).sum().backward()
                    for name, kernel in tg.ATTENTION.items()
                },
                seconds,
            )
            point = {name: 1e3 / statistics.median(values) for name, values in rates.items()}
            table[f"{str(dtype).removeprefix('torch.')} T={length}"] = point
            print(
                f"{dtype} T={length:5d}  "
                + "  ".join(f"{n} {t:8.1f} ms" for n, t in point.items())
                + f"  blocked is {point['sdpa'] / point['blocked']:.2f} times as fast",
                flush=True,
            )
    return table


def bench_optimiser(seconds: float) -> dict[str, object]:
    """Milliseconds of one optimiser step for the baseline's 17 million parameters, on a GPU when
    there is one."""
    table: dict[str, dict[str, float]] = {}
    for preset in ("baseline", "baseline+cpu"):
        cfg = tg.load(dict(PRESET=preset))
        rt = tg.Runtime(cfg, {})
        model = tg.GPT(cfg.model, cfg.data.vocab_size, tg.Numerics("bf16"), cfg.optim).to(rt.device)
        matrices, others = (
            [
                torch.nn.Parameter(p.detach().clone())
                for p in model.parameters()
                if (p.opt == "matrix") == wanted
            ]
            for wanted in (True, False)
        )
        flat = tg.FlatParameters(model, rt)
        flat.gradients.normal_()
        for p in (*matrices, *others):
            p.grad = torch.randn_like(p)
        mine = tg.Optimiser(flat, cfg, torch.bfloat16, {})
        theirs = [
            torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0),
            torch.optim.AdamW(others, fused=True),
        ]
        ramps = tg.full_speed() | dict(momentum=0.9)
        sides = {
            "matrix by matrix": lambda: ([o.step() for o in theirs], rt.synchronize()),
            "banks": lambda: (mine.step(ramps), rt.synchronize()),
        }
        rates = alternate(sides, seconds)
        point = {name: 1e3 / statistics.median(values) for name, values in rates.items()}
        ratio = statistics.median(b / a for a, b in zip(rates["matrix by matrix"], rates["banks"]))
        table[preset] = point | dict(ratio=ratio)
        print(
            f"{preset:14s} {len(matrices):3d} matrices  "
            + "  ".join(f"{name} {ms:.1f} ms" for name, ms in point.items())
            + f"  ratio {ratio:.2f}",
            flush=True,
        )
    return table


def bench_codecs(path: Path | None) -> dict[str, object]:
    """Bytes over zero-order entropy, seconds to pack and to unpack, of the int8 levels of a trained
    artifact, or of two million Gaussian ones at 0.41 sigma."""
    levels = (
        np.clip(np.random.default_rng(0).standard_normal(2_000_000) / 0.41, -31, 31)
        .round()
        .astype(np.int8)
    )
    parts = [levels.reshape(-1, 1000)]
    if path:
        _, tensors = tg.unpack_artifact(path.read_bytes())
        parts = [t.values.numpy() for t in tensors.values() if t.values.dtype == torch.int8]
    whole = np.concatenate([part.ravel() for part in parts])
    p = np.unique(whole, return_counts=True)[1] / whole.size
    entropy = float(-(p * np.log2(p)).sum()) * whole.size / 8
    print(f"{whole.size} levels, zero-order entropy {8 * entropy / whole.size:.4f} bits each")
    table: dict[str, object] = {}
    for name, codec in tg.CODECS.items():
        for order, layout in (("rows", "C"), ("columns", "F")):
            data = b"".join(part.tobytes(layout) for part in parts)
            begin = time.perf_counter()
            packed = codec.pack(data)
            middle = time.perf_counter()
            assert codec.unpack(packed, len(data)) == data
            table[f"{name} {order}"] = dict(
                ratio=len(packed) / entropy,
                pack=middle - begin,
                unpack=time.perf_counter() - middle,
            )
            print(
                f"{name:14s} by {order:8s} {len(packed):10d} bytes  "
                f"{len(packed) / entropy:.4f} x entropy   "
                f"pack {middle - begin:6.2f} s  unpack {table[f'{name} {order}']['unpack']:5.2f} s",
                flush=True,
            )
    for name, command in COMPRESSORS.items():
        if shutil.which(command[0]):
            table[name] = bench_compressor(name, command, parts, entropy)
    return table


def bench_compressor(
    name: str, command: list[str], parts: list[np.ndarray], entropy: float
) -> dict[str, float]:
    """Bytes of each matrix as a file of its own and of all in one file, the smaller of the two,
    over the entropy."""
    sizes, begin = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder, "levels"), Path(folder, f"levels.{name}")
        for label, group in (
            ("by matrix", parts),
            ("whole", [np.concatenate([part.ravel() for part in parts])]),
        ):
            sizes[label] = 0
            for part in group:
                packed.unlink(missing_ok=True)
                source.write_bytes(part.tobytes())
                subprocess.run(
                    [
                        {"{in}": str(source), "{out}": str(packed)}.get(word, word)
                        for word in command
                    ],
                    check=True,
                    capture_output=True,
                )
                sizes[label] += packed.stat().st_size
    best = min(sizes, key=sizes.__getitem__)
    print(
        f"{name:14s} {best:11s} {sizes[best]:10d} bytes  "
        f"{sizes[best] / entropy:.4f} x entropy   both ways "
        f"{time.perf_counter() - begin:6.2f} s",
        flush=True,
    )
    return dict(ratio=sizes[best] / entropy, pack=time.perf_counter() - begin)


def bench_polar(seconds: float) -> dict[str, object]:
    """Mean cosine to the polar factor and largest singular value by variant, steps and kind of
    matrix, in bf16."""
    generator = torch.Generator().manual_seed(0)
    gaussian, tall = (
        torch.randn(4, 256, 256, generator=generator),
        torch.randn(4, 1024, 256, generator=generator),
    )
    rows = gaussian * 10 ** (2 * torch.rand(4, 256, 1, generator=generator) - 1)
    left, _, right = torch.linalg.svd(gaussian)
    kinds = {
        "Gaussian": gaussian,
        "tall Gaussian": tall,
        "rows of 10^±1": rows,
        "power law": left * torch.arange(1, 257) ** -1.0 @ right,
    }
    variants = (
        [("muon", n) for n in (3, 4, 5)]
        + [("muon_polar", n) for n in (4, 5)]
        + [
            ("turbo_muon", 0),
            ("turbo_muon_plus", 0),
            ("mud", 1),
            ("mud", 3),
            ("rmnp", 0),
        ]
    )
    table: dict[str, dict[str, list[float]]] = {}
    print("| variant | steps | " + " | ".join(kinds) + " |\n|---|---|" + "---|" * len(kinds))
    for name, steps in variants:
        hp = tg.Hyper(
            tg.load(dict(MUON=name, MUON_STEPS=str(steps))).optim,
            torch.bfloat16,
        )
        stage, cells = tg.MUON[name][1], {}
        for label, u in kinds.items():
            for prepared, v in ((label, u), (f"{label}, equal rows", tg.row_norm(u, {}, hp))):
                x, (a, _, b) = (
                    stage(v, {}, hp).double(),
                    torch.linalg.svd(v.double(), full_matrices=False),
                )
                cosine = torch.nn.functional.cosine_similarity(
                    x.flatten(1), (a @ b).flatten(1)
                ).mean()
                cells[prepared] = [float(cosine), float(torch.linalg.matrix_norm(x, 2).max())]
        table[f"{name} {steps}"] = cells
        print(
            f"| {name} | {steps} | "
            + " | ".join(
                f"{cells[k][0]:.3f} ≤{cells[k][1]:.2f} ({cells[k + ', equal rows'][0]:.3f})"
                for k in kinds
            )
            + " |"
        )
    print(
        "cosine, largest singular value, and (cosine after the rows were made equal, as in "
        "muoneq_r)"
    )
    return table


def bench_evaluation(seconds: float) -> dict[str, object]:
    """Inputs read and seconds of strategies at W = 512, S = 64 on random tokens in documents whose
    lengths spread like the competition's (lognormal, 19 % of the tokens past 2,048 at a mean of
    811); beside it the inputs that 2048/64 reads of such. A model that has learnt nothing costs as
    much as one that has."""
    rng, table = np.random.default_rng(0), {}
    base = dict(
        PRESET="baseline+cpu",
        DEVICE="cpu",
        TTT_CHUNK_TOKENS="2048",
        TTT_LORA_DOCS="8",
        TTT_LORA_RANK="16",
    )
    tokens = rng.integers(2, 1024, 8001).astype(np.uint16)
    tokens[np.minimum(8000, np.cumsum(rng.lognormal(4.65, 1.15, 60).astype(int)))] = 1
    borders = np.concatenate([[0], np.cumsum(rng.lognormal(6.04, 1.15, 20_000).astype(int) + 1)])
    for kind, ttt in [
        ("sliding", "none"),
        ("chunked", "none"),
        ("doc", "none"),
        ("doc", "lora"),
        ("sliding", "sgd"),
    ]:
        cfg = tg.load(base | dict(EVAL=kind, TTT=ttt, EVAL_SEQ_LEN="512", EVAL_STRIDE="64"))
        rt = tg.Runtime(cfg, {})
        torch.manual_seed(0)
        model = tg.GPT(cfg.model, 1024, tg.Numerics())
        subject = tg.Subject(cfg, rt, model, tg.Numerics(), tg.schedule(cfg.model))
        strategy, begin = tg.strategy_of(subject), time.time()
        read, spent = (
            tg.score(tokens, np.ones(8000), strategy, rt).forward_tokens,
            time.time() - begin,
        )
        name = tg.variant(cfg.eval)
        table[name] = dict(inputs_per_token=read / 8000, seconds=spent)
        print(f"{name:24s} {read / 8000:6.2f} inputs per scored token  {spent:6.1f} s", flush=True)
    for name, windows in (
        ("sliding_2048_64", tg.Windows(2048, 64)),
        ("doc_2048_64", tg.DocumentWindows(2048, 64)),
    ):
        read = sum(b.rows * b.width for b in windows.batches(borders, 131_072)) / int(borders[-1])
        table[f"{name}, planned"] = dict(inputs_per_token=read)
        print(f"{name:24s} {read:6.2f} inputs per scored token  (planned, 20,000 documents)")


def wait_of_step(loader: tg.Loader, world: int) -> float:
    """Milliseconds that a step waits for its rows when the device computed for 0.1 s since the last
    one."""
    time.sleep(0.1)
    begin = time.perf_counter()
    loader.next(0, world)
    return (time.perf_counter() - begin) * 1e3


def bench_data(seconds: float) -> dict[str, object]:
    """MB/s of the embedded text on one core, through SentencePiece alone (token lists) and through
    the data tools (proved lossless, as arrays), encoding and re-encoding; then tokens/s of each
    loader from the page cache."""
    tokenizer, texts = docs.load_tokenizer(build_sample.TOKENIZER), build_sample.documents()[:300]
    batches = [texts[i : i + 50] for i in range(0, len(texts), 50)]
    shards = [
        [np.array(ids, np.uint16) for ids in tokenizer.processor.encode(batch)] for batch in batches
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    sides = {
        "sentencepiece": lambda: [
            tokenizer.processor.encode(batch, num_threads=1) for batch in batches
        ],
        "encode": lambda: [
            prepare.encode_documents(batch, tokenizer, None, False) for batch in batches
        ],
        "reencode": lambda: [
            prepare.encode_documents(batch, tokenizer, tokenizer, False) for batch in shards
        ],
    }
    rates = {
        name: [r * megabytes for r in values] for name, values in alternate(sides, seconds).items()
    }
    table: dict[str, object] = {name: statistics.median(values) for name, values in rates.items()}
    for name, reference in (("encode", "sentencepiece"), ("reencode", "encode")):
        table[f"{name} / {reference}"] = statistics.median(
            b / a for a, b in zip(rates[reference], rates[name])
        )
    print(
        "  ".join(f"{name} {value:.2f}" for name, value in table.items())
        + "   (MB/s of one core, ratios of pairs)"
    )
    build_sample.build()
    stream = tg.TokenStream(build_sample.OUT, "train", build_sample.VOCAB_SIZE)
    for name, kind in tg.LOADERS.items():
        cfg = tg.load(dict(PRESET="baseline", LOADER=name, DEVICE="cpu"))
        for world in (1, 8):
            loader = kind(stream, cfg)
            steps = rate(lambda: loader.next(0, world), seconds / 8)
            table[f"{name} {world}"] = steps * cfg.data.train_batch_tokens
            table[f"{name} {world} wait ms"] = wait = statistics.median(
                wait_of_step(loader, world) for _ in range(20)
            )
            print(
                f"{name:10s} rank 0 of {world}: {table[f'{name} {world}'] / 1e6:8.0f} M tokens/s "
                "of the whole batch; "
                f"a step of 0.1 s waits {wait:.2f} ms"
            )
    return table


def bench_forge(rounds: float) -> dict[str, object]:
    """Experiments per minute of small campaigns with real processes, agents asked before every
    proposal."""
    import forge_lab  # beside this file

    agents = dict(
        none="",
        hangs="sleep 600",
        fails="exit 1",
        nonsense="echo no",
        floods="yes | head -c 50000000",
    )
    speed: dict[str, list[float]] = {name: [] for name in agents}
    for _ in range(round(rounds)):
        for name, command in agents.items():
            with tempfile.TemporaryDirectory() as folder:
                rung = dict(kill_s=60, sentinel_runs=1, prior_sigma=0.001, env={})
                c = forge_lab.real(
                    Path(folder),
                    dict(pause=0.2),
                    rungs=dict(screen=rung),
                    budget=dict(experiments=8),
                    loop=dict(confirm="end", ablation=False, forecasts=False),
                    agent=dict(cmd=command, share=1.0),
                )
                while not c.state.reference:
                    c.loop(0.1)
                begin, done = time.perf_counter(), len(c.state.searches())
                while len(c.state.searches()) < 8 and not c.state.stopped:
                    c.tick()
                    time.sleep(0.05)
                speed[name].append(
                    (len(c.state.searches()) - done) * 60 / (time.perf_counter() - begin)
                )
                if c.agent.call:
                    c.agent.call.stop()
                c.runs.stop([r.key for r in c.running()])
    ratios = {
        name: statistics.median(b / a for a, b in zip(speed["none"], values))
        for name, values in speed.items()
    }
    for name, values in speed.items():
        print(
            f"agent {name:9s} {statistics.median(values):6.1f} experiments per minute, "
            f"{ratios[name]:.2f} of those "
            "without one (median of pairs)",
            flush=True,
        )
    return dict(per_minute=speed, ratios=ratios)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=("cpu", "attention", "optimiser", "evaluation", "data", "codecs", "polar", "forge"),
    )
    parser.add_argument(
        "--seconds", type=float, help="measured time per side or point; default 20 or 1"
    )
    parser.add_argument(
        "--artifact", type=Path, help="whose levels `codecs` packs; default: Gaussian ones"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    bench, default = {
        "cpu": (bench_cpu, 20.0),
        "attention": (bench_attention, 1.0),
        "optimiser": (bench_optimiser, 10.0),
        "data": (bench_data, 20.0),
        "evaluation": (bench_evaluation, 0.0),
        "polar": (bench_polar, 0.0),
        "forge": (bench_forge, 5.0),
        "codecs": (lambda _: bench_codecs(asked.artifact), 0.0),
    }[asked.what]
    with contextlib.suppress(KeyboardInterrupt):
        figures = bench(asked.seconds or default)
        about = machine()
        print("machine " + " ".join(f"{name}:{value}" for name, value in about.items()))
        if asked.json:
            asked.json.write_text(
                json.dumps(dict(machine=about, bench=asked.what, figures=figures), indent=1) + "\n"
            )


if __name__ == "__main__":
    main()

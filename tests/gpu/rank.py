"""A trainer on a CUDA device as rank 0 of eight, without data, shards or other ranks: shared by the
counter of launches and by the first-card script."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import train_gpt as tg

WORLD = 8


def write_shard(path: Path, vocab: int, count: int):
    """Random tokens in the trainer's format, a document's beginning about every 500."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, vocab, count).astype("<u2")
    tokens[rng.integers(0, count, count // 500)] = 1
    head = np.array([*tg.SHARD_KIND, count], "<i4").tobytes()
    path.write_bytes(head.ljust(tg.SHARD_HEADER_BYTES, b"\0") + tokens.tobytes())


def make_trainer(words: dict[str, str], world: int = WORLD, everything: bool = False) -> tg.Trainer:
    """The trainer of rank 0 with these knobs; with others its collectives do nothing. `everything`
    takes it for granted that each plan reaches all weights, where no kernel can tell."""
    cfg = tg.load({"DEVICE": "cuda", "ALLOW_NONCOMPLIANT": "1"} | words)
    rt = tg.Runtime(cfg, {})
    rt.world = world
    if world > 1 and not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    vocab = cfg.data.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "fineweb_train_000000.bin", vocab, 4_000_000)
        stream = tg.TokenStream(Path(folder), "train", vocab)  # a mapped file outlives its name
        data = SimpleNamespace(train=stream, token_bytes=np.full(vocab, 4, np.int16))
        numerics = tg.choose_numerics(cfg, rt)
        tg.apply_numerics(numerics, rt)
        torch.manual_seed(0)
        model = tg.GPT(cfg.model, vocab, numerics, cfg.optim).to(rt.device)
        if everything:
            tg.reached = lambda model, plans: {}
        return tg.Trainer(cfg, rt, data, model, numerics)


def take_step(trainer: tg.Trainer, plan: int = -1) -> torch.Tensor:
    """One update from this rank's share of the batch, by the given plan; the last has all loops."""
    rows = trainer.loader.next(0, trainer.rt.world)
    plan = range(len(trainer.plans))[plan]
    return trainer.step(rows, tg.full_speed() | dict(plan=plan))

"""Whole runs: reload, ranks, micro-batches, crashes, the clock, seeds, divergence, averaging, the
QAT switch."""

import math
import os
import random
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, official, run_script
from running import FAST, launch, log, metrics, train, wait_until

import train_gpt

# Everything that has state: momentum, AdamW, average, shuffled rows; fake quantisation and a hashed
# table on top.
RICH = dict(
    PRESET="mlp3x_seq4096+tiny", AVERAGING="ema", EMA_DECAY=0.9, BIGRAM_BUCKETS=512, SMEAR_GATE="B"
)
STEPS = 150


def sabotaged(folder, code: str):
    """train_gpt.py as a process in which `code` has replaced something."""
    script = folder / "sabotaged.py"
    script.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import torch, train_gpt\n{code}\n"
        "sys.exit(train_gpt.main(sys.argv[1:], train_gpt.environment()))\n"
    )
    return script


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """An uninterrupted run."""
    done = train(toy, tmp_path_factory.mktemp("reference"), "r", ITERATIONS=STEPS, **RICH)
    assert done.code == 0, done.err
    return done


def artifact(done) -> bytes:
    assert done.code == 0, done.err
    return (done.folder / "model.golf").read_bytes()


def losses(done) -> list[float]:
    assert done.code == 0, done.err
    return [r["loss"] for r in metrics(done.folder, "train")]


def score_line(text: str) -> dict[str, str]:
    """Fields of the last score: line, the audited sums."""
    return dict(
        f.split(":") for f in re.findall(r"^score:\S+ (.*)$", text, re.MULTILINE)[-1].split()
    )


def evaluate(toy, path, nproc: int = 0):
    """Score an artifact in a fresh process that knows nothing but the file and the data."""
    done = run_script(
        nproc=nproc, RUN_MODE="eval", ARTIFACT=path, DATA_PATH=toy, DEVICE="cpu", THREADS=1
    )
    assert done.code == 0, done.err
    return done


# ---- one run
@pytest.mark.slow
def test_loss_falls_below_what_word_counts_alone_would_give(reference, toy):
    def tokens(split):
        return np.concatenate(
            [np.fromfile(f, "<u2", offset=1024) for f in sorted(toy.glob(f"fineweb_{split}_*.bin"))]
        )

    counts = np.bincount(tokens("train"), minlength=1024) + 1
    unigram = -np.log(counts / counts.sum())[tokens("val")[1:]].mean()
    first, last = losses(reference)[0], float(score_line(reference.out)["val_loss"])
    assert first == pytest.approx(math.log(1024), abs=0.05), "a new model knows nothing"
    assert last < unigram - 1.0


@pytest.mark.slow
def test_a_fresh_process_scores_the_artifact_identically(reference, toy):
    done = evaluate(toy, reference.folder / "model.golf")
    assert official(done.out) == official(reference.out)
    timed = score_line(done.out), score_line(reference.out)
    assert timed[0] | dict(seconds="") == timed[1] | dict(seconds=""), "but for its duration"


@pytest.mark.slow
def test_an_artifact_is_scored_whatever_its_row_length(toy, tmp_path):
    """The default preset's batch is no multiple of 48 tokens; scoring trains nothing, so nobody
    should mind."""
    done = train(toy, tmp_path, "a", TRAIN_SEQ_LEN=48, TRAIN_BATCH_TOKENS=384, ITERATIONS=2)
    assert official(evaluate(toy, done.folder / "model.golf").out) == official(done.out)


# ---- ranks and micro-batches: the arithmetic of a step is that of the whole batch
@pytest.fixture(scope="module")
def by_ranks(toy, tmp_path_factory):
    """Equal runs on 1, 2 and 3 ranks; 8 rows do not divide by 3."""
    folder = tmp_path_factory.mktemp("ranks")
    return {n: train(toy, folder, f"ranks{n}", nproc=n, ITERATIONS=6) for n in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_training_does_not_depend_on_the_number_of_ranks(ranks, by_ranks):
    assert losses(by_ranks[ranks]) == pytest.approx(losses(by_ranks[1]), rel=1e-5)
    one, many = (score_line(by_ranks[n].out) for n in (1, ranks))
    assert float(many["val_loss"]) == pytest.approx(float(one["val_loss"]), rel=1e-4)
    assert f"world_size:{ranks} " in log(by_ranks[ranks].folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_score_of_an_artifact_does_not_depend_on_the_number_of_ranks(ranks, reference, toy):
    one, many = (
        score_line(reference.out),
        score_line(evaluate(toy, reference.folder / "model.golf", ranks).out),
    )
    assert float(many["val_loss"]) == pytest.approx(float(one["val_loss"]), rel=1e-6)
    assert float(many["val_bpb"]) == pytest.approx(float(one["val_bpb"]), rel=1e-6)
    assert [many[k] for k in ("tokens", "bytes", "coverage")] == [
        one[k] for k in ("tokens", "bytes", "coverage")
    ]


@pytest.mark.slow
def test_bad_text_that_only_one_rank_reads_is_named_by_that_rank(toy, tmp_path):
    """Row 1 of the first step goes to rank 1; the first look at the shard is made to miss its bad
    token."""
    shutil.copytree(toy, tmp_path / "data")
    shard = tmp_path / "data" / "fineweb_train_000000.bin"
    blob = bytearray(shard.read_bytes())
    blob[1024 + 2 * 94 : 1024 + 2 * 95] = b"\xff\xff"
    shard.write_bytes(blob)
    blind = sabotaged(tmp_path, "train_gpt.TokenStream.check = lambda *ignored: None")
    done = train(tmp_path / "data", tmp_path, "a", nproc=2, script=blind, LOADER="sequential")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (
        done.code and len(errors) == 1 and "fineweb_train_000000.bin: token id 65535" in errors[0]
    ), done.err


def make_trainer(toy, numerics=train_gpt.Numerics(), **knobs) -> train_gpt.Trainer:
    """A trainer in this process, without a run folder."""
    cfg = train_gpt.load(
        {k: str(v) for k, v in (FAST | dict(DATA_PATH=toy, CHECKPOINT_EVERY=0) | knobs).items()}
    )
    rt = train_gpt.Runtime(cfg, {})
    data = train_gpt.open_data(cfg, rt)
    torch.manual_seed(cfg.run.seed)
    return train_gpt.Trainer(
        cfg, rt, data, train_gpt.GPT(cfg.model, cfg.data.vocab_size, numerics), numerics
    )


def watch(trainer, see) -> list:
    """Run the trainer; `see(loss)` of every step, in order."""
    seen, step = [], trainer.step
    trainer.step = lambda rows, ramps: (loss := step(rows, ramps), seen.append(see(loss)))[0]
    trainer.run()
    return seen


@pytest.mark.parametrize("tokens", [64, 192])
def test_a_step_does_not_depend_on_the_micro_batch(tokens, toy):
    whole, parts = (make_trainer(toy, ITERATIONS=4, MICRO_BATCH_TOKENS=n) for n in (512, tokens))
    want = watch(whole, float)
    assert watch(parts, float) == pytest.approx(want, rel=1e-5)
    moved = (whole.flat.weights - make_trainer(toy).flat.weights).norm()
    assert (whole.flat.weights - parts.flat.weights).norm() < 1e-3 * moved


def passes_of(preset: str, world: int, rows: int, held_out: int) -> tuple[int, int]:
    """Tokens that all ranks compute in a step of so many rows and in one look at the held-out text;
    a rank's pass is checked to be no larger than MICRO_BATCH_TOKENS, or one row."""
    cfg = train_gpt.load({"PRESET": preset, "DEVICE": "cpu", "ALLOW_NONCOMPLIANT": "1"})
    seq, shapes, computed = cfg.data.train_seq_len, set(), [0, 0]
    for rank in range(world):
        rt = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        rt.all_reduce = lambda x: x
        trainer = SimpleNamespace(cfg=cfg, rt=rt, plans=[()], plan=0)
        trainer.most_rows = max(1, cfg.system.micro_batch_tokens // seq)
        trainer.micro_batches = partial(train_gpt.Trainer.micro_batches, trainer)
        trainer.held_out = np.zeros(held_out, np.uint16)

        def loss(ids, targets, plan):
            computed[1] += ids.numel()
            return None, (targets >= 0).sum()

        trainer.loss = loss
        mine = np.zeros((len(range(rank, rows, world)), seq + 1), np.uint16)
        for ids, targets, real in trainer.micro_batches(mine):
            computed[0] += ids.numel()
            shapes.add((rank, ids.shape))
            assert ids.numel() <= max(seq, cfg.system.micro_batch_tokens)
            assert int((targets >= 0).sum()) == real * seq
        train_gpt.Trainer.held_out_loss(trainer)
    assert len(shapes) <= world, "one shape for each rank, so that nothing compiles again"
    return tuple(computed)


@pytest.mark.parametrize("preset", list(train_gpt.SYSTEMS))
def test_hardly_anything_that_is_computed_is_padding(preset):
    """Finding M2: on eight ranks 48 rows were computed as 2 x 32, and 4 held-out rows were padded
    to 32."""
    cfg = train_gpt.load({"PRESET": preset, "DEVICE": "cpu", "ALLOW_NONCOMPLIANT": "1"})
    seq, rows = cfg.data.train_seq_len, cfg.data.train_batch_tokens // cfg.data.train_seq_len
    wasted = []
    for world in (1, 2, 4, 8):
        for held in (cfg.optim.held_out_tokens, 4 * seq + 1):
            want = rows * seq, (held - 1) // seq * seq
            got = passes_of(preset, world, rows, held)
            wasted += [
                (preset, world, name, a / b)
                for name, a, b in zip(("step", "held out"), got, want)
                if a > 1.02 * b or a < b
            ]
    assert not wasted


# ---- memory
class Memory:
    """In place of a trainer's loss: runs out of memory when a pass has more than so many tokens."""

    def __init__(self, trainer, tokens: int, error: Exception):
        self.loss, self.tokens, self.error, self.seen = trainer.loss, tokens, error, []
        trainer.loss = self

    def __call__(self, ids, targets, plan):
        self.seen.append(ids.numel())
        if ids.numel() > self.tokens:
            raise self.error
        return self.loss(ids, targets, plan)


@pytest.mark.parametrize("fits", [512, 300, 200, 100, 64])
def test_prewarming_finds_the_largest_pass_that_fits(fits, toy, capsys):
    """Finding M15: nobody handled the end of memory. 8 rows of 64 tokens; the largest of all equal
    passes that fits."""
    trainer = make_trainer(toy, ITERATIONS=4, WARMUP_STEPS=2)
    before = trainer.flat.weights.clone()
    memory = Memory(trainer, fits, torch.OutOfMemoryError("CUDA out of memory. Tried to"))
    trainer.prewarm()
    assert trainer.most_rows * 64 == max(n for n in (512, 256, 192, 128, 64) if n <= fits)
    said = capsys.readouterr().out
    assert (f"MICRO_BATCH_TOKENS={trainer.most_rows * 64} " in said) == (fits < 512)
    assert torch.equal(trainer.flat.weights, before) and trainer.step_number == 0
    memory.seen.clear()
    losses = watch(trainer, float)
    assert max(memory.seen) <= fits and losses == pytest.approx(
        watch(make_trainer(toy, ITERATIONS=4), float), rel=1e-5
    )


@pytest.mark.slow
def test_memory_that_admits_no_row_or_ends_later_is_one_line(toy, tmp_path):
    """Finding M15, through the script."""
    later = (
        "calls, forward = [], train_gpt.GPT.forward\n"
        "def hungry(self, ids, *args):\n    calls.append(ids.numel() >= 64)\n"
        "    if sum(calls) > {after}:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.\\nTried to allocate')\n"
        "    return forward(self, ids, *args)\ntrain_gpt.GPT.forward = hungry\n"
    )
    for after, named, every in (
        (0, "TRAIN_SEQ_LEN", 0),
        (5, "MICRO_BATCH_TOKENS", 0),
        (5, "RESUME=auto", 0.001),
    ):
        script = sabotaged(tmp_path, later.format(after=after))
        done = train(toy, tmp_path, f"{named}", script=script, CHECKPOINT_EVERY=every)
        assert done.code == 1 and done.err.startswith("error: out of memory"), done.err
        assert named in done.err and done.err.count("\n") == 1, done.err


# ---- crashes
KILL_IN_CHECKPOINT = """
fsync, save, calls = os.fsync, torch.save, []
def dying_fsync(file):
    if len(calls) == 20:
        os.ftruncate(file, 1000); os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
def counted_save(*args):
    calls.append(1)
    save(*args)
os.fsync, torch.save = dying_fsync, counted_save
"""
KILL_IN_EXPORT = "train_gpt.pack_artifact = lambda *args: os.kill(os.getpid(), signal.SIGKILL)"
CRASHY = dict(
    RICH, ITERATIONS=STEPS, CHECKPOINT_EVERY=0.001, RESUME="auto"
)  # a checkpoint after every step


def loaded(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory):
    """The folder of a run that was killed while it wrote its 20th checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    done = train(toy, folder, "k", script=sabotaged(folder, KILL_IN_CHECKPOINT), **CRASHY)
    assert done.code == -signal.SIGKILL and loaded(done.folder)["step"] == 19
    return done.folder


def kill_at(toy, runs, condition):
    """Continue run k and kill it as soon as the condition holds."""
    process = launch(toy, runs, "k", **CRASHY)
    assert wait_until(process, condition), "the run ended before the kill"
    process.kill()
    process.communicate()


def checkpoints(folder) -> int:
    return (folder / "metrics.jsonl").read_text().count('"checkpoint"')


@pytest.mark.slow
def test_any_number_of_kills_leaves_the_same_artifact(killed, reference, toy, tmp_path):
    folder, rng = tmp_path / "k", random.Random(0)
    shutil.copytree(killed, folder)
    for _ in range(2):
        due = checkpoints(folder) + rng.randint(2, 12)
        kill_at(toy, tmp_path, lambda: checkpoints(folder) >= due)
    due, old = checkpoints(folder) + 2, set(folder.glob("*.tmp"))
    kill_at(toy, tmp_path, lambda: checkpoints(folder) >= due and set(folder.glob("*.tmp")) - old)
    done = train(toy, tmp_path, "k", script=sabotaged(tmp_path, KILL_IN_EXPORT), **CRASHY)
    assert done.code == -signal.SIGKILL and not (folder / "model.golf").exists()
    done = train(toy, tmp_path, "k", **CRASHY)
    assert artifact(done) == artifact(reference) and official(log(folder)) == official(
        reference.out
    )
    resumed = [int(step) for step in re.findall(r"^resumed:step (\d+) ", log(folder), re.MULTILINE)]
    assert (
        resumed[0] == 19
        and resumed[-1] == STEPS
        and resumed == sorted(set(resumed))
        and len(resumed) == 5
    )


@pytest.mark.slow
def test_a_checkpoint_may_be_resumed_by_another_number_of_ranks(killed, reference, toy, tmp_path):
    shutil.copytree(killed, tmp_path / "k")
    done = train(toy, tmp_path, "k", nproc=2, **dict(CRASHY, CHECKPOINT_EVERY=0))
    after = {r["step"]: r["loss"] for r in metrics(done.folder, "train")[20:26]}
    want = {r["step"]: r["loss"] for r in metrics(reference.folder, "train") if r["step"] in after}
    assert done.code == 0 and len(after) == 6 and after == pytest.approx(want, rel=1e-5)


# ---- the clock
def assert_stopped_in_time(done, budget: float):
    """Stopped by the clock within the budget, unless the last step took longer than any before it,
    and not early."""
    assert done.code == 0, done.err
    found = re.findall(
        r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/",
        log(done.folder),
        re.MULTILINE,
    )
    assert len(found) == 1
    seconds = int(found[0][0]) / 1000
    marks = [r["seconds"] for r in metrics(done.folder, "train")]
    steps = np.diff(marks)[2:]  # the first ones may be slow
    assert len(marks) == int(found[0][1]) and len(steps) > 2
    assert seconds <= budget or steps[-1] >= steps[:-1].max() - 0.005
    assert seconds > budget - 1.5 * steps.max() - 0.05


@pytest.mark.slow
def test_training_stops_before_the_wall_clock_limit(toy, tmp_path):
    assert_stopped_in_time(train(toy, tmp_path, "a", ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=3), 3)


LYING_CLOCK = """
import glob
if os.environ["RANK"] == "1":
    train_gpt.Clock.read = lambda self: 0.0
end, close = train_gpt.Trainer.end, train_gpt.dist.destroy_process_group
def end_aloud(self, *args):
    print(f"rank {self.rt.rank} stopped at step {self.step_number}", flush=True)
    end(self, *args)
def close_aloud():
    close()
    left = sum("gloo" in open(f).read() for f in glob.glob("/proc/self/task/*/comm"))
    print(f"rank {os.environ['RANK']} leaves {left} threads", flush=True)
train_gpt.Trainer.end, train_gpt.dist.destroy_process_group = end_aloud, close_aloud
"""


@pytest.fixture(scope="module")
def two_clocks(toy, tmp_path_factory):
    """Two ranks under a wall-clock limit; rank 1's clock stands still."""
    folder = tmp_path_factory.mktemp("clocks")
    return train(
        toy,
        folder,
        "a",
        nproc=2,
        script=sabotaged(folder, LYING_CLOCK),
        ITERATIONS=10**6,
        MAX_WALLCLOCK_SECONDS=4,
        RESERVE_SECONDS=1.5,
    )


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step_and_keep_the_reserve(two_clocks):
    assert_stopped_in_time(two_clocks, 2.5)
    stopped = dict(re.findall(r"rank (\d) stopped at step (\d+)", two_clocks.out))
    assert sorted(stopped) == ["0", "1"] and stopped["0"] == stopped["1"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc on this system")
def test_no_thread_of_the_process_group_outlives_it(two_clocks):
    """One that does may abort the process while the interpreter shuts down, after a perfect run."""
    assert sorted(re.findall(r"rank (\d) leaves (\d+) threads", two_clocks.out)) == [
        ("0", "0"),
        ("1", "0"),
    ]


def test_validation_and_slow_first_steps_do_not_spend_the_training_time(toy, monkeypatch):
    """On a made-up clock: steps of 9 s, then of at most 1 s; each validation takes 1000 s and
    counts nothing."""
    now, rng = [0.0], random.Random(1)
    trainer = make_trainer(
        toy, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=60, RESERVE_SECONDS=4, VAL_LOSS_EVERY=5
    )
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(rows, ramps):
        n = trainer.step_number
        now[0] += 9.0 if n < 3 else 1.0 if n == 4 else rng.uniform(0.2, 1.0)
        return torch.tensor(1.0)

    def validate():
        now[0] += 1000.0

    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer, "validate", validate)
    trainer.run()
    assert 55 < trainer.clock.read() <= 56 and trainer.step_number > 30
    assert now[0] == pytest.approx(trainer.clock.read() + 1000 * (trainer.step_number // 5))


def test_a_slow_run_says_where_it_is_every_half_minute(toy, monkeypatch, capsys):
    """On a made-up clock with steps of 9 s: the first ten, then those after 30 s of silence."""
    now = [0.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = make_trainer(toy, ITERATIONS=25, TRAIN_LOG_EVERY=100)

    def step(rows, ramps):
        now[0] += 9.0
        return torch.tensor(1.0)

    monkeypatch.setattr(trainer, "step", step)
    trainer.run()
    said = re.findall(r"^step:(\d+)/25 train_loss", capsys.readouterr().out, re.MULTILINE)
    assert list(map(int, said)) == [*range(1, 11), 14, 18, 22]


def test_the_clock_counts_the_step_that_a_gpu_has_not_finished(toy, monkeypatch):
    """Finding G3: on a made-up GPU a step is only queued; reading its loss or synchronising waits
    for it. The training clock must not pass the limit, by whole steps of up to 1 s."""
    now, free, rng = [0.0], [0.0], random.Random(2)
    trainer = make_trainer(toy, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=60, VAL_LOSS_EVERY=7)
    trainer.rt.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(until: float):
        now[0] = max(now[0], until)

    class Loss:
        def __init__(self):
            free[0] = max(free[0], now[0]) + (1.0 if rng.random() < 0.3 else 0.8)
            self.done = free[0]

        def isfinite(self) -> torch.Tensor:
            wait(self.done)
            return torch.tensor(True)

    monkeypatch.setattr(trainer.rt, "synchronize", lambda: wait(free[0]))
    monkeypatch.setattr(trainer, "step", lambda rows, ramps: Loss())
    monkeypatch.setattr(trainer, "report", lambda *args: None)
    monkeypatch.setattr(trainer, "validate", lambda: wait(now[0] + 100))
    trainer.run()
    trainer.clock.stop()
    assert 60 - 2.1 < trainer.clock.read() <= 60 and trainer.step_number > 60


# ---- what is read of the training text, and when
def test_what_is_seen_before_the_first_step_is_on_the_clock_and_not_held_out(toy, monkeypatch):
    """Finding M9: the text was seen off the clock, what is held out included."""
    now, seen, read = [0.0], [], train_gpt.TokenStream.read

    def noted(self, start, count):
        seen.append((start, start + count))
        now[0] += 5.0
        return read(self, start, count)

    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train_gpt.TokenStream, "read", noted)
    trainer = make_trainer(
        toy, OBJECTIVE="byte", EMBED_INIT="svd", AVERAGING="iw_swa", HELD_OUT_TOKENS=5000
    )
    whole = sum(len(shard) for shard in trainer.data.train.shards)
    held, looked = seen[-2:]
    assert held == (whole - 5000, whole) and looked == (0, whole - 5000)
    assert trainer.clock.read() == 5.0, "looking took five seconds"
    trainer.prewarm()
    assert trainer.clock.read() == 5.0 and len(trainer.data.train) == whole - 5000


def test_calibration_reads_what_is_asked_for_up_to_whole_rows(toy, capsys):
    """Finding G6: whole batches were read, 786,432 tokens where 65,536 were wanted. Here 8 rows of
    64 tokens a step."""
    for wanted, want in ((1, 64), (128, 128), (500, 512), (700, 704)):
        trainer = make_trainer(toy, ROUNDING="gptq", CLIP="sigma")
        trainer.observe_inputs(wanted)
        assert f"calibrated:{want} of {wanted} tokens" in capsys.readouterr().out
        assert trainer.loader.dealt * 64 == want


# ---- repeatability
@pytest.fixture(scope="module")
def short(toy, tmp_path_factory):
    """The artifact of six steps without prewarming."""
    return artifact(
        train(toy, tmp_path_factory.mktemp("short"), "s", ITERATIONS=6, WARMUP_STEPS=0, **RICH)
    )


@pytest.mark.slow
def test_prewarming_leaves_no_trace(short, toy, tmp_path):
    assert artifact(train(toy, tmp_path, "a", ITERATIONS=6, WARMUP_STEPS=3, **RICH)) == short


@pytest.mark.slow
def test_another_seed_gives_another_artifact(short, toy, tmp_path):
    assert (
        artifact(train(toy, tmp_path, "a", ITERATIONS=6, WARMUP_STEPS=0, SEED=1338, **RICH))
        != short
    )


# ---- divergence
SPOIL = """
clip, calls = train_gpt.FlatParameters.clip, []
def spoiling_clip(self, bound):
    calls.append(1)
    if len(calls) == {step}:
        self.rest[:-1] = float("nan")
    clip(self, bound)
train_gpt.FlatParameters.clip = spoiling_clip
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, steps, every",
    [(5, 20, 0.001), (5, 20, 60), (8, 8, 0.001)],
    ids=["checkpoint after every step", "no checkpoint yet", "at the last step"],
)
def test_divergence_stops_the_run_and_spares_the_checkpoint(step, steps, every, toy, tmp_path):
    """The loss of the step is finite, its gradient is not."""
    done = train(
        toy,
        tmp_path,
        "a",
        script=sabotaged(tmp_path, SPOIL.format(step=step)),
        WARMUP_STEPS=0,
        GRAD_CLIP_NORM=1,
        ITERATIONS=steps,
        CHECKPOINT_EVERY=every,
    )
    assert done.code == 1 and "Traceback" not in done.err and done.err.startswith("error: "), (
        done.err
    )
    named = int(re.search(r"not finite at step (\d+)", done.err)[1])
    assert (
        step <= named <= step + 1 and "MATRIX_LR" in done.err and "final:official" not in done.out
    )
    path = done.folder / "checkpoint.pt"
    assert path.exists() == (every < 1) and ("checkpoint.pt" in done.err) == path.exists()
    if path.exists():
        state = loaded(done.folder)
        assert state["step"] == step - 1 and state["weights"].isfinite().all()


# ---- averaging and fake quantisation
def test_the_exported_average_is_the_exponential_average_of_all_steps(toy):
    trainer = make_trainer(toy, ITERATIONS=12, AVERAGING="ema", EMA_DECAY=0.8)
    average = trainer.flat.weights.double()
    trajectory = watch(trainer, lambda loss: trainer.flat.weights.double())
    trainer.averager.apply()
    for weights in trajectory:
        average = 0.8 * average + 0.2 * weights
    torch.testing.assert_close(trainer.flat.weights.double(), average, rtol=1e-5, atol=1e-7)
    assert (average - trajectory[-1]).abs().max() > 1e-3, "the average is not the last weights"
    exported = torch.cat([p.detach().flatten() for p in trainer.flat.params])
    assert torch.equal(exported, trainer.flat.weights), "the model does not hold the average"


@pytest.mark.slow
@pytest.mark.skipif(not train_gpt.can_compile(), reason="no compiler here")
def test_the_qat_switch_works_inside_a_compiled_graph(toy):
    knobs = dict(ITERATIONS=4, NUM_LAYERS=1, MATRIX_BITS=2, SKIPS="none")
    never = watch(make_trainer(toy, **knobs), float)
    half = dict(knobs, QAT="ste", QAT_START_FRAC=0.5)
    eager = watch(make_trainer(toy, **half), float)
    fast = watch(make_trainer(toy, train_gpt.Numerics(compile=True), **half), float)
    assert eager[:2] == never[:2] and abs(eager[2] - never[2]) > 1e-2
    assert fast == pytest.approx(eager, rel=1e-4)

"""What a run would cost before anybody rents a card: time by class of kernel, tokens, evaluation,
memory, dollars. toolkit.step_time has the model of a step, toolkit.lanes that of scoring."""

import collections
import difflib
import math
from typing import Any

import torch

import train_gpt

from .lanes import Evaluation, adapter_weights, document_lengths, mean_keys, tuning_errors
from .step_time import (
    STATE_BYTES,
    Cluster,
    Errors,
    Shape,
    Step,
    alive,
    efficiency,
    forward_seconds,
    memory_errors,
    mfu,
    peak_bytes,
    rates,
    sliding_errors,
    step_errors,
    step_time,
)

ALLOWED = 0.07  # median absolute error over the published step times
# of bf16 peak, X^T X of calibration: 6.8 to 12.8 s for 64 passes of 98,304 tokens
OUTER_RATE = 0.12
SOLVE_SECONDS = 10 / 35.9e6  # of GPTQ per parameter, on the host (PRs 1855, 1979)
PACK_SECONDS = {"rans": 1 / 36e6, "brotli_shuffle": 65 / 35.9e6}
CARDS_OF_CLUSTERS = (16, 64, 512)


# Configuration to shapes -------------------------------------------------------------------------
def configuration(words: list[str]) -> train_gpt.Config:
    """[PRESET] KNOB=VALUE ... -> configuration; nothing else of the environment counts. Raises
    ValueError."""
    presets = [word for word in words if "=" not in word]
    if len(presets) > 1:
        raise ValueError(f"two presets, {' and '.join(presets)}; join systems and overlays by +")
    env = {"DEVICE": "cpu", "PRESET": presets[0] if presets else train_gpt.CUDA_PRESETS[""]}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.lower() not in train_gpt.KNOBS:
            near = difflib.get_close_matches(name.lower(), train_gpt.KNOBS, 1)
            hint = f"; near: {near[0].upper()}" if near else ""
            raise ValueError(f"{word}: unknown knob {name}{hint}")
        if equals:
            env[name.upper()] = value
    if env.get("RUN_MODE", "train") == "eval":
        raise ValueError("RUN_MODE=eval: a plan is that of a whole run")
    try:
        return train_gpt.load(env)
    except train_gpt.UserError as error:
        raise ValueError(" | ".join(map(str, error.args))) from None


def built(cfg: train_gpt.Config) -> train_gpt.GPT:
    """The model's shapes, without its numbers."""
    with torch.device("meta"):
        return train_gpt.GPT(cfg.model, cfg.data.vocab_size, train_gpt.Numerics(), cfg.optim)


def text_lengths(cfg: train_gpt.Config):
    """Lengths of the validation documents in this configuration's tokens."""
    return document_lengths(cfg.data.vocab_size, bool(cfg.data.caseops))


def shape_of(cfg: train_gpt.Config, model: train_gpt.GPT, plan: train_gpt.Plan, row: int) -> Shape:
    """What a step with this plan and rows of this length costs."""
    modules = [model.embed_sites, model.value_sites, *(model.blocks[s.block] for s in plan)]
    uses = collections.Counter(
        (m.weight.size(1), m.weight.size(0)) for part in modules for m in train_gpt.linears(part)
    )
    return Shape(
        dim=cfg.model.model_dim,
        hidden=cfg.model.mlp_dim,
        vocab=cfg.data.vocab_size,
        seq=row,
        batch_tokens=cfg.data.train_batch_tokens,
        slots=len(plan),
        matrices=tuple((*sizes, count) for sizes, count in sorted(uses.items())),
        keys=mean_keys(text_lengths(cfg), row) if cfg.model.doc_attention else row / 2,
        parameters=sum(p.numel() for p in model.parameters()),
        heads=1 + len(list(model.objective.parameters())),
        pass_tokens=cfg.system.micro_batch_tokens,
    )


class Planned:
    """A configuration on a cluster; every figure is a method."""

    def __init__(self, cfg: train_gpt.Config, on: Cluster, price: float | None = None):
        self.cfg, self.on = cfg, on
        self.price = on.card.price if price is None else price
        self.model, self.plans = built(cfg), train_gpt.plans(cfg.model)
        self.last = self.shape(len(self.plans) - 1)

    def shape(self, plan: int) -> Shape:
        return shape_of(self.cfg, self.model, self.plans[plan], self.cfg.data.train_seq_len)

    def steps(self) -> list[dict[str, Any]]:
        """One entry for each compiled graph: before loops, then with them."""
        found = []
        for number in range(len(self.plans)):
            shape = self.shape(number)
            step = step_time(shape, self.on, rates())
            found.append(
                dict(
                    slots=shape.slots,
                    flops_per_token=shape.flops_per_token,
                    milliseconds={k: 1e3 * v for k, v in step._asdict().items()},
                    total_ms=1e3 * step.seconds,
                    mfu=mfu(shape, self.on, step.seconds),
                    tokens_per_second=shape.batch_tokens / step.seconds,
                )
            )
        return found

    def training(self) -> dict[str, float]:
        """Steps and tokens until the clock or the iterations end, by the script's own ramps."""
        o, cost, step, elapsed = self.cfg.optim, {}, 0, 0.0
        budget = max(0.0, o.max_wallclock_seconds - o.reserve_seconds) or math.inf
        while step < o.iterations and elapsed < budget:
            frac = max(elapsed / budget, step / o.iterations)
            at = train_gpt.Progress(step, frac, budget - elapsed, 1.0)
            now = train_gpt.ramps_at(at, self.cfg)
            key = int(now["plan"])
            if key not in cost:
                cost[key] = step_time(self.shape(key), self.on, rates()).seconds
            slice_end = (1 + math.floor(frac * 500)) / 500  # ramps are asked again so often
            count = min(o.iterations * slice_end - step, (budget * slice_end - elapsed) / cost[key])
            count = max(1, math.floor(min(count, o.iterations - step)))
            step, elapsed = step + count, elapsed + count * cost[key]
        tokens = step * self.cfg.data.train_batch_tokens
        return dict(steps=step, tokens=tokens, seconds=elapsed)

    def evaluation(self) -> dict[str, Any]:
        """Seconds by phase, evenness of ranks, memory of adapters."""
        work = Evaluation(self.cfg, self.last._replace(seq=1), text_lengths(self.cfg))
        phases = [p._asdict() for p in work.phases(self.on)]
        even = {str(n): work.imbalance(self.on.card, n) for n in (1, 2, 4, 8, 16)}
        rows, inputs, scored = work.most_alive()
        s, rank = self.last, self.cfg.eval.ttt_lora_rank
        kinds = (inputs * s.slots * s.dim, inputs * s.slots * s.hidden, scored * s.vocab)
        peak = sum(2.0 * size * count for size, count in zip(kinds, alive()))
        peak += 4 * s.parameters + STATE_BYTES * rows * adapter_weights(s, rank)
        return dict(
            seconds=sum(p["seconds"] for p in phases),
            phases=phases,
            critical_over_mean=even,
            learning_peak_gib=peak / 2**30 if rows else 0.0,
        )

    def export(self) -> dict[str, float]:
        """Seconds after training until the artifact lies there; what has no published rate is left
        out."""
        q, shape, found = self.cfg.quant, self.last, {}
        if self.cfg.eval.ttt == "prequant":
            tokens = int(text_lengths(self.cfg).sum())
            rows = self.cfg.eval.prequant_rows * self.cfg.data.train_seq_len
            step = step_time(shape._replace(batch_tokens=rows), self.on, rates()).seconds
            found["prequant"] = self.cfg.eval.prequant_epochs * math.ceil(tokens / rows) * step
        if q.rounding != "nearest":
            tokens = q.calibration_tokens / self.on.world
            outer = sum(2.0 * n_in**2 * uses for n_in, _, uses in shape.matrices) * tokens
            found["calibration"] = forward_seconds(
                shape, self.on.card, rates(), tokens, tokens
            ) + outer / (self.on.card.peak * OUTER_RATE)
            found["quantisation"] = SOLVE_SECONDS * shape.parameters
        if q.codec in PACK_SECONDS:
            found["packing"] = PACK_SECONDS[q.codec] * shape.parameters
        return found

    def scaling(self) -> list[dict[str, float]]:
        """Efficiency against one machine of eight such cards, at this batch and at three times."""
        return [
            dict(
                cards=n,
                step_ms=1e3 * self.scaled(self.last, n).seconds,
                same_batch=efficiency(self.last, self.on.card, n, rates()),
                triple_batch=efficiency(self.last.widened(3), self.on.card, n, rates()),
            )
            for n in CARDS_OF_CLUSTERS
        ]

    def scaled(self, shape: Shape, cards: int) -> Step:
        """One step on machines of eight cards."""
        return step_time(shape, Cluster(self.on.card, cards // 8, 8), rates())

    def result(self) -> dict[str, Any]:
        """Everything, for machines."""
        training, evaluation, export = self.training(), self.evaluation(), self.export()
        seconds = training["seconds"] + evaluation["seconds"] + sum(export.values())
        return dict(
            preset=self.cfg.preset,
            on=str(self.on),
            parameters=self.last.parameters,
            steps=self.steps(),
            training=training,
            export_seconds=export,
            evaluation=evaluation,
            peak_gib=peak_bytes(self.last, self.on.world) / 2**30,
            memory_gib=self.on.card.memory / 2**30,
            price_per_card_hour=self.price,
            dollars=seconds / 3600 * self.on.world * self.price,
            scaling=self.scaling(),
        )


# Text --------------------------------------------------------------------------------------------
def as_text(r: dict[str, Any]) -> str:
    """A plan for people."""
    t, e = r["training"], r["evaluation"]
    head = ["before loops", "with loops"] if len(r["steps"]) > 1 else ["every step"]
    lines = [f"{r['preset']} on {r['on']}: {r['parameters']:,} parameters", ""]
    lines += [f"{'ms of a step':24}" + "".join(f"{h:>14}" for h in head)]
    for name in Step._fields:
        lines.append(
            f"  {name:22}" + "".join(f"{s['milliseconds'][name]:14.2f}" for s in r["steps"])
        )
    for label, form in (
        ("all", lambda s: f"{s['total_ms']:.2f}"),
        ("MFU, causal half", lambda s: f"{s['mfu']:.1%}"),
        ("MFLOP per token", lambda s: f"{s['flops_per_token'] / 1e6:.1f}"),
        ("million tokens/s", lambda s: f"{s['tokens_per_second'] / 1e6:.2f}"),
    ):
        lines.append(f"  {label:22}" + "".join(f"{form(s):>14}" for s in r["steps"]))
    lines += ["", f"training: {t['steps']:,} steps, {t['tokens']:,} tokens in {t['seconds']:.1f} s"]
    lines += [f"  {name}: {seconds:.1f} s" for name, seconds in r["export_seconds"].items()]
    lines += [f"evaluation: {e['seconds']:.1f} s"]
    for p in e["phases"]:
        lines.append(f"  {p['name']}: {p['seconds']:.1f} s, critical / mean {p['imbalance']:.2f}")
    even = "  ".join(f"{n}: {ratio:.2f}" for n, ratio in e["critical_over_mean"].items())
    lines += [f"  critical / mean of scoring by number of ranks  {even}"]
    peak = max(r["peak_gib"], e["learning_peak_gib"])
    fits = "fits" if peak < r["memory_gib"] else "DOES NOT FIT"
    learning = e["learning_peak_gib"]
    more = f", {learning:.1f} while learning from scored text" if learning else ""
    lines += [
        "",
        f"peak memory of a card: {r['peak_gib']:.1f} GiB in training{more}; "
        f"{fits} in {r['memory_gib']:.1f}",
        f"dollars: {r['dollars']:.2f} at {r['price_per_card_hour']:.2f} an hour and card",
        "",
        "cards   step ms   efficiency, this batch   three times the batch",
    ]
    for s in r["scaling"]:
        lines.append(
            f"{s['cards']:5} {s['step_ms']:9.1f} {s['same_batch']:24.0%} {s['triple_batch']:23.0%}"
        )
    return "\n".join([*lines, "", ASSUMED])


ASSUMED = """\
As published scripts ran, on eight H100s; train_gpt.py itself has not been timed on a card. Other
cards and numbers of cards are extrapolated: the same parts of each data sheet's peaks, whole rows,
communication not hidden, machines of eight at 400 Gb/s a card, overhead of a step unchanged.
Compilation and the reading of data are not counted; machines of one kind differ by up to 20 %."""


def checked() -> dict[str, dict[str, Any]]:
    """Errors of every part of the model that was fitted, always on what the fit did not see."""
    parts: dict[str, Errors] = {
        "training steps, s": step_errors(),
        "peak memory, GiB": memory_errors(),
        "sliding evaluation, s": sliding_errors(),
        "test-time training, s": tuning_errors(),
    }
    return {
        name: dict(
            median=e.median,
            median_of_families=e.median_of_families,
            families=len(set(e.families)),
            rows=[
                dict(name=n, published=t, predicted=g, error=g / t - 1)
                for n, t, g in zip(e.names, e.truth, e.guess)
            ],
        )
        for name, e in parts.items()
    }


def too_wrong(found: dict[str, dict[str, Any]]) -> bool:
    """Whether published step times are missed by more than ALLOWED in the median, over rows or over
    families."""
    part = found["training steps, s"]
    return max(part["median"], part["median_of_families"]) > ALLOWED


def check_text(found: dict[str, dict[str, Any]]) -> str:
    """The errors for people: every row, then the medians."""
    lines = []
    for name, part in found.items():
        lines += [f"{name:44} published predicted  error"]
        for row in part["rows"]:
            lines.append(
                f"  {row['name'][:42]:42} {row['published']:9.4g} {row['predicted']:9.4g} "
                f"{row['error']:+6.1%}"
            )
        lines += [
            f"  median absolute error {part['median']:.1%} of {len(part['rows'])} rows, "
            f"{part['median_of_families']:.1%} of {part['families']} families",
            "",
        ]
    r = rates()
    lines += [
        "Each row is predicted from other families only: other widths, vocabularies and rows, or "
        "other settings of test-time training.",
        f"Rates fitted to all: products {r.matmul:.3f} of peak, FA2 {r.fa2:.3f}, FA3 {r.fa3:.3f}, "
        f"{r.passes:.0f} passes a slot, {1e3 * r.overhead:.1f} ms a step.",
    ]
    return "\n".join(lines)

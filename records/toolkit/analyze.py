"""What a finished run can tell: where its loss lies, what its weights cost, and how far more
training text would go.

analyze(folder) returns plain numbers (JSON) of runs/<id>/; main(args) prints them. Validation text
is scored again in chunks, in fp32; everything else is read from what the run left: model.golf,
doc_loss.npy, metrics.jsonl, config.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

import train_gpt as tg

LN2, DRAWS = float(np.log(2)), 400


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of bootstrap draws."""
    return [float(x) for x in np.quantile(draws, [0.025, 0.975])]


def documents(path: Path, seed: int = 0) -> dict[str, Any]:
    """Bits per byte of the whole text with a bootstrap interval over documents, and how single
    documents spread."""
    table = np.load(path).astype(np.float64)  # (n,2): nats, bytes
    bpb, rng = table[:, 0] / LN2 / np.maximum(table[:, 1], 1), np.random.default_rng(seed)
    draws = np.stack(
        [table[rng.integers(len(table), size=len(table))].sum(0) for _ in range(DRAWS)]
    )
    return dict(
        count=len(table),
        bpb=float(table[:, 0].sum() / LN2 / table[:, 1].sum()),
        interval=interval(draws[:, 0] / LN2 / draws[:, 1]),
        quantiles={q: float(np.quantile(bpb, q)) for q in (0.1, 0.5, 0.9)},
    )


def by_group(group: np.ndarray, losses: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Mean nats, targets and share of all nats of each non-empty group 0, 1, ..."""
    return [
        dict(
            name=name,
            targets=int((group == i).sum()),
            nats=float(losses[group == i].mean()),
            share=float(losses[group == i].sum() / losses.sum()),
        )
        for i, name in enumerate(names)
        if (group == i).any()
    ]


def tokens(losses: np.ndarray, borders: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Where the loss (N,) lies: in the hardest targets, by position in the document, by bytes of
    the target."""
    ranked, n = np.sort(losses)[::-1], len(losses)
    position = np.arange(n) - borders[np.searchsorted(borders, np.arange(n), side="right") - 1]
    octave = np.floor(np.log2(np.maximum(position, 1))).astype(int) * (position > 0)
    return dict(
        targets=n,
        mean=float(losses.mean()),
        median=float(np.median(losses)),
        hardest={
            f"{p} %": float(ranked[: max(1, round(n * p / 100))].sum() / losses.sum())
            for p in (1, 5, 10)
        },
        position=by_group(
            octave, losses, ["0-1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, 32))]
        ),
        bytes=by_group(np.minimum(sizes, 16), losses, [*map(str, range(16)), "16+"]),
    )


def score_tokens(env: dict[str, str], limit: int = 500_000) -> dict[str, Any]:
    """tokens() of an artifact on (the beginning of) its validation text. Raises UserError."""
    cfg = tg.load(env)
    rt, path = tg.Runtime(cfg, {}), Path(cfg.run.artifact)
    rt.log = lambda text, echo=True: None
    header, body = tg.read_artifact(path, rt)
    cfg = tg.artifact_config(env, path, header)
    data, numerics = tg.open_data(cfg, rt), tg.Numerics()
    if header["tokenizer_sha256"] != data.tokenizer_sha256:
        raise tg.UserError(
            "DATA_PATH belongs to another tokenizer than the run's; name the right one"
        )
    data = data._replace(val=data.val[: limit + 1], val_bytes=data.val_bytes[:limit])
    model = tg.build_from_artifact(cfg, header, body, numerics).to(rt.device)
    losses = np.zeros(len(data.val) - 1)

    def keep(batch: tg.Batch, found):
        for (_, first, n), row in zip(batch.items.tolist(), found.numpy()):
            losses[first : first + n] = row[:n]

    chunks = tg.replace(cfg, eval=tg.replace(cfg.eval, eval="chunked", ttt="none"))
    plan = tg.stored_plan(cfg, header)
    tg.score_model(tg.Subject(chunks, rt, model, numerics, plan), data, keep)
    return tokens(losses, tg.document_borders(data.val, cfg.model.bos_id), data.val_bytes)


def entropy_bits(levels: np.ndarray) -> float:
    """Bits per entry if each were coded by its frequency alone."""
    share = np.unique(levels, return_counts=True)[1] / levels.size
    return float(-(share * np.log2(share)).sum() + 0.0)


def weights(path: Path) -> dict[str, Any]:
    """Entropy of each matrix of levels against what the artifact's codec makes of it alone, and of
    all together. `paid` counts the stream of levels; scales and kept parameters are the other
    streams."""
    blob = path.read_bytes()
    header, tensors = tg.unpack_artifact(blob)
    codec, rows = tg.CODECS[header["config"]["codec"]], []
    for name, t in tensors.items():
        if t.scale is not None:
            levels = t.values.numpy()
            rows.append(
                dict(
                    name=name,
                    weights=levels.size,
                    bits=entropy_bits(levels),
                    bytes=len(codec.pack(levels.tobytes())),
                )
            )
    ideal, streams = (
        sum(r["weights"] * r["bits"] for r in rows) / 8,
        {s[0]: s[3] for s in header["streams"]},
    )
    return dict(
        matrices=rows,
        ideal_bytes=ideal,
        paid_bytes=streams.get("i1", 0),
        streams=streams,
        paid_over_ideal=streams.get("i1", 0) / ideal if ideal else None,
        artifact_bytes=len(blob),
    )


def fit(d: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(c, a, alpha) of y = c + a * d^-alpha with c and a not negative, by least squares: alpha from
    a fine grid, the others in closed form."""
    best, found = np.inf, (0.0, 0.0, 0.0)
    for alpha in np.geomspace(0.02, 2.0, 200).tolist():
        x = (d / d[0]) ** -alpha
        centred = x - x.mean()
        a = max(0.0, float(centred @ y / (centred @ centred)))
        c = float(y.mean() - a * x.mean())
        if c < 0:
            c, a = 0.0, float(x @ y / (x @ x))
        error = float(((c + a * x - y) ** 2).sum())
        if error < best:
            best, found = error, (c, a * float(d[0]) ** alpha, alpha)
    return found


def scaling(
    events: list[dict], batch_tokens: int, bpb_per_nat: float, seed: int = 0
) -> dict[str, Any] | None:
    """Fit bpb = c + a * D^-alpha over training tokens D on the part of the run at full learning
    rate and whole batches, its first tenth left out; intervals from resampled residuals, a
    projection to 2, 4 and 10 times the tokens of the run. From validations when there are at least
    five, else from training losses; None when there is too little."""
    flat = [
        e
        for e in events
        if e["event"] == "train" and e.get("lr") == 1.0 and e.get("batch", 1.0) == 1.0
    ]
    last = max((e["step"] for e in flat), default=0)
    points = [e for e in events if e["event"] == "val" and 0.1 * last < e["step"] <= last]
    points = points if len(points) >= 5 else [e for e in flat if e["step"] > 0.1 * last]
    if len(points) < 5:
        return None
    d = np.array([e["step"] * float(batch_tokens) for e in points])
    y = np.array([e["loss"] for e in points]) * bpb_per_nat
    (c, a, alpha), rng = fit(d, y), np.random.default_rng(seed)
    curve = c + a * d**-alpha
    draws = [fit(d, curve + rng.choice(y - curve, len(y))) for _ in range(DRAWS // 4)]
    whole = max(e["step"] for e in events if e["event"] == "train") * float(batch_tokens)

    def at(tokens: float) -> dict[str, Any]:
        return dict(
            tokens=tokens,
            bpb=c + a * tokens**-alpha,
            interval=interval(np.array([c + a * tokens**-alpha for c, a, alpha in draws])),
        )

    return dict(
        source=points[0]["event"],
        points=len(points),
        c=c,
        a=a,
        alpha=alpha,
        alpha_interval=interval(np.array([x[2] for x in draws])),
        c_interval=interval(np.array([x[0] for x in draws])),
        projection=[at(k * whole) for k in (1, 2, 4, 10)],
        note="at a constant learning rate: the decay at the end of a run lowers the loss further",
    )


def analyze(folder: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    """All of it for one run folder; `env` holds knobs for reading the data, e.g. DATA_PATH, where
    the run's own values do not lead to it. Raises UserError."""
    folder = Path(folder)
    for name in ("config.json", "metrics.jsonl", "model.golf"):
        if not (folder / name).is_file():
            raise tg.UserError(
                f"{tg.relative(folder)}: no {name}; want the folder of a finished run"
            )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    knobs = {name: entry["value"] for name, entry in config["knobs"].items()}
    events = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    final = next((e for e in reversed(events) if e["event"] == "final"), None)
    if final is None:
        raise tg.UserError(f"{tg.relative(folder)}: the run is not finished")
    reading = {name.upper(): str(knobs[name]) for name in ("data_path", "tokenizer_path")} | (
        env or {}
    )
    reading |= dict(RUN_MODE="eval", ARTIFACT=str(folder / "model.golf"))
    return dict(
        run=folder.name,
        preset=config["preset"],
        compliant=final["compliant"],
        bpb=final["bpb"],
        documents=documents(folder / "doc_loss.npy")
        if (folder / "doc_loss.npy").is_file()
        else None,
        tokens=score_tokens(reading),
        weights=weights(folder / "model.golf"),
        scaling=scaling(events, knobs["train_batch_tokens"], final["bpb"] / final["loss"]),
    )

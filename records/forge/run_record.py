"""What a run's log and folder say: numbers, the status that they justify, and the record of
both."""

import contextlib
import json
import math
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

from .ledger import file_digest, now, write_atomic

NUMBER = r"[-+.\deE]{1,40}|nan|inf|-inf"
FINAL = re.compile(
    rf"^final:official variant:(\S+) val_loss:({NUMBER}) val_bpb:({NUMBER}) "
    r"tokens:(\d{1,18}) bytes:(\d{1,18})",
    re.M,
)
EXACT = re.compile(rf"^final_\w{{1,80}}_exact val_loss:({NUMBER}) val_bpb:({NUMBER})", re.M)
STEP = re.compile(
    rf"^step:(\d{{1,12}})/(\d{{1,12}}) train_loss:({NUMBER}) train_time:(\d{{1,12}})ms", re.M
)
VAL = re.compile(
    rf"^step:(\d{{1,12}})/\d+ val_loss:({NUMBER}) val_bpb:({NUMBER}) train_time:(\d+)ms", re.M
)
PARTWAY = (0.3, 0.5)  # part of a run whose training losses foretell its score
READINGS = 5  # fewest of them
LINE = 4096  # characters of an audit line that are read


def number(text: str) -> float:
    """The number of a log's field; not-a-number for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def partway(text: str, seconds: float = 0.0) -> float | None:
    """Mean training loss, in nats, between 30 and 50 % of a run that ends by its steps or after
    `seconds` (0 = by steps alone); None before that, or with fewer than five readings."""
    rows = []
    for m in STEP.finditer(text):
        by_steps = int(m[1]) / max(1, int(m[2]))
        by_clock = int(m[4]) / 1e3 / seconds if seconds else 0.0
        rows.append((max(by_steps, by_clock), number(m[3])))
    low, high = PARTWAY
    inside = [loss for share, loss in rows if low < share <= high and math.isfinite(loss)]
    if not rows or rows[-1][0] < high or len(inside) < READINGS:
        return None
    return statistics.fmean(inside)


def audit_fields(text: str, kind: str) -> dict[str, str]:
    """{name: value} of the first "audit:<kind>" line; a value may hold spaces."""
    m = re.search(rf"^audit:{kind} (.*)$", text, re.M)
    parts = re.split(r"(?:^| )(\w+):", m[1][:LINE]) if m else [""]
    return dict(zip(parts[1::2], parts[2::2]))


def parse_log(text: str, batch_tokens: int = 0) -> dict[str, Any]:
    """Numbers of a log. `finals` holds every official score line; `curve` is [tokens, bits per
    byte], `losses` [step, nats]."""
    official = [(number(m[2]), number(m[3]), int(m[4]), int(m[5])) for m in FINAL.finditer(text)]
    exact = [(number(m[1]), number(m[2]), 0, 0) for m in EXACT.finditer(text)]
    steps = [(int(m[1]), number(m[3]), int(m[4])) for m in STEP.finditer(text)]
    vals = [(int(m[1]), number(m[2]), number(m[3])) for m in VAL.finditer(text)]
    pairs = zip(steps[3:], steps[4:])
    gaps = [(b[2] - a[2]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0]]
    found: dict[str, Any] = dict(
        finals=official or exact[-1:],
        steps=max([s[0] for s in steps + vals], default=0),
        losses=[[s[0], s[1]] for s in steps],
        train_s=max((s[2] for s in steps), default=0) / 1e3,
        step_ms=statistics.median(gaps) if gaps else None,
        curve=[[v[0] * batch_tokens, v[2]] for v in vals],
        val_bpb_prequant=vals[-1][2] if vals else None,
    )
    for name, pattern in (
        ("logged_bytes", r"^Total submission size: (\d{1,18})"),
        ("params", r"^model_params:(\d{1,18})"),
        ("logged_code_bytes", r"^Code size: (\d{1,18})"),
        ("peak_mib", r"^peak memory allocated: (\d{1,18}) MiB"),
    ):
        m = re.search(pattern, text, re.M)
        found[name] = int(m[1]) if m else None
    code, data, env = (audit_fields(text, kind) for kind in ("code", "data", "env"))
    for name in ("val_tokens", "val_bytes"):
        value = data.get(name, "")
        found[name] = int(value) if value.isdecimal() and len(value) <= 18 else None
    found["code_sha256"] = code.get("sha256")
    found["manifest"] = data.get("manifest_sha256", data.get("manifest"))
    found["tokenizer_sha256"] = data.get("tokenizer_sha256")
    found["gpu"] = env.get("gpu")
    found["torch"] = env.get("torch")
    found["world"] = env.get("world_size")
    found["threads"] = env.get("threads")
    return found


def host_class(parsed: dict) -> str:
    """Hosts whose times and rounding can be compared: device kind and count, or processor and
    threads."""
    if parsed["gpu"] not in (None, "none"):
        return f"{parsed['world']}x{parsed['gpu']}"
    with contextlib.suppress(OSError):
        m = re.search(
            r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.M
        )
        if m:
            return f"{m[1].strip()} x{parsed['threads'] or 1}"
    return f"{platform.machine()} x{parsed['threads'] or 1}"


def classify(
    order: dict, parsed: dict, text: str, code: int | None, killed: str
) -> tuple[str, str]:
    """(status, reason) of an ended attempt. Only `ok` has a score."""
    if killed:
        return next(
            (s for s in ("nan", "pruned", "interrupted") if killed.startswith(s)), "timeout"
        ), killed
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no output"
    )[:300]
    if code not in (0, None):
        if re.search(r"out of memory|MemoryError|bad_alloc|DefaultCPUAllocator", text) or code in (
            -9,
            137,
        ):
            return "oom", last
        return ("nan", last) if "not finite" in text else ("crash", f"exit code {code}: {last}")
    if len(parsed["finals"]) != 1:
        return (
            ("tampered", f"{len(parsed['finals'])} official score lines")
            if parsed["finals"]
            else ("crash", "the log ends without a score")
        )
    loss, bpb, tokens, nbytes = parsed["finals"][0]
    if not (math.isfinite(loss) and math.isfinite(bpb) and 0 < bpb < 100):
        return "nan", f"score {bpb}"
    if tokens and abs(loss / math.log(2) * tokens / nbytes - bpb) > 1e-4 * bpb:
        return "tampered", "bits per byte do not follow from loss, tokens and bytes"
    if (
        parsed["code_sha256"]
        and order.get("code")
        and not parsed["code_sha256"].startswith(order["code"])
    ):
        return "tampered", "another script than ordered ran"
    return "ok", ""


def measure_artifact(folder: Path, parsed: dict, script: Path) -> int | None:
    """Bytes of code plus model as found on the disk, whatever the log says."""
    models = sorted(folder.glob("*.golf")) + sorted(folder.glob("*.ptz"))
    return (
        models[0].stat().st_size + (parsed["logged_code_bytes"] or script.stat().st_size)
        if models
        else None
    )


def weigh(size: int, logged: int | None, limit: int) -> tuple[str, str]:
    """(status, reason) of a finished run by its bytes on the disk."""
    if logged and size != logged:
        return "tampered", f"the log says {logged:,} bytes, the disk {size:,}"
    if size > limit:
        return "oversize", f"{size:,} bytes of {limit:,}"
    return "ok", ""


def collect(
    folder: Path, order: dict, attempt: int, code: int | None, killed: str, started: str
) -> dict:
    """Judge an ended attempt and write metrics.json."""
    out = folder / f"a{attempt}.out"
    script = Path(order["script"])
    text = out.read_text("utf-8", "replace") if out.exists() else ""
    parsed = parse_log(text, order.get("batch_tokens", 0))
    status, reason = classify(order, parsed, text, code, killed)
    size = measure_artifact(folder / f"a{attempt}", parsed, script) or parsed["logged_bytes"]
    if status == "ok":
        status, reason = weigh(size or 0, parsed["logged_bytes"], order["artifact_bytes"])
    loss, bpb, *_ = parsed["finals"][-1] if parsed["finals"] else (None, None)
    metrics = {
        k: parsed[k]
        for k in ("val_bpb_prequant", "steps", "train_s", "step_ms", "peak_mib", "params")
    }
    metrics["partway"] = partway(text, order.get("seconds", 0.0))
    metrics |= dict(
        val_bpb=bpb if status == "ok" else None,
        val_loss=loss if status == "ok" else None,
        artifact_bytes=size,
        wall_s=round(time.time() - order.get("begin", time.time()), 3),
    )
    record = dict(
        schema="forge.run/1",
        key=order["key"],
        exp=order["exp"],
        attempt=attempt,
        env=order["env"],
        rung=order["rung"],
        seed=order["seed"],
        code=dict(sha256=parsed["code_sha256"] or file_digest(script)),
        data={k: parsed[k] for k in ("manifest", "val_tokens", "val_bytes", "tokenizer_sha256")},
        host=dict(
            **{"class": host_class(parsed)},
            gpu=parsed["gpu"],
            torch=parsed["torch"],
            python=platform.python_version(),
        ),
        budget={k: order[k] for k in ("kill_s", "artifact_bytes")},
        status=status,
        reason=reason,
        metrics=metrics,
        curve=parsed["curve"],
        losses=parsed["losses"][-200:],
        started=started,
        ended=now(),
        worker=f"pid {os.getpid()}",
        log_sha256=file_digest(out) if out.exists() else None,
        exit_code=code,
    )
    write_atomic(folder / "metrics.json", json.dumps(without_nan(record), indent=1))
    for heavy in (folder / f"a{attempt}").glob("checkpoint*"):
        heavy.unlink()
    return record


def without_nan(value: Any) -> Any:
    """The same value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

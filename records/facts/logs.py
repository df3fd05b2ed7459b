"""What a training log says, in either dialect: `key:value` (ours and the baseline's) or an indented `key: value` dump.

Nothing is assumed to be honest or small: a long log is read at both ends only, a line that does not match is skipped.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

END_BYTES = 1 << 21  # what is read at each end of a longer log
HASHED_BYTES = 1 << 27  # a longer log is not hashed
NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "": 1e-3}
# Knobs that may differ between the seeds of one record.
FREE = re.compile(
    r"seed|run_id|logfile|threads|checkpoint_every|train_log_every|resume|.*(_path|_dir|_files?|_name)"
    r"|(local_)?rank"
)


@dataclass
class Claim:
    """One line with a loss and a score: nats per token and bits per byte."""

    label: str
    loss: float
    bpb: float
    seconds: float | None = None  # what its evaluation took


@dataclass
class Log:
    """The facts of one run; None or empty where the log is silent."""

    name: str
    sha256: str | None = None
    cut: bool = False  # too long to be read whole
    seed: int | None = None
    knobs: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    code_sha256: list[str] = field(default_factory=list)
    code_bytes: list[int] = field(default_factory=list)
    model_bytes: int | None = None
    total_bytes: list[int] = field(default_factory=list)
    parameters: int | None = None
    claims: list[Claim] = field(default_factory=list)
    official: Claim | None = None
    before_quantisation: Claim | None = None
    steps: int | None = None
    train_seconds: float | None = None
    hessian_seconds: float | None = None
    eval_seconds: float | None = None
    all_eval_seconds: float | None = None
    val_tokens: int | None = None  # targets scored, as far as known
    val_bytes: int | None = None  # only our own logs count them
    data_tokens: int | None = None  # targets that the validation text has, by our own logs
    train_shards: int | None = None
    scored_once: bool | None = None
    coverage: str | None = None
    artifact_sha256: str | None = None
    manifest: str | None = None
    tokenizer_sha256: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)  # seconds
    finished: bool = False
    resumed: bool = False
    machine_paths: int = 0
    noncompliant: bool = (
        False  # our own script marks every line of a run that the competition would not admit
    )

    @property
    def implied_bytes(self) -> float | None:
        """Bytes of text that the official score stands for: loss / ln 2 / bpb is tokens' share of a byte."""
        if self.official is None or not self.val_tokens or self.official.bpb <= 0:
            return None
        return self.official.loss / 0.6931471805599453 / self.official.bpb * self.val_tokens


def read_ends(path: Path) -> tuple[str, bool]:
    """(text, whether the middle was left out) of a file; never more than two ends in memory."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(2 * END_BYTES if size <= 2 * END_BYTES else END_BYTES)
        if size > 2 * END_BYTES:
            file.seek(size - END_BYTES)
            head += b"\n" + file.read(END_BYTES)
    return head.decode("utf-8", "replace").replace("\r\n", "\n"), size > 2 * END_BYTES


def last(pattern: str, text: str, kind=int):
    """The last match's first group, converted; None without a match."""
    found = re.findall(pattern, text, re.MULTILINE)
    return kind(found[-1]) if found else None


def whole(found: list[str]) -> list[int]:
    """Distinct whole numbers in order."""
    return list(dict.fromkeys(int(x) for x in found if len(x) < 19))


def read_claims(text: str) -> list[Claim]:
    """Every line with val_loss and val_bpb in the order of the log."""
    line = re.compile(rf"(.{{0,200}}?)\bval_loss:\s*{NUMBER}\s+val_bpb:\s*{NUMBER}(.{{0,200}})")
    found = [line.match(part) for part in text.split("\n") if "val_bpb" in part]
    claims = []
    for label, loss, bpb, rest in (m.groups() for m in found if m):
        time = re.search(rf"\beval_time:\s*{NUMBER}\s*(ms|s|m)?\b", rest)
        claims.append(
            Claim(
                label.strip(),
                float(loss),
                float(bpb),
                float(time[1]) * SECONDS[time[2] or ""] if time else None,
            )
        )
    return claims


def is_step(claim: Claim) -> bool:
    """A validation during training: `step:i/N` or the bare `i/N`."""
    return bool(re.match(r"(?:.*\bstep:)?\s*\d+/\d+", claim.label))


def is_result(claim: Claim) -> bool:
    """A score of the exported model, as far as its label tells."""
    return not is_step(claim) and "pre-quant" not in claim.label and "post" not in claim.label


def pick_official(claims: list[Claim]) -> Claim | None:
    """The line that a record quotes: ours names it; elsewhere the last result that is no validation step."""
    named = [c for c in claims if c.label.startswith("final:official")]
    return (named or [c for c in claims if is_result(c)] or claims or [None])[-1]


def read_knobs(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """({knob: value}, {knob: origin}) as far as a log prints them; names in lower case."""
    own = re.findall(r"^config:(\w+)=(.*) \(([\w:+]+)\)$", text, re.MULTILINE)
    if own:
        return {k.lower(): v for k, v, _ in own}, {k.lower(): o for k, _, o in own}
    dump = re.search(r"^Hyperparameters:\n((?:[ \t]+\w+:[^\n]*\n)+)", text, re.MULTILINE)
    if dump:
        return dict(re.findall(r"^\s+(\w+):\s*(.*)$", dump[1], re.MULTILINE)), {}
    lines = re.findall(
        r"^((?:train_batch_tokens|attention_mode|tie_embeddings):[^\n]*)$", text, re.MULTILINE
    )
    return dict(pair for line in lines for pair in re.findall(r"(\w+):(\S+)", line)), {}


def read_time(text: str, claims: list[Claim], log: Log):
    """Steps and seconds: training, Hessians, the official evaluation and all evaluations. Our own last validation line
    comes after everything that reads training text, so its clock says more than the line of the stop."""
    stop = re.findall(
        rf"^stopping_early: \w+ train_time:\s*{NUMBER}\s*(ms|s|m)? step:\s*(\d+)/",
        text,
        re.MULTILINE,
    )
    step = re.findall(
        rf"^(?:step:)?\s*(\d+)/\d+ [^\n]*?train_time:\s*{NUMBER}\s*(ms|s|m)?\b", text, re.MULTILINE
    )
    if stop and not (log.code_sha256 and step):
        number, unit, steps = stop[-1]
    elif step:
        steps, number, unit = step[-1]
    if stop or step:
        log.train_seconds, log.steps = float(number) * SECONDS[unit], int(steps)
    log.hessian_seconds = last(rf"^GPTQ:\s*collected \d+ Hessians in {NUMBER}\s*s", text, float)
    timed = [c.seconds for c in claims if c.seconds is not None]
    total = last(rf"^total_eval_time:\s*{NUMBER}\s*s", text, float)
    log.all_eval_seconds = sum(timed) if timed else total
    log.eval_seconds = log.phases.get("eval") or total or (timed[-1] if timed else None)


def read_log(path: Path) -> Log:
    """Every fact of one log file."""
    text, cut = read_ends(path)
    log = Log(path.name, cut=cut)
    text, marks = re.subn(r" \[NONCOMPLIANT\]$", "", text, flags=re.MULTILINE)
    log.noncompliant = marks > 0
    if path.stat().st_size <= HASHED_BYTES:
        with open(path, "rb") as file:
            log.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    log.knobs, log.origins = read_knobs(text)
    log.preset = last(r"^preset:(\S+)$", text, str)
    log.seed = last(r"^(?:\s*seed:\s*|config:SEED=)(\d{1,18})\b", text)
    for name, begin, end in re.findall(
        r"^phase:(\S+) start_ms:(\d{1,15}) end_ms:(\d{1,15})$", text, re.MULTILINE
    ):
        log.phases[name] = log.phases.get(name, 0.0) + (int(end) - int(begin)) / 1e3
    log.claims = read_claims(text)
    log.official = pick_official(log.claims)
    before = [c for c in log.claims if is_step(c) or "pre-quant" in c.label or "post" in c.label]
    log.before_quantisation = before[-1] if before else None
    log.code_sha256 = list(
        dict.fromkeys(re.findall(r"^audit:code sha256:([0-9a-f]{64}) ", text, re.MULTILINE))
    )
    read_time(text, log.claims, log)
    log.code_bytes = whole(re.findall(r"^Code size[^:\n]*:\s*(\d+) bytes", text, re.MULTILINE))
    log.total_bytes = whole(
        re.findall(r"^Total submission size[^:\n]*:\s*(\d+) bytes", text, re.MULTILINE)
    )[-1:]
    log.model_bytes = last(r"^Serialized (?:model|quantized)[^:\n]+:\s*(\d{1,18}) bytes", text)
    log.parameters = last(r"^\s*model_params:\s*(\d{1,18})", text)
    log.train_shards = last(r"\btrain_shards:\s*(\d{1,9})\b", text)
    scored = re.findall(
        r"^final:official [^\n]* tokens:(\d{1,18}) bytes:(\d{1,18})$", text, re.MULTILINE
    )
    log.val_tokens = (
        int(scored[-1][0])
        if scored
        else last(r"^(?:val_loader:[^\n]*?\btokens:|\s*val_tokens:\s*)(\d{1,18})\b", text)
    )
    log.val_bytes = int(scored[-1][1]) if scored else None
    log.data_tokens = last(r"^audit:data [^\n]*?\bval_tokens:(\d{1,18})\b", text)
    coverage = re.findall(
        r"^score:\S+ [^\n]* scored_once:([01]) coverage:([0-9a-f]+)\b", text, re.MULTILINE
    )
    if coverage:
        log.scored_once, log.coverage = all(once == "1" for once, _ in coverage), coverage[-1][1]
    log.artifact_sha256 = last(r"^audit:artifact sha256:([0-9a-f]{64}) ", text, str)
    log.manifest = last(r"^audit:data [^\n]*?manifest(?:_sha256)?:(\S+)", text, str)
    log.tokenizer_sha256 = last(r"^audit:data [^\n]*?tokenizer_sha256:([0-9a-f]{64})", text, str)
    environment = re.findall(r"^audit:env (.*)$", text, re.MULTILINE)
    if environment:
        log.environment = dict(re.findall(r"(\w+):(.*?)(?= \w+:|$)", environment[-1]))
    elif world := last(r"\bworld_size:\s*(\d{1,6})\b", text, str):
        log.environment = dict(world_size=world)
    log.finished = (
        log.official is not None and "Traceback (most recent call last)" not in text[-20_000:]
    )
    log.resumed = bool(re.search(r"^resumed:step ", text, re.MULTILINE))
    log.machine_paths = len(
        re.findall(r"(?<![\w.:/~-])/(?:home|root|workspace|Users|mnt)/\w", text)
    )
    return log


def different_knobs(logs: list[Log]) -> dict[str, set[str]]:
    """Knobs, the seed and places aside, on which logs that print them disagree."""
    names = {k for log in logs for k in log.knobs if not FREE.fullmatch(k)}
    seen = {k: {log.knobs[k] for log in logs if k in log.knobs} for k in names}
    return {k: v for k, v in sorted(seen.items()) if len(v) > 1}

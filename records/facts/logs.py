"""What a training log says, in any dialect that was met.

Ours and the baseline's print `key:value`, others an indented dump of `key: value`, or `key=value`
many to a line; time stamps before each line and UTF-16 are understood. Nothing is assumed to be
honest or small: a long log is read at both ends only, a line that does not match is skipped, and
every pattern takes time in proportion to the text.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .files import sha256_of

END_BYTES = 1 << 21  # what is read at each end of a longer log
HASHED_BYTES = 1 << 27  # a longer log is not hashed
MAX_LINE = 20_000  # characters of a line that are looked at
LN2 = 0.6931471805599453
NUMBER = r"(-?\d{1,18}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?)"
NAME = r"([A-Za-z_]\w{0,63})"
GAP = r"[ \t]{0,40}"  # never across lines: those patterns take quadratic time on empty lines
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "": 1e-3}
STAMP = re.compile(
    r"^(?:\d{10}\.\d{1,9}|\[?\d{4}-\d\d-\d\d[ T][\d:.,]{5,20}\]?|\[rank\d{1,4}\]:) ", re.MULTILINE
)
COLOUR = re.compile(r"\x1b\[[\d;]{0,20}[A-Za-z]")
PATH_OF_MACHINE = re.compile(r"(?<![\w.:/~-])/(?:home|root|workspace|Users|mnt)/\w")
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
    code_sha256: list[str] = field(default_factory=list)  # of the file that ships
    source_sha256: list[str] = field(default_factory=list)  # of the file that ran
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
    named_vocabulary: int | None = None  # by the name of the tokenizer or of the data
    machine_paths: int = 0
    noncompliant: bool = False  # our own script marks every line of a run that is not admissible
    readable: bool = False  # it says anything of a run at all

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens, by a knob, else by the usual names of tokenizers and data."""
        said = self.knobs.get("vocab_size", "")
        if re.fullmatch(r"\d{2,6}", said):
            return int(said)
        return self.named_vocabulary

    @property
    def implied_bytes(self) -> float | None:
        """Bytes of text that the official score stands for: loss / ln 2 / bpb is tokens' share of a
        byte."""
        if self.official is None or not self.val_tokens or self.official.bpb <= 0:
            return None
        return self.official.loss / LN2 / self.official.bpb * self.val_tokens


def decoded(data: bytes) -> str:
    """Text of a log: UTF-8, or UTF-16 with a mark or with zeros in every other place."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    sample = data[:4096]
    for coding, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros = sample[first::2].count(0)
        if (
            len(sample) > 8
            and zeros > 0.4 * len(sample) / 2
            and not sample[1 - first :: 2].count(0)
        ):
            return data.decode(coding, "replace")
    return data.decode("utf-8-sig", "replace")


def read_ends(path: Path) -> tuple[str, bool]:
    """(text, whether the middle was left out) of a file; never more than two ends in memory. Line
    ends are "\\n", colours and time stamps before the lines are gone, and long lines are cut."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(2 * END_BYTES if size <= 2 * END_BYTES else END_BYTES)
        text, cut = decoded(head), size > 2 * END_BYTES
        if cut:
            file.seek((size - END_BYTES) // 4 * 4)
            mark = head[:2] if head[:2] in (b"\xff\xfe", b"\xfe\xff") else b""
            text += "\n" + decoded(mark + file.read(END_BYTES + 4))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = STAMP.sub("", COLOUR.sub("", text))
    if len(text) > MAX_LINE:
        text = "\n".join(line[:MAX_LINE] for line in text.split("\n"))
    return text, cut


def found_in(pattern: str, text: str) -> list:
    """Every match of a pattern; ^ and $ stand for the ends of a line."""
    return re.findall(pattern, text, re.MULTILINE)


def last(pattern: str, text: str, kind=int):
    """The last match's first group, converted; None without a match."""
    found = found_in(pattern, text)
    return kind(found[-1]) if found else None


def whole(found: list[str]) -> list[int]:
    """Distinct whole numbers in order."""
    return list(dict.fromkeys(int(x) for x in found if len(x) < 19))


CLAIM = re.compile(
    rf"(.{{0,200}}?)\bval_loss[:=]{GAP}{NUMBER}[ \t,]{{1,40}}val_bpb[:=]{GAP}{NUMBER}(.{{0,200}})"
)
CLAIM_TIME = re.compile(rf"\b(?:eval_)?time[:=]{GAP}{NUMBER}{GAP}(ms|s|m)?\b")


def read_claims(text: str) -> list[Claim]:
    """Every line with val_loss and val_bpb in the order of the log."""
    claims = []
    for line in text.split("\n"):
        found = CLAIM.match(line) if "val_bpb" in line else None
        if found is None:
            continue
        label, loss, bpb, rest = found.groups()
        time = CLAIM_TIME.search(rest) if "train_time" not in rest else None
        seconds = float(time[1]) * SECONDS[time[2] or ""] if time else None
        claims.append(Claim(label.strip(), float(loss), float(bpb), seconds))
    return claims


def is_step(claim: Claim) -> bool:
    """A validation during training: `step:i/N` or the bare `i/N`."""
    return bool(re.match(r"(?:.{0,100}\bstep[:=])?[ \t]{0,40}\d{1,12}/\d", claim.label))


def is_result(claim: Claim) -> bool:
    """A score of the exported model, as far as its label tells."""
    return not is_step(claim) and "pre-quant" not in claim.label and "post" not in claim.label


def pick_official(claims: list[Claim]) -> Claim | None:
    """The line that a record quotes: ours names it; elsewhere the last result that is no validation
    step."""
    named = [c for c in claims if c.label.startswith("final:official")]
    return (named or [c for c in claims if is_result(c)] or claims or [None])[-1]


def read_knobs(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """({knob: value}, {knob: origin}) as far as a log prints them; names in lower case."""
    own = found_in(rf"^config:{NAME}=(.*) \(([\w:+]{{1,99}})\)$", text)
    if own:
        return {k.lower(): v for k, v, _ in own}, {k.lower(): o for k, _, o in own}
    dump = re.search(rf"^Hyperparameters:\n((?:[ \t]+{NAME}:[^\n]*\n)+)", text, re.MULTILINE)
    if dump:
        return dict(found_in(rf"^[ \t]+{NAME}:[ \t]*(.*)$", dump[1])), {}
    if assigned := assigned_knobs(text):
        return assigned, {}
    lines = found_in(r"^((?:train_batch_tokens|attention_mode|tie_embeddings):[^\n]*)$", text)
    return dict(pair for line in lines for pair in re.findall(rf"\b{NAME}:(\S+)", line)), {}


def assigned_knobs(text: str) -> dict[str, str]:
    """Knobs of the dialect that writes them as key=value, ten or more to a line; names in lower
    case."""
    knobs = {}
    for line in text.split("\n"):
        words = line.split() if line.count("=") >= 10 else ()
        pairs = [re.fullmatch(rf"{NAME}=(\S*)", word) for word in words]
        if sum(p is not None for p in pairs) >= max(10, 0.8 * len(words)):
            knobs |= {p[1].lower(): p[2] for p in pairs if p}
    return knobs


def read_time(text: str, log: Log):
    """Steps and seconds: training, Hessians, the official evaluation and all evaluations. Our own
    last validation line comes after everything that reads training text, so its clock says more
    than the line of the stop."""
    stop = found_in(
        rf"^stopping_early: \w{{1,64}} train_time:{GAP}{NUMBER}{GAP}(ms|s|m)?"
        rf" step:{GAP}(\d{{1,12}})/",
        text,
    )
    step = found_in(
        rf"^(?:step:)?{GAP}(\d{{1,12}})/\d{{1,12}} [^\n]*?train_time:{GAP}{NUMBER}{GAP}(ms|s|m)?\b",
        text,
    )
    if stop and not (log.code_sha256 and step):
        number, unit, steps = stop[-1]
    elif step:
        steps, number, unit = step[-1]
    if stop or step:
        log.train_seconds, log.steps = float(number) * SECONDS[unit], int(steps)
    log.hessian_seconds = last(
        rf"^GPTQ:{GAP}collected \d{{1,9}} Hessians in {NUMBER}{GAP}s", text, float
    )
    timed = [c.seconds for c in log.claims if c.seconds is not None]
    total = last(rf"^total_eval_time:{GAP}{NUMBER}{GAP}s", text, float)
    log.all_eval_seconds = sum(timed) if timed else total
    log.eval_seconds = log.phases.get("eval") or total or (timed[-1] if timed else None)


def read_sizes(text: str, log: Log):
    """Bytes of code, of the model and of both."""
    log.code_bytes = whole(found_in(r"^Code size[^:\n]*:[ \t]*(\d{1,18}) bytes", text))
    total = found_in(r"^Total submission size[^:\n]*:[ \t]*(\d{1,18}) bytes", text)
    log.total_bytes = whole(total)[-1:]
    log.model_bytes = last(r"^Serialized (?:model|quantized)[^:\n]+:[ \t]*(\d{1,18}) bytes", text)
    log.parameters = last(r"^[ \t]{0,40}(?:model_params|params):[ \t]*(\d{1,18})", text)


def read_text_facts(text: str, log: Log):
    """What is known of the data: tokens, bytes, shards, hashes, the tokenizer."""
    log.train_shards = last(rf"\btrain_shards[:=]{GAP}(\d{{1,9}})\b", text)
    scored = found_in(r"^final:official [^\n]* tokens:(\d{1,18}) bytes:(\d{1,18})$", text)
    if scored:
        log.val_tokens, log.val_bytes = int(scored[-1][0]), int(scored[-1][1])
    else:
        log.val_tokens = last(
            r"^(?:val_loader:[^\n]*?\btokens:|[ \t]{0,40}val[_ ]tokens[:=][ \t]{0,40})(\d{1,18})\b",
            text,
        )
    log.data_tokens = last(r"^audit:data [^\n]*?\bval_tokens:(\d{1,18})\b", text)
    coverage = found_in(r"^score:\S+ [^\n]* scored_once:([01]) coverage:([0-9a-f]{1,64})\b", text)
    if coverage:
        log.scored_once, log.coverage = all(once == "1" for once, _ in coverage), coverage[-1][1]
    log.manifest = last(r"^audit:data [^\n]*?manifest(?:_sha256)?:(\S+)", text, str)
    log.tokenizer_sha256 = last(r"^audit:data [^\n]*?tokenizer_sha256:([0-9a-f]{64})", text, str)
    log.named_vocabulary = last(r"\bfineweb_(\d{2,6})_bpe|\bfineweb10B_sp(\d{2,6})\b", text, one_of)


def one_of(groups: tuple[str, ...]) -> int:
    """The group of an alternative that matched."""
    return int(next(g for g in groups if g))


def read_environment(text: str) -> dict[str, str]:
    """What our own log says of the machine, or the number of ranks of another."""
    lines = found_in(r"^audit:env (.*)$", text)
    if not lines:
        world = last(rf"\bworld_size[:=]{GAP}(\d{{1,6}})\b", text, str)
        return dict(world_size=world) if world else {}
    values: dict[str, list[str]] = {}
    name = ""
    for word in lines[-1].split(" "):
        head, colon, rest = word.partition(":")
        if colon and head.isidentifier():
            name, values[head] = head, [rest]
        elif name:  # a value with blanks in it
            values[name].append(word)
    return {k: " ".join(v) for k, v in values.items()}


def read_log(path: Path) -> Log:
    """Every fact of one log file."""
    text, cut = read_ends(path)
    log = Log(path.name, cut=cut)
    text, marks = re.subn(r" \[NONCOMPLIANT\]$", "", text, flags=re.MULTILINE)
    log.noncompliant = marks > 0
    if path.stat().st_size <= HASHED_BYTES:
        log.sha256 = sha256_of(path)
    log.knobs, log.origins = read_knobs(text)
    log.preset = last(r"^preset:(\S+)$", text, str)
    log.seed = last(rf"^(?:{GAP}seed:{GAP}|config:SEED=)(\d{{1,18}})\b", text)
    if log.seed is None and re.fullmatch(r"\d{1,18}", log.knobs.get("seed", "")):
        log.seed = int(log.knobs["seed"])
    for name, begin, end in found_in(
        r"^phase:(\S{1,64}) start_ms:(\d{1,15}) end_ms:(\d{1,15})$", text
    ):
        log.phases[name] = log.phases.get(name, 0.0) + (int(end) - int(begin)) / 1e3
    log.claims = read_claims(text)
    log.official = pick_official(log.claims)
    before = [c for c in log.claims if not is_result(c)]
    log.before_quantisation = before[-1] if before else None
    log.code_sha256 = list(dict.fromkeys(found_in(r"^audit:code sha256:([0-9a-f]{64}) ", text)))
    ran = found_in(r"^audit:source sha256:([0-9a-f]{64}) ", text)
    log.source_sha256 = list(dict.fromkeys(ran))
    log.artifact_sha256 = last(r"^audit:artifact sha256:([0-9a-f]{64}) ", text, str)
    read_time(text, log)
    read_sizes(text, log)
    read_text_facts(text, log)
    log.environment = read_environment(text)
    crashed = "Traceback (most recent call last)" in text[-20_000:]
    log.finished = log.official is not None and not crashed
    log.resumed = bool(re.search(r"^resumed:step ", text, re.MULTILINE))
    log.machine_paths = len(PATH_OF_MACHINE.findall(text))
    log.readable = bool(log.claims or log.knobs or log.steps or log.seed is not None)
    return log


def different_knobs(logs: list[Log]) -> dict[str, set[str]]:
    """Knobs, the seed and places aside, on which logs that print them disagree."""
    names = {k for log in logs for k in log.knobs if not FREE.fullmatch(k)}
    seen = {k: {log.knobs[k] for log in logs if k in log.knobs} for k in names}
    return {k: v for k, v in sorted(seen.items()) if len(v) > 1}

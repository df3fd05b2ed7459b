"""Audit a script of another make: `audit FOLDER --adapter FILE.py:function`.

An adapter is a small Python file beside the folder or in it. It runs in a process of its own,
without a network, in a copy of the folder, so that it may `import train_gpt`. It has

    VOCAB = 64       tokens of the (shrunk) model that it builds; every value of a token is tried
    LENGTH = 180     of a text; enough for several windows or chunks (180 unless said)

    def losses(tokens):
        ...

which is given a text, an int64 array (N,) of ids below VOCAB from one BOS (1) to another with
documents between, and runs the script's own evaluation on it, from the same start each time. Losses
are nats; entry i is of tokens[i + 1]. It either returns all N - 1 of them, or, so that order,
counts and states can be seen too, it is a generator that yields

    first, losses           what the evaluation counts: losses of the targets first, first + 1, ...
    first, losses, state    and whatever scored them (modules, arrays, lists, numbers), before
    anything learns from them

and returns the mean loss that the script itself reports (or nothing). Only this file's process
judges: what runs there sends losses and nothing else. An evaluation that means harm may still guess
that it is being watched.
"""

import ast
import contextlib
import json
import math
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from facts.folder import read_folder
from facts.wrappers import MAX_SOURCE_BYTES, parsed

from . import text_probes
from .audit import SECONDS, Place, end, environment, result, verdicts

HOST = Path(__file__).with_name("adapter_process.py")
MAX_ANSWER = 1 << 26  # characters
REPEATS = 1e-3  # nats: what two equal evaluations may differ by, and a mean from its losses


class Failed(Exception):
    """The adapter's process did not answer as it should."""


def named(text: str) -> tuple[Path, str]:
    """(file, function) of --adapter. Nothing is run. Raises ValueError when there is no such
    function."""
    path, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--adapter {text}: want FILE.py:function")
    file = Path(path)
    if not file.is_file() or file.stat().st_size > MAX_SOURCE_BYTES:
        raise ValueError(f"--adapter {path}: no such Python file")
    if (tree := parsed(file.read_bytes())) is None:
        raise ValueError(f"--adapter {path}: does not parse as Python")
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    if name not in functions:
        raise ValueError(
            f"--adapter {path}: no function {name!r}; it has {', '.join(functions) or 'none'}"
        )
    return file, name


class Adapted:
    """A process that answers texts with losses."""

    def __init__(self, place: Place, file: Path, name: str):
        self.errors = tempfile.TemporaryFile(dir=place.top)
        self.process = subprocess.Popen(
            [*place.isolated, *place.python, str(HOST), str(file.resolve()), name],
            cwd=place.folder,
            env=environment(place.home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            start_new_session=True,
        )
        self.late = threading.Timer(SECONDS, end, (self.process,))
        self.late.start()
        self.gap, self.whole, self.states = 0.0, False, False  # of all answers: see probed()

    def close(self):
        """End the process, whatever it is doing."""
        self.late.cancel()
        end(self.process)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def read(self) -> dict[str, Any]:
        """The next answer. Raises Failed."""
        line = self.process.stdout.readline(MAX_ANSWER)
        try:
            if not line.endswith("\n"):
                raise Failed(self.last_words())
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(printable(str(answer["error"])))
        except (ValueError, TypeError, RecursionError):
            raise Failed("its answer is no JSON object") from None
        return answer

    def last_words(self) -> str:
        """Why a process fell silent."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if not self.late.is_alive():
            return f"took more than {SECONDS} s; a smaller VOCAB or LENGTH asks less of it"
        self.errors.seek(max(0, self.errors.seek(0, 2) - 2000))
        words = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return printable(words[-1] if words else f"ended with exit code {self.process.returncode}")

    def sizes(self) -> tuple[int, int]:
        """(VOCAB, LENGTH) of the adapter. Raises ValueError for values that cannot be, Failed when
        it does not load."""
        answer = self.read()
        for name, lo, hi in (("vocab", 4, 65_536), ("length", 32, 100_000)):
            if type(answer.get(name)) is not int or not lo <= answer[name] <= hi:
                raise ValueError(
                    f"--adapter: {name.upper()}={answer.get(name)!r}: want a whole number from "
                    f"{lo} to {hi:,} at the top of the file"
                )
        return answer["vocab"], answer["length"]

    def look(self, tokens: np.ndarray, digests: bool) -> text_probes.Seen:
        """One evaluation, for the probes. Raises Failed."""
        with contextlib.suppress(BrokenPipeError):  # reading will say why
            print(
                json.dumps(dict(tokens=tokens.tolist(), digests=digests)),
                file=self.process.stdin,
                flush=True,
            )
        answer, n = self.read(), len(tokens) - 1
        losses, count, order, marks = np.full(n, np.nan), np.zeros(n, int), np.full(n, -1), [""] * n
        try:
            self.whole = bool(answer["whole"])
            for number, (first, found, mark) in enumerate(answer["pieces"]):
                if (
                    first < 0
                    or not found
                    or first + len(found) > n
                    or (self.whole and len(found) != n)
                ):
                    raise Failed(
                        f"{len(found)} losses from target {first} of a text with {n} targets"
                    )
                here = slice(first, first + len(found))
                losses[here], order[here], marks[here] = found, number, [str(mark)] * len(found)
                count[here] += 1
            if not count.any():
                raise Failed("yielded no losses")
            if answer["mean"] is not None:
                gap = abs(answer["mean"] - np.nanmean(losses))
                self.gap = max(self.gap, float(gap) if math.isfinite(gap) else math.inf)
            else:
                self.gap = math.nan
        except (KeyError, ValueError, TypeError):
            raise Failed("its answer is not made of pieces (first target, losses, state)") from None
        self.states = self.states or any(marks)
        error = "a loss is no number" if np.isnan(losses[count > 0]).any() else ""
        return text_probes.Seen(losses, count, order, np.zeros(n, int), marks, error)


def printable(text: str) -> str:
    """Words of a stranger, fit to print."""
    return "".join(c for c in text if c.isprintable())[:200]


def probed(adapted: Adapted, other: Adapted) -> Iterator[dict[str, Any]]:
    """Every probe of one adapter, seen in two processes. Raises ValueError and Failed."""
    vocab, length = adapted.sizes()
    other.sizes()
    text = text_probes.probe_text(length, vocab)
    gap = text_probes.moved(adapted.look(text, False).losses, other.look(text, False).losses)
    found = text_probes.audit(adapted.look, text, vocab, cuts=12, positions=2)
    floor = max(gap, found["noise_floor"])
    yield result(
        "repeatable",
        floor <= REPEATS,
        f"{floor:.1e} nats between equal evaluations, in one process and in two",
        max_abs_diff=floor,
    )
    seen = dict(state_digest=adapted.states, score_once=not adapted.whole)
    yield from verdicts(
        found, ["suffix_swap", "target_swap", *(name for name in seen if seen[name])]
    )
    for name in (name for name in seen if not seen[name]):
        yield result(name, None, "the adapter does not show it: yield first, losses, state")
    yield result(
        "reported_mean",
        None if math.isnan(adapted.gap) else adapted.gap <= REPEATS,
        "the adapter returns no mean"
        if math.isnan(adapted.gap)
        else f"{adapted.gap:.1e} nats between the reported mean and that of the losses",
    )


def audit_foreign(folder: Path, adapter: str) -> list[dict[str, Any]]:
    """Probe the evaluation of anybody's folder through an adapter. Raises ValueError for a bad
    folder or adapter."""
    record = read_folder(folder)
    file, name = named(adapter)
    with tempfile.TemporaryDirectory(prefix="audit.") as top, contextlib.ExitStack() as stack:
        place = Place(record, Path(top))
        found = [place.offline()]
        pair = [Adapted(place, file, name) for _ in range(2)]
        for adapted in pair:
            stack.callback(adapted.close)
        try:
            found += probed(*pair)
        except Failed as reason:
            found.append(result("evaluates", False, str(reason)))
    return found

"""Answer texts with losses: the process in which the adapter of a script of another make runs;
nothing here judges.

    python adapter_process.py ADAPTER FUNCTION      in the folder of the script

First comes a line about the adapter. Then each line of standard input, {"tokens": [...], "digests":
bool}, is answered with one line: {"pieces": [[first target, [nats, ...], digest of the state],
...], "whole": bool, "mean": nats or null}. What the script prints goes to standard error.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def feed(sha, state: Any):
    """Add everything that a state holds to a hash: modules and optimisers, mappings, sequences,
    tensors, numbers."""
    if hasattr(state, "state_dict"):
        state = state.state_dict()
    if isinstance(state, dict):
        for key in sorted(state, key=str):
            sha.update(str(key).encode())
            feed(sha, state[key])
    elif isinstance(state, (list, tuple)):
        for part in state:
            feed(sha, part)
    elif hasattr(state, "detach"):  # a tensor, of whatever type
        sha.update(state.detach().cpu().double().numpy().tobytes())
    else:
        sha.update(np.asarray(state).tobytes() if hasattr(state, "dtype") else repr(state).encode())


def answer(function: Callable, tokens: list[int], digests: bool) -> dict[str, Any]:
    """Run the function on one text. A state is hashed when its piece is yielded, before the
    function goes on."""
    found, pieces = function(np.array(tokens)), []
    if not inspect.isgenerator(found):
        return dict(pieces=[[0, numbers(found), ""]], whole=True, mean=None)
    while True:
        try:
            first, losses, *state = next(found)
        except StopIteration as end:
            return dict(
                pieces=pieces, whole=False, mean=None if end.value is None else float(end.value)
            )
        sha = hashlib.sha256()
        if state and digests:
            feed(sha, state[0])
        pieces.append(
            [int(first), numbers(losses), sha.hexdigest()[:16] if state and digests else ""]
        )


def numbers(losses: Any) -> list[float]:
    """Losses as a flat list, whether they came as an array, a tensor or a list."""
    losses = losses.detach().cpu().double().numpy() if hasattr(losses, "detach") else losses
    return np.asarray(losses, np.float64).reshape(-1).tolist()


def main(adapter: str, name: str):
    """Load the adapter, say what it is, then answer until there is nothing more to answer."""
    answers, questions = (
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
        os.fdopen(os.dup(0), encoding="utf-8"),
    )
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[0] = os.getcwd()  # the folder of the script, not that of this file

    def say(message: dict[str, Any]):
        print(json.dumps(message), file=answers, flush=True)

    try:
        spec = importlib.util.spec_from_file_location("adapter", adapter)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = vars(module)[name]
        say(dict(vocab=vars(module).get("VOCAB"), length=vars(module).get("LENGTH", 180)))
        for line in questions:
            say(answer(function, **json.loads(line)))
    except BaseException as error:
        say(dict(error=f"{type(error).__name__}: {error}"[:300]))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Nothing is set in vain: what each knob does to a run, found by changing it and running, not by
reading what it needs.

A run of a tiny system is summed up by its losses, its plan and every tensor of its artifact. A knob
that acts beside the others changes that, and one that is warned about does not.
"""

import contextlib
import hashlib
import io
import re

import numpy as np
import pytest
import torch
from conftest import write_shard
from helpers import SYSTEMS

import train_gpt as tg

# Knobs of these groups say where, when and how fast, and what is logged: no result depends on them.
OUTSIDE = {name for name, (group, _) in tg.KNOBS.items() if group in ("run", "system")}
# What the fixed settings below decide, and what text and tokenizer would have to follow.
FIXED = {
    "iterations",
    "max_wallclock_seconds",
    "data_path",
    "tokenizer_path",
    "vocab_size",
    "bos_id",
    "caseops",
}
# Knobs that act without showing in a tiny run, and why.
UNSEEN = {
    "warmup_steps": "prewarm steps are undone",
    "codec": "the same tensors in other bytes",
    "artifact_budget_bytes": "everything fits anyway",
    "fit_budget": "everything fits anyway",
    "eval_batch_tokens": "batches of other sizes give the same score",
    "micro_batch_tokens": "passes of other sizes give the same gradient",
    "scale_floor": "weights are larger than some floors",
    "muon_momentum_cooldown_steps": "six steps have no room for it",
}
BASE = dict(
    DEVICE="cpu",
    THREADS="1",
    ITERATIONS="6",
    ALLOW_NONCOMPLIANT="1",
    COMPILE="off",
    NUMERICS="fp32",
    ATTENTION="sdpa",
    RUN_ID="x",
)
SHOWN = r"(?:train_loss|val_loss|val_bpb|tokens|bytes|model_params|flops_per_token|slots|skips):\S+"


def summed_up(env: dict[str, str], folder) -> str:
    """One run in this process as a digest: losses, plan, official score and the artifact's
    tensors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert tg.main([], BASE | env | {"RUNS_DIR": str(folder)}) == 0, err.getvalue()
    lines = [
        x for x in out.getvalue().splitlines() if re.search("train_loss|final:|params|plan:", x)
    ]
    digest = hashlib.sha256(repr([re.findall(SHOWN, line) for line in lines]).encode())
    _, tensors = tg.unpack_artifact((folder / "x" / "model.golf").read_bytes())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        for value in vars(tensor).values() if hasattr(tensor, "__dict__") else tensor:
            if torch.is_tensor(value):
                value = value.contiguous().view(torch.uint8).numpy().tobytes()
            digest.update(value if type(value) is bytes else repr(value).encode())
    return digest.hexdigest()


def test_exceptions_are_knobs():
    assert FIXED | UNSEEN.keys() <= tg.KNOBS.keys()


def other_values(name: str, value) -> list[str]:
    """Texts of other values that a knob accepts, plain ones first."""
    meta, kind = tg.KNOBS[name][1].metadata, type(tg.KNOBS[name][1].default)
    if kind is bool:
        return [str(int(not value))]
    if meta["choices"]:
        return [str(choice) for choice in meta["choices"] if choice != value]
    if kind is str:
        return []
    tries = (
        [value // 2, value * 2, value + 1, 2, 3, 16, 64]
        if kind is int
        else [
            value * 0.5,
            value * 1.5,
            0.1,
            0.5,
            0.9,
        ]
    )
    tries += [meta["hi"], meta["lo"]]
    good = [kind(x) for x in tries if meta["lo"] <= x <= meta["hi"] and x != value]
    return [str(x) for x in dict.fromkeys(good)]


def loads(env: dict[str, str]) -> tg.Config | None:
    """The configuration, None if it is refused."""
    try:
        return tg.load(BASE | env)
    except tg.UserError:
        return None


def named(cfg: tg.Config) -> set[str]:
    """Knobs that are warned about."""
    return {note.split()[0].lower() for note in cfg.notes}


def judged(preset: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({knob that acts: other values}, {knob that is warned about: another value}) of a system."""
    env = {"PRESET": preset}
    values = tg.load(BASE | env).values()
    acting, inert = {}, {}
    for name in tg.KNOBS.keys() - OUTSIDE - FIXED:
        for text in other_values(name, values[name]):
            cfg = loads(env | {name.upper(): text})
            if cfg and name in named(cfg):
                inert[name] = text
                break
            if cfg:
                acting.setdefault(name, []).append(text)
    return acting, inert


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_knobs_that_are_warned_about_change_nothing(system, toy, tmp_path):
    """Finding M4, false alarms: all of them at once leave the run as it is."""
    env = {"PRESET": f"{system}+tiny", "DATA_PATH": str(toy)}
    _, inert = judged(env["PRESET"])
    assert len(inert) > 10
    changed = env | {name.upper(): text for name, text in inert.items()}
    assert named(tg.load(BASE | changed)) == set(inert)
    (tmp_path / "b").mkdir()
    assert summed_up(env, tmp_path) == summed_up(changed, tmp_path / "b")


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory, toy):
    """The toy text with a document's first token at every fiftieth place: no row lies in one."""
    folder = tmp_path_factory.mktemp("short")
    for path in toy.iterdir():
        if path.suffix == ".bin":
            tokens = np.fromfile(path, "<u2", offset=1024)
            tokens[::50] = 1
            write_shard(folder / path.name, tokens.tolist())
        else:
            (folder / path.name).hardlink_to(path)
    return folder


SURVEYED = [
    pytest.param(system, marks=[] if system == "baseline" else pytest.mark.survey)
    for system in SYSTEMS
]


@pytest.mark.slow
@pytest.mark.parametrize("system", SURVEYED)
def test_knobs_that_are_not_warned_about_change_the_run(system, short_documents, tmp_path):
    """Finding M4, silence: each knob that is not warned about acts, changed alone. The suite asks
    the baseline, which uses the fewest knobs; `-m survey` asks every system, minutes each."""
    env = {"PRESET": f"{system}+tiny", "DATA_PATH": str(short_documents)}
    acting, _ = judged(env["PRESET"])
    if "swa_start" in acting:
        env["SWA_START"] = "0.6"  # so that there is more than one snapshot
    summed_up(env, tmp_path)
    size = (tmp_path / "x" / "model.golf").stat().st_size
    env["ARTIFACT_BUDGET_BYTES"] = str(tg.code_bytes() + size * 4 // 5)  # so that bits matter
    (tmp_path / "plain").mkdir()
    plain, vain = summed_up(env, tmp_path / "plain"), []
    for name in sorted(acting.keys() - UNSEEN.keys()):
        for i, text in enumerate(acting[name][:4]):
            folder = tmp_path / f"{name}{i}"
            folder.mkdir()
            if summed_up(env | {name.upper(): text}, folder) != plain:
                break
        else:
            vain.append((name, acting[name][:4]))
    assert not vain, vain
    assert len(acting) > 50

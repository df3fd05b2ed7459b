"""A laboratory for the forge: campaigns on the planted problem, with real processes or with scores
at once."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_trainer
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
from forge import campaign as campaign_module  # noqa: E402
from forge import forge as command  # noqa: E402
from forge import settings  # noqa: E402
from forge.ledger import Ledger  # noqa: E402
from forge.space import Space  # noqa: E402
from forge.state import State  # noqa: E402

FORGE = [sys.executable, str(ROOT / "records" / "forge" / "forge.py")]
FAKE = Path(fake_trainer.__file__)
DESCRIBED = dict(
    knobs={
        n.upper(): dict(
            group=g,
            type=type(f.default).__name__,
            lo=f.metadata["lo"],
            hi=f.metadata["hi"],
            doc="",
            choices=list(f.metadata["choices"]),
            needs="",
        )
        for n, (g, f) in fake_trainer.KNOBS.items()
    },
    values={n.upper(): f.default for n, (_, f) in fake_trainer.KNOBS.items()},
)
CONFIG = dict(
    name="lab",
    seed=1,
    base={},
    code="fake",
    data_print="",
    rungs=dict(screen=dict(kill_s=20, prior_sigma=0.001, env={})),
)


def values(env: dict) -> dict:
    """The fake trainer's configuration under an environment."""
    return fake_trainer.load({k: str(v) for k, v in env.items()})


def share(env_or_change: dict, space: Space | None = None) -> float:
    """Part of the attainable gain that a configuration truly has."""
    env = space.resolve(env_or_change, dict(steps=100)) if space else env_or_change
    return (fake_trainer.DEFAULT - fake_trainer.true_score(values(env))) / (
        fake_trainer.DEFAULT - fake_trainer.BEST
    )


class InstantRuns:
    """Scores at once, with the noise of the seed; no process."""

    owns_devices = False

    def __init__(self, score, sigma: float):
        self.score, self.sigma, self.orders = score, sigma, {}

    def start(self, order):
        self.orders[order["key"]] = order

    def partway(self, key):
        """These runs are never seen on their way."""

    def poll(self, key):
        order = self.orders[key]
        noise = fake_trainer.rungs_noise(
            order["rung"], order["seed"], dict(order["env"], campaign=id(self) * 0)
        )
        score = self.score(order) + self.sigma * noise
        return "done", dict(
            status="ok" if score < 90 else "crash",
            reason="",
            attempt=1,
            exit_code=0,
            log_sha256="",
            host={"class": "lab"},
            data=dict(val_tokens=1000, val_bytes=2500, tokenizer_sha256="x"),
            metrics=dict(
                val_bpb=score,
                val_loss=score * 1.7,
                steps=100,
                train_s=1.0,
                step_ms=10.0,
                wall_s=60.0,
                artifact_bytes=fake_trainer.model_bytes(values(order["env"])) + 1000,
            ),
        )


class QuickRuns(InstantRuns):
    """Runs of two seconds, on paper."""

    def poll(self, key):
        state, record = super().poll(key)
        record["metrics"]["wall_s"] = 2.0
        return state, record


class HalfwayRuns(InstantRuns):
    """Runs that are seen once on their way: a training loss that follows the score, and an end on
    request."""

    def __init__(self, score, sigma: float, error: float = 0.002):
        super().__init__(score, sigma)
        self.error, self.polled, self.pruned = error, set(), {}

    def loss(self, key):
        wobble = fake_trainer.rungs_noise(
            "loss", self.orders[key]["seed"], dict(self.orders[key]["env"])
        )
        return 0.3 + 1.7 * super().poll(key)[1]["metrics"]["val_bpb"] + self.error * wobble

    def partway(self, key):
        return self.loss(key)

    def prune(self, key, reason):
        self.pruned[key] = reason

    def poll(self, key):
        if key not in self.polled:
            self.polled.add(key)
            return "running", None
        _, record = super().poll(key)
        record["metrics"]["partway"] = self.loss(key)
        if key in self.pruned:
            record |= dict(status="pruned", reason=self.pruned[key])
            record["metrics"] |= dict(val_bpb=None, val_loss=None, wall_s=25.0)
        return "done", record


class MemoryLedger(Ledger):
    """A ledger without a file."""

    def __init__(self):
        self.events = []

    def read(self):
        return self.events

    def append(self, event, **data):
        self.events.append(
            json.loads(json.dumps(dict(data, n=len(self.events) + 1, event=event, time="T")))
        )
        return self.events[-1]


def plan(change, env):
    size = fake_trainer.model_bytes(values(env)) + 1000
    return dict(
        ok=size <= fake_trainer.BUDGET,
        bytes=size,
        reason="" if size <= fake_trainer.BUDGET else "too large",
    )


def instant(
    tmp: Path, sigma: float = 0.001, score=None, skills=None, kind=InstantRuns, **changes
) -> campaign_module.Campaign:
    """A campaign on the planted problem whose runs take no time. `changes` are tables of
    campaign.toml."""
    config = dict(CONFIG)
    for table, defaults in settings.DEFAULTS.items():
        config[table] = defaults | changes.pop(table, {})
    config |= changes
    config["budget"]["disk_gib"] = 0.0
    ledger = MemoryLedger()
    ledger.append("created", config=config)
    runs = kind(score or (lambda order: fake_trainer.true_score(values(order["env"]))), sigma)
    found = campaign_module.Campaign(tmp, runs, ledger, plan)
    found._space = Space.build(DESCRIBED, skills or fake_trainer.SKILLS, {})
    return found


def finish(c: campaign_module.Campaign, limit: int = 10**6) -> State:
    """Tick without pauses until the campaign stops."""
    for _ in range(limit):
        c.locked_tick()
        if c.state.stopped and not c.running():
            return c.state
    return c.state


def write_skills(folder: Path, skills: dict | None = None) -> Path:
    """Skill folders of the planted problem."""
    for name, knobs in (skills or fake_trainer.SKILLS).items():
        (folder / name / "assets").mkdir(parents=True)
        (folder / name / "assets" / "knobs.json").write_text(json.dumps(knobs), "utf-8")
        (folder / name / "SKILL.md").write_text(
            f"---\nname: {name}\ndescription: planted skill {name}\n---\n\nBody.\n"
        )
    return folder


def real(tmp: Path, tricks: dict | None = None, **changes) -> campaign_module.Campaign:
    """A campaign on the planted problem with real processes, in a folder of its own."""
    script = tmp / "script"
    script.mkdir()
    shutil.copy(FAKE, script / "train_gpt.py")
    config = dict(base={}, rungs=dict(screen=dict(kill_s=20, prior_sigma=0.001, env={}))) | changes
    found = campaign_module.create(
        tmp / "campaign", script / "train_gpt.py", write_skills(tmp / "skills"), config
    )
    if tricks:
        (found.script().parent / "tricks.json").write_text(json.dumps(tricks), "utf-8")
    return found


def here(*args) -> SimpleNamespace:
    """The command line in this process: no second start of Python and its packages."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main(list(map(str, args)))
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def forge(*args, cwd: Path = ROOT, timeout: float = 120, env: dict | None = None):
    """The command line in a process of its own."""
    return subprocess.run(
        [*FORGE, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        env=env or dict(os.environ),
    )

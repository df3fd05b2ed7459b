"""The loop: one idempotent tick reaps, judges, learns, proposes and starts. Everything decided is
an event; a tick that is killed anywhere is repeated by the next one from the ledger alone, with the
same decisions.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import (
    ForgeError,
    comparison,
    devices,
    forecasts,
    patches,
    runner,
    sampler,
    sandbox,
    skill_review,
)
from . import space as space_module
from .agent import Agent
from .campaign_folder import add_code, data_print, load_skills
from .confirmation import STUDIES, Studies
from .ledger import Ledger, digest, locked, now, write_atomic
from .processes import located
from .settings import HEAD, read_config, seconds_of, to_toml
from .space import CODE, Space, config_id
from .state import Experiment, Run, replay
from .view import View

MARGIN = 1.15  # of the reserve: runs do not all take equally long
# What the ledger keeps of a run's record and of its metrics; the rest stays in the run's folder.
KEPT = ("status", "reason", "attempt", "exit_code", "log_sha256")
KEPT_METRICS = (
    "val_bpb",
    "val_loss",
    "val_bpb_prequant",
    "steps",
    "train_s",
    "step_ms",
    "artifact_bytes",
    "wall_s",
    "params",
    "partway",
)
EXCLUSIVE = "target"  # a run on this rung has all devices of the machine for itself


class Campaign(Studies):
    """A folder with its ledger. `runs` starts and polls runs; `plan` foretells feasibility; tests
    replace both."""

    def __init__(
        self,
        folder: Path,
        runs=None,
        ledger: Ledger | None = None,
        plan: Callable[[dict, dict], dict] | None = None,
    ):
        self.folder = Path(folder).resolve()
        self.ledger = ledger or Ledger(self.folder / "events.jsonl")
        self.state = replay(self.ledger.read())
        if not self.state.config:
            raise ForgeError(f"{self.folder.name}: no campaign here; begin one with `init`")
        self.runs = runs or runner.LocalRunner(self.folder / "runs")
        self.plan = plan or self.run_plan
        self.agent = Agent()
        self._space: Space | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    @property
    def view(self) -> View:
        """What others may know of this campaign."""
        return View(self.folder.name, self.folder, self.config, self.state, self.space)

    def record(self, event: str, **data):
        """Append an event and take it in."""
        self.state.apply(self.ledger.append(event, **data))

    def script(self, change: dict | None = None) -> Path:
        """The code that a change runs on, by content."""
        code = (change or {}).get(CODE) or self.config["code"]
        return self.folder / "code" / code / "train_gpt.py"

    @property
    def space(self) -> Space:
        """The search space. Knobs are those of the campaign's own script, read once and kept beside
        it: patched code is not asked, it adds one switch and changes no other knob."""
        if self._space is None:
            self._space = self.read_space()
        return self._space

    def read_space(self) -> Space:
        """The space of the campaign's script, skills and patches."""
        cache = self.folder / "code" / self.config["code"] / "knobs.json"
        if not cache.exists():
            described = space_module.describe(self.script(), self.config["base"])
            write_atomic(cache, json.dumps(described))
        fixed = self.config["rungs"][self.config["search"]["rung"]].get("env", {})
        skills = {}  # without knobs that the rung fixes: no change could reach these
        for skill, table in load_skills(self.folder / "skills").items():
            skills[skill] = {n: k for n, k in table.items() if n not in fixed}
        described = json.loads(cache.read_text("utf-8"))
        space = Space.build(described, skills, self.config["base"])
        for path in self.folder.glob("code/*/patch.json"):
            space.switches.add(json.loads(path.read_text("utf-8"))["switch"])
        return space

    # Runs.
    def rung(self, name: str) -> dict:
        """A rung's table; its expected steps are those that the sentinel saw."""
        rung = self.config["rungs"][name]
        base = self.space.base_values
        tokens = rung.get("tokens", 0) // max(1, base.get("TRAIN_BATCH_TOKENS", 1))
        measured = self.state.reference.get(name, {}).get("steps")
        return rung | dict(steps=tokens or measured or base.get("ITERATIONS", 1000))

    def want(self, x: Experiment, change: dict, rung: str, seed: int):
        """Ask for a run unless the same was asked for before. Another change with the same
        environment on this rung shares its run."""
        if self.state.run_of(change, rung, seed) is not None:
            return
        env = self.space.resolve(change, self.rung(rung))
        content = dict(
            env=env,
            code=change.get(CODE) or self.config["code"],
            data=self.config["data_print"],
            rung=rung,
            seed=seed,
            repeat=0,
        )
        key = digest(content)
        if key in self.state.runs:
            self.state.by_place[config_id(change), rung, seed] = self.state.runs[key]
        else:
            self.record("wanted", key=key, exp=x.id, change=change, rung=rung, seed=seed, env=env)

    def gather(
        self, x: Experiment, wanted: list[tuple[dict, str, int]]
    ) -> list[float | None] | None:
        """Scores of these runs (None for a failed one), or None as a whole while one is missing."""
        found = []
        for change, rung, seed in wanted:
            self.want(x, change, rung, seed)
            found.append(self.state.run_of(change, rung, seed))
        return [r.score for r in found] if all(r.finished for r in found) else None

    def order(self, key: str) -> dict:
        """What a supervisor must know. `devices` are those that the run's slots name; a worker
        elsewhere chooses among its own."""
        run = self.state.runs[key]
        rung = self.rung(run.rung)
        base = self.space.base_values
        patched = CODE in run.change
        allowed = self.config["agent"].get("allow_unsandboxed", False)
        if patched:
            sandbox.require(allowed)
        return dict(
            key=key,
            exp=run.exp,
            env=run.env,
            rung=run.rung,
            seed=run.seed,
            script=str(self.script(run.change)),
            code=run.change.get(CODE) or self.config["code"],
            kill_s=rung["kill_s"],
            stall_s=rung.get("stall_s", 300),
            nproc=rung.get("nproc", 1),
            seconds=self.clock(run.env),
            devices=self.devices_of(run),
            wants_gpu=self.wants_gpu(),
            exclusive=run.rung == EXCLUSIVE,
            patched=patched,
            allow_unsandboxed=allowed,
            ordered=now(),
            batch_tokens=int(run.env.get("TRAIN_BATCH_TOKENS", base.get("TRAIN_BATCH_TOKENS", 0))),
            artifact_bytes=self.config["budget"]["artifact_bytes"],
        )

    def clock(self, env: dict) -> float:
        """Seconds after which a run of this environment ends its training; 0 when it ends by its
        steps."""
        base = self.space.base_values.get("MAX_WALLCLOCK_SECONDS", 0.0)
        return float(env.get("MAX_WALLCLOCK_SECONDS", base))

    def running(self) -> list[Run]:
        """Runs under way."""
        return [r for r in self.state.runs.values() if r.started and not r.finished]

    # Devices.
    def wants_gpu(self) -> bool:
        """Whether runs may use a GPU: not when the base configuration says that they run on the
        CPU."""
        device = self.config["base"].get("DEVICE", self.space.base_values.get("DEVICE", "auto"))
        return str(device) != "cpu"

    def gpus(self) -> list[str]:
        """Names of the GPUs that runs here may have; empty when runs are elsewhere or on the
        CPU."""
        return devices.visible() if self.runs.owns_devices and self.wants_gpu() else []

    def slots(self) -> list[str]:
        """Names of all places that a run can have: GPUs, or workers by number."""
        return self.gpus() or [str(i) for i in range(self.config["loop"]["workers"])]

    def slots_needed(self, rung: str) -> int:
        """How many slots a run on this rung has: all of them on the rung of claims, else one per
        process on GPUs and one on a CPU."""
        wanted = self.config["rungs"][rung].get("nproc", 1) if self.gpus() else 1
        return max(wanted, len(self.slots())) if rung == EXCLUSIVE else wanted

    def free_slots(self, rung: str) -> list[str]:
        """The lowest free slots for a run on this rung; empty while too few are free."""
        taken = [s for r in self.running() for s in r.slots]
        slots = [s for s in self.slots() if s not in taken]
        if self.gpus():
            taken = devices.held_elsewhere(slots)  # by another campaign or a worker
        return devices.lowest_free(slots, taken, self.slots_needed(rung))

    def devices_of(self, run: Run) -> list[str] | None:
        """The GPUs of a run; empty on a CPU, None when a worker elsewhere chooses."""
        if not self.runs.owns_devices:
            return None
        return list(run.slots) if self.gpus() else []

    def placed(self, run: Run) -> bool:
        """Whether a run that must start again has slots that exist: it keeps them through restarts
        of decider and supervisor, and gets others only when one is not visible any more."""
        if not self.runs.owns_devices or (run.slots and set(run.slots) <= set(self.slots())):
            return True
        slots = self.free_slots(run.rung)
        if slots:
            self.record("placed", key=run.key, slots=slots)
        return bool(slots)

    def launch(self):
        """Start wanted runs while there are workers, slots and budget, in their order: a run that
        waits for several slots is not overtaken. Studies may use the reserve: it is there for
        them."""
        workers = self.config["loop"]["workers"]
        for run in [r for r in self.state.runs.values() if not r.started]:
            if len(self.running()) >= workers:
                return
            study = self.state.experiments[run.exp].kind in STUDIES
            reason = self.exhausted(run.rung, 0 if study else 1) or self.too_few(run.rung)
            if reason:
                if not self.running():
                    self.record("stopped", reason=reason)
                return
            slots = self.free_slots(run.rung) if self.runs.owns_devices else []
            if self.runs.owns_devices and not slots:
                return
            self.record("started", key=run.key, **(dict(slots=slots) if slots else {}))
            self.runs.start(self.order(run.key))

    def too_few(self, rung: str) -> str:
        """Why a run on a rung can never start here; empty when it can."""
        wanted = self.slots_needed(rung)
        there = len(self.slots())
        if not self.runs.owns_devices or wanted <= there:
            return ""
        return f"a run on {rung} needs {wanted} devices, {there} are visible here"

    # On the way.
    def foretell(self):
        """Forecast every first run of a search experiment once, halfway, and end those that will
        hardly beat the anchor. Runs that judge, confirm or repeat are never cut short, and every
        fifth hopeless one runs on, by lot, so that forecasts are scored on good and bad runs
        alike."""
        state = self.state
        for run in self.running() if self.config["loop"]["forecasts"] else ():
            x = state.experiments[run.exp]
            if run.forecast or x.kind != "search" or (run.cid, run.seed) != (x.cid, x.seeds[0]):
                continue
            reading = self.runs.partway(run.key)
            scores = state.scores(state.anchor, run.rung)
            if not reading or not scores:
                continue
            bar = sum(scores) / len(scores)
            found = forecasts.forecast(state.halfway(run.rung), reading, bar)
            if not found:
                continue
            hopeless = found["chance"] < forecasts.HOPELESS and forecasts.trusted(state)
            stop = hopeless and int(digest([self.config["seed"], run.key]), 16) % 5 > 0
            self.record("forecast", key=run.key, forecast=found | dict(stop=stop))
            if stop:
                span = f"[{found['low']:.4f}, {found['high']:.4f}]"
                reason = f"forecast {found['middle']:.4f} {span}, the anchor has {bar:.4f}"
                self.runs.prune(run.key, reason)

    def ingest(self) -> bool:
        """Take in finished runs; start again what nobody works on. True when something was
        finished."""
        changed = False
        for run in self.running():
            status, record = self.runs.poll(run.key)
            if status == "done":
                self.record("finished", key=run.key, record=self.short(run, record))
                changed = True
            elif status == "lost" and self.placed(run):
                self.runs.start(self.order(run.key))
        return changed

    def short(self, run: Run, record: dict) -> dict:
        """What the ledger keeps of a run's record. A score of other text or from another class of
        hosts does not count, nor one of patched code that its artifact does not repeat."""
        metrics = record["metrics"]
        kept = {k: record.get(k) for k in KEPT} | {k: metrics.get(k) for k in KEPT_METRICS}
        kept["bpb"] = kept.pop("val_bpb")
        kept["host"] = record["host"]["class"]
        data = record["data"]
        kept["val"] = [data.get(k) for k in ("val_tokens", "val_bytes", "tokenizer_sha256")]
        kept["wall_s"] = kept["wall_s"] or 0.0
        if kept["status"] == "ok":
            status, reason = self.disbelief(run, kept, record)
            if reason:
                kept |= dict(status=status, reason=reason)
        return kept

    def disbelief(self, run: Run, kept: dict, record: dict) -> tuple[str, str]:
        """(status, reason) of a score that does not count; two empty texts when it does."""
        reference = self.state.reference
        mine = reference.get(run.rung, {})
        wanted = mine.get("val") or next((r["val"] for r in reference.values()), None)
        if wanted and kept["val"] != wanted:
            return "tampered", f"scored {kept['val'][:2]} tokens and bytes, not {wanted[:2]}"
        here = mine.get("host", kept["host"])
        if kept["host"] != here:
            return "invalid", f"ran on {kept['host']}; this rung is measured on {here}"
        if CODE in run.change:
            folder = self.folder / "runs" / run.key
            allowed = self.config["agent"].get("allow_unsandboxed", False)
            given = self.devices_of(run) or []
            return "tampered", patches.rescore(self.script(), folder, record, given, allowed)
        return "", ""

    # Budgets.
    def spent(self) -> dict[str, float]:
        """What was used so far."""
        return self.view.spent()

    def reserve(self, rival: dict | None = None) -> list[dict]:
        """Configurations of the runs without which a claim of the anchor ends in nothing to report:
        those on fresh seeds against the rival (the champion unless said) and, when that is not the
        base, the closing comparison."""
        rival = self.state.champion if rival is None else rival
        arms = [self.state.anchor, rival] + ([self.state.anchor, {}] if rival else [])
        return arms * comparison.FRESH

    def exhausted(self, rung: str, more_runs: int = 1, reserve: bool = False) -> str:
        """Why `more_runs` further runs on a rung (and the reserve behind them) would break a
        budget; empty when they fit."""
        budget = self.config["budget"]
        search = self.config["search"]
        spent = self.spent()
        kept = self.reserve() if reserve else []
        expected = self.state.expected_seconds(rung)
        where = search["confirm_rung"] or search["rung"]
        usual = self.state.expected_seconds(where)
        last = sum(MARGIN * max(self.state.expected_seconds(where, c), usual) for c in kept)
        last *= self.config["rungs"][where].get("nproc", 1)
        each = expected * self.config["rungs"][rung].get("nproc", 1)
        more = ((spent["running"] + more_runs) * each + last) / 60
        if budget["runs"] and spent["runs"] + more_runs + len(kept) > budget["runs"]:
            text = f"runs: {spent['runs']:.0f} of {budget['runs']} used"
            return text + (f", {len(kept)} in reserve" if reserve else "")
        if budget["minutes"] and spent["minutes"] + more > budget["minutes"]:
            text = f"minutes: {spent['minutes']:.1f} of {budget['minutes']} used"
            text += f", a run takes {expected / 60:.1f}"
            return text + (f", {last / 60:.1f} in reserve" if reserve else "")
        return self.too_late(more) or self.too_full()

    def too_late(self, minutes: float) -> str:
        """Why so many more device minutes do not fit before the deadline; empty when they do."""
        deadline = self.config["budget"]["deadline"]
        seconds = minutes * 60 / self.config["loop"]["workers"]
        if not deadline or time.time() + seconds <= seconds_of(deadline):
            return ""
        return f"deadline {deadline} " + ("is too near" if now() < deadline else "has passed")

    def too_full(self) -> str:
        """Why the disk has too little room; empty when it has enough."""
        free = shutil.disk_usage(self.folder).free / 2**30
        wanted = self.config["budget"]["disk_gib"]
        return f"disk: {free:.1f} GiB free, want {wanted}" if free < wanted else ""

    # Decisions.
    def decide(self) -> bool:
        """One decision that the state allows; False when there is nothing to do but wait."""
        before = self.state.events
        for x in self.state.open():
            getattr(self, "step_" + x.kind)(x)
        due = len(self.state.searches()) // self.config["loop"]["meta_every"]
        if due > len(self.state.metas):
            index = len(self.state.metas) + 1
            self.record("meta", meta=skill_review.summarise(self.state, self.space, index))
        if self.state.events == before and not self.state.stopped:
            self.next_question()
        return self.state.events > before

    def next_question(self):
        """Open the next experiment: sentinel, study or proposal; or stop with the reason."""
        state = self.state
        search = self.config["search"]["rung"]
        if not any(x.kind == "sentinel" for x in state.experiments.values()):
            self.open_sentinel(search)
            return
        if state.open("sentinel", *STUDIES):
            return
        if search not in state.reference:
            first = next(iter(state.experiments.values())).verdict["reason"]
            self.record("stopped", reason=f"the base configuration does not run: {first}")
            return
        if not state.open() and self.open_study():
            return
        if len(state.open("search")) < self.config["loop"]["workers"]:
            reason = self.search_over()
            if not reason:
                self.open_search()
            elif not state.open() and not self.open_closing():
                self.record("stopped", reason=reason)

    def open(self, kind: str, change: dict, rung: str, **more) -> str:
        """Open an experiment; returns its name."""
        name = f"e{len(self.state.experiments) + 1:06d}"
        self.record("proposed", id=name, kind=kind, change=change, rung=rung, **more)
        return name

    def close(self, x: Experiment, verdict: str, reason: str, **more):
        """Answer an experiment."""
        self.record("judged", exp=x.id, verdict=dict(verdict=verdict, reason=reason, **more))

    def search_over(self) -> str:
        """Why no further search experiment may start; empty while one may. Runs to confirm a claim
        stay in reserve."""
        wanted = self.config["budget"]["experiments"]
        done = len(self.state.searches()) + len(self.state.open("search"))
        if done >= wanted:
            return f"experiments: {done} of {wanted} done"
        return self.exhausted(self.config["search"]["rung"], reserve=True)

    # The search.
    def next_seed(self, change: dict, rung: str) -> int | None:
        """The first search seed that a configuration has not run with."""
        seeds = self.config["seeds"]["search"]
        return next((s for s in seeds if self.state.run_of(change, rung, s) is None), None)

    def runs_of_search(self, x: Experiment) -> list[tuple[dict, str, int]]:
        """Every run that a search experiment compares: its own, and those that it and the anchor
        have on search seeds. An ablation's anchor may never have run here: then its first seed."""
        seeds = self.config["seeds"]["search"]
        anchor = self.state.anchor
        asked = []
        for change in (x.change, anchor):
            asked += [(change, x.rung, s) for s in seeds if self.state.run_of(change, x.rung, s)]
        if not any(config_id(change) == config_id(anchor) for change, _, _ in asked):
            asked.append((anchor, x.rung, seeds[0]))
        return [(x.change, x.rung, s) for s in x.seeds] + asked

    def step_search(self, x: Experiment):
        """One run; more only while a race on a noisy rung is open. May move the anchor."""
        state = self.state
        search = self.config["search"]
        wanted = self.runs_of_search(x)
        found = self.gather(x, wanted)
        if found is None:
            return
        noise = state.noise(x.rung)
        bars = (state.anchor, state.champion, {})
        old = next(s for c in bars if (s := state.scores(c, x.rung)))
        for (change, rung, seed), score in zip(wanted, found):
            if score is None and change == x.change:
                self.close_failed(x, state.run_of(change, rung, seed), sum(old) / len(old))
                return
        new = state.scores(x.change, x.rung, self.config["seeds"]["search"])
        if search["anchor"] == "greedy":
            step = "move" if new[0] < min(old) else "stay"
        else:
            step = comparison.anchor_step(new, old, noise.sigma, search["race_above"])
        if step in ("new", "anchor"):
            change = x.change if step == "new" else state.anchor
            seed = self.next_seed(change, x.rung)
            if seed is not None and not self.exhausted(x.rung, reserve=True):
                self.want(x, change, x.rung, seed)
                return
            # No further race can be paid: one margin decides.
            step = comparison.anchor_step(new, old, noise.sigma, noise.sigma)
        delta = sum(new) / len(new) - sum(old) / len(old)
        text = f"{delta:+.4f} against the anchor"
        more = dict(delta=delta, sigma=noise.sigma, runs=len(new), anchor_before=state.anchor)
        if step == "move":
            self.close(x, "tentative", text, anchor_after=x.change, **more)
        else:
            self.close(x, "reject", f"{text}, noise {noise.sigma:.4f}", **more)

    def close_failed(self, x: Experiment, run: Run, bar: float):
        """Answer a search experiment whose run has no score; one that was cut short has its
        forecast."""
        record = run.record
        cut = run.forecast if record["status"] == "pruned" else None
        delta = cut["middle"] - bar if cut else None
        sigma = self.state.noise(x.rung).sigma
        reason = f"{record['status']}: {record['reason']}"
        self.close(x, "reject", reason, delta=delta, sigma=sigma)

    def open_search(self):
        """Take the next hypothesis of a person, an agent or the sampler that is new and
        feasible."""
        draws = 3 * sampler.REDRAWS
        for _ in range(draws):
            found = self.agent.next_hypothesis(self.view, self.record) or self.numeric()
            if found is None:
                break
            change = found["change"]
            if reason := self.refusal(change):
                plan = self.state.plans[config_id(change)]
                refused = dict(
                    infeasible=True,
                    reason=reason,
                    at=len(self.state.experiments),
                    oversize="bytes" in plan and not plan["ok"],
                )
                self.record("refused", proposal=found | refused)
                continue
            tried = sum(x.kind == "search" for x in self.state.experiments.values())
            self.open(
                "search",
                change,
                self.config["search"]["rung"],
                skill=found["skill"],
                parent=self.state.anchor,
                source=found["source"],
                text=found.get("text", ""),
                seeds=[self.config["seeds"]["search"][tried % 3]],
            )
            return
        if not self.state.open():
            self.record("stopped", reason=f"no new feasible proposal in {draws} draws")

    def numeric(self) -> dict | None:
        """The sampler's next proposal."""
        found = sampler.propose(self.state, self.space)
        return found and dict(skill=found[0], change=found[1], source="sampler")

    # What the script foretells.
    def refusal(self, change: dict) -> str:
        """Why a change must not start, by what the script foretells of it; empty when it may."""
        search = self.config["search"]
        for wanted in (change, {}) if search["max_flops"] else (change,):
            if config_id(wanted) not in self.state.plans:
                env = self.space.resolve(wanted, self.rung(search["rung"]))
                self.record("planned", cid=config_id(wanted), plan=self.plan(wanted, env))
        return self.infeasible(config_id(change)) or self.costly(config_id(change))

    def run_plan(self, change: dict, env: dict) -> dict:
        """What the script itself foretells; patched code does so in a cage."""
        script = self.script(change)
        scratch = self.folder / "scratch" / "plan"
        scratch.mkdir(parents=True, exist_ok=True)
        cage: Sequence[str] = ()
        if CODE in change:
            allowed = self.config["agent"].get("allow_unsandboxed", False)
            cage = sandbox.cage(scratch, script, located(env, script), allowed)
        return space_module.plan(script, env, scratch, cage)

    def infeasible(self, cid: str) -> str:
        """Why a planned configuration must not start: refused by the script, or larger than the
        budget by more than past predictions were wrong."""
        plan = self.state.plans[cid]
        if plan["ok"] or "bytes" not in plan:
            return "" if plan["ok"] else plan["reason"]
        ratios = []
        for (run_cid, _, _), run in self.state.by_place.items():
            predicted = self.state.plans.get(run_cid, {}).get("bytes")
            if predicted and run.record and run.record["artifact_bytes"]:
                ratios.append(run.record["artifact_bytes"] / predicted)
        ratios.sort()
        expected = plan["bytes"] * (ratios[len(ratios) // 2] if ratios else 1.0)
        error = plan["bytes"] * ((ratios[-1] - ratios[0]) / 2 if len(ratios) > 1 else 0.01)
        over = expected - error - self.config["budget"]["artifact_bytes"]
        return plan["reason"] if over > 0 else ""

    def costly(self, cid: str) -> str:
        """Why a planned configuration would win only by computing more than the base: on a rung of
        equal tokens, more operations per token are more time."""
        limit = self.config["search"]["max_flops"]
        base, mine = (self.state.plans.get(i, {}).get("flops", 0.0) for i in (config_id({}), cid))
        if not limit or not base or mine <= limit * base * 1.001:
            return ""
        return f"{mine / base:.2f} times the base's operations per token, the limit is {limit:g}"

    # The tick.
    def tick(self) -> bool:
        """Reap, judge, learn, propose, start. True when anything happened. Raises ForgeError when
        another decider is at work."""
        busy = f"{self.folder.name}: another decider is at work"
        with locked(self.folder / "tick.lock", busy=busy):
            self.catch_up()
            return self.locked_tick()

    def catch_up(self):
        """Take in what other commands recorded between two ticks."""
        if self.ledger.count() > self.state.events:
            for event in self.ledger.read()[self.state.events :]:
                self.state.apply(event)
            self._space = None  # a skill may have been added

    def locked_tick(self) -> bool:
        """A tick while no other process decides."""
        before = self.state.events
        self.agent.listen()
        self.sync_config()
        self.ingest()
        self.foretell()
        while self.decide():
            pass
        if not self.state.stopped:
            self.launch()
        return self.state.events > before

    def sync_config(self):
        """Take in what the user changed in campaign.toml; code, data and base belong to the
        campaign for good."""
        path = self.folder / "campaign.toml"
        if path.exists():
            wanted = read_config(path)
            fixed = {k: self.config[k] for k in ("code", "data_print", "base", "seed", "name")}
            if wanted | fixed != self.config:
                self.record("config", config=wanted | fixed)

    def loop(
        self, seconds: float = 0.0, publish: Callable[[], Any] | None = None, pause: float = 0.5
    ):
        """Ticks until the campaign stops or `seconds` are over (0 = no limit)."""
        end = time.monotonic() + (seconds or 1e12)
        quick = 0.02
        try:
            while time.monotonic() < end:
                moved = self.tick()
                if moved and publish:
                    publish()
                if self.state.stopped and not self.running():
                    return
                quick = 0.02 if moved else min(quick * 1.5, pause)
                time.sleep(quick)
        finally:
            self.agent.leave(self.view, self.record)


# ---- Beginning -----------------------------------------------------------------------------------
def create(
    folder: Path, script: Path, skills: Path, config: dict, without: Sequence[str] = ()
) -> Campaign:
    """Begin a campaign in an empty folder, with all skills but some; nothing is left behind when
    the configuration is refused."""
    folder = Path(folder)
    known = {p.parent.name for p in skills.glob("*/SKILL.md")}
    if unknown := sorted(set(without) - known):
        names = ", ".join(sorted(known))
        raise ForgeError(f"--without {', '.join(unknown)}: want a skill of {names}")
    if (folder / "events.jsonl").exists():
        raise ForgeError(f"{folder.name} already holds a campaign; go on with `run`")
    if not script.is_file():
        raise ForgeError(f"{script.name}: no such script")
    fresh = not folder.exists()
    try:
        config = fill(folder, script, skills, config, without)
    except (ForgeError, OSError) as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ForgeError):
            raise
        raise ForgeError(f"{folder.name}: {error.strerror}") from None
    Ledger(folder / "events.jsonl").append("created", config=config)
    return Campaign(folder)


def fill(folder: Path, script: Path, skills: Path, config: dict, without: Sequence[str]) -> dict:
    """Put code, settings and skills into a new campaign's folder; returns the settings. Raises
    ForgeError when they do not fit each other."""
    folder.mkdir(parents=True, exist_ok=True)
    code = add_code(folder, script, script.parent / "data")
    kept = folder / "code" / code / "train_gpt.py"
    data = located(dict(DATA_PATH="auto") | config.get("base", {}), kept)["DATA_PATH"]
    config = dict(name=folder.name, seed=1) | config
    config |= dict(code=code, data_print=data_print(data))
    write_atomic(folder / "campaign.toml", to_toml(config))
    config = read_config(folder / "campaign.toml")
    described = space_module.describe(kept, config["base"])
    tokens = config["rungs"][config["search"]["rung"]].get("tokens")
    if tokens:  # what counts steps is a part of these
        values = described["values"]
        values["ITERATIONS"] = max(1, tokens // values["TRAIN_BATCH_TOKENS"])
    Space.build(described, load_skills(skills), config["base"])
    write_atomic(folder / "code" / code / "knobs.json", json.dumps(described))

    def left_out(at: str, names: list[str]) -> set[str]:
        return set(without) & set(names) if Path(at) == skills else set()

    shutil.copytree(skills, folder / "skills", dirs_exist_ok=True, ignore=left_out)
    (folder / "runs").mkdir(exist_ok=True)
    write_atomic(folder / "campaign.toml", HEAD + to_toml(config))
    return config

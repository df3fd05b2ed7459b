"""The loop: one idempotent tick reaps, judges, learns, proposes and starts. Everything decided is an event; a tick that
is killed anywhere is repeated by the next one from the ledger alone, with the same decisions.
"""

import calendar
import contextlib
import json
import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import ForgeError, comparison, forecasts, skill_review, sampler, runner
from . import space as space_module
from .ledger import Ledger, digest, file_digest, locked, now, write_atomic
from .space import CODE, Space, config_id
from .state import Experiment, replay
from .confirmation import STUDIES, Studies

RUNG = (
    "kill_s",
    "tokens",
    "stall_s",
    "sentinel_runs",
    "prior_sigma",
    "nproc",
)  # and env, a table of knobs
MARGIN = 1.15  # of the reserve: runs do not all take equally long
KEPT = (
    "status",
    "reason",
    "attempt",
    "exit_code",
    "log_sha256",
)  # of a run's record, in the ledger


def load_skills(folder: Path) -> dict[str, dict]:
    """{skill: its knobs.json} of a folder of skills. Raises ForgeError naming the file."""
    found = {}
    for path in sorted(folder.glob("*/assets/knobs.json")):
        try:
            found[path.parts[-3]] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ForgeError(f"{path.parts[-3]}/assets/knobs.json: not JSON ({error})") from None
    return found


def data_print(path: str) -> str:
    """A fingerprint of a data folder: names, sizes and first and last bytes of its shards. Empty for "auto"."""
    parts = []
    for file in sorted(Path(path).glob("*.bin")) if path != "auto" else ():
        with open(file, "rb") as f:
            head = f.read(4096)
            f.seek(max(0, file.stat().st_size - 4096))
            parts.append([file.name, file.stat().st_size, digest([head.hex(), f.read().hex()])])
    return digest(parts) if parts else ""


class Campaign(Studies):
    """A folder with its ledger. `runs` starts and polls runs; `plan` foretells feasibility; tests replace both."""

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
        self._space: Space | None = None
        self.asked: Any = None  # the agent's call under way
        self.patient = False  # whether proposals wait for its answer

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    def record(self, event: str, **data):
        """Append an event and take it in."""
        self.state.apply(self.ledger.append(event, **data))

    def script(self, change: dict | None = None) -> Path:
        """The code that a change runs on, by content."""
        return (
            self.folder
            / "code"
            / ((change or {}).get(CODE) or self.config["code"])
            / "train_gpt.py"
        )

    @property
    def space(self) -> Space:
        """The search space; knobs of the script are read once per code and kept beside it."""
        code = self.state.anchor.get(CODE) or self.config["code"]
        if self._space is None or self._space_code != code:
            cache = self.folder / "code" / code / "knobs.json"
            if not cache.exists():
                write_atomic(
                    cache,
                    json.dumps(
                        space_module.describe(self.script(self.state.anchor), self.config["base"])
                    ),
                )
            fixed = self.config["rungs"][self.config["search"]["rung"]].get(
                "env", {}
            )  # no change could reach these
            skills = {
                s: {n: k for n, k in table.items() if n not in fixed}
                for s, table in load_skills(self.folder / "skills").items()
            }
            self._space = Space.build(json.loads(cache.read_text()), skills, self.config["base"])
            self._space.switches = {
                json.loads(p.read_text())["switch"] for p in self.folder.glob("code/*/patch.json")
            }
            self._space_code = code
        return self._space

    # Runs.
    def rung(self, name: str) -> dict:
        """A rung's table; its expected steps are those that the sentinel saw."""
        rung = self.config["rungs"][name]
        base = self.space.base_values
        tokens = rung.get("tokens", 0) // max(1, base.get("TRAIN_BATCH_TOKENS", 1))
        measured = self.state.reference.get(name, {}).get("steps")
        return rung | dict(steps=tokens or measured or base.get("ITERATIONS", 1000))

    def want(self, x: Experiment, change: dict, rung: str, seed: int):
        """Ask for a run unless the same was asked for before."""
        if self.state.run_of(change, rung, seed) is None:
            env = self.space.resolve(change, self.rung(rung))
            key = digest(
                dict(
                    env=env,
                    code=change.get(CODE) or self.config["code"],
                    data=self.config["data_print"],
                    rung=rung,
                    seed=seed,
                    repeat=0,
                )
            )
            if (
                key in self.state.runs
            ):  # another change with the same environment on this rung: share its run
                self.state.by_place[config_id(change), rung, seed] = self.state.runs[key]
                return
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
        """What a supervisor must know."""
        run, slots = self.state.runs[key], self.config["loop"]["workers"]
        rung, used = self.rung(run.rung), {r.key: i for i, r in enumerate(self.running())}
        alone = slots > 1 and rung.get("nproc", 1) == 1
        device = {"CUDA_VISIBLE_DEVICES": str(used.get(key, 0) % slots)} if alone else {}
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
            device_env=device,
            sandbox=self.sandbox(run.change, key),
            ordered=now(),
            batch_tokens=int(
                run.env.get(
                    "TRAIN_BATCH_TOKENS", self.space.base_values.get("TRAIN_BATCH_TOKENS", 0)
                )
            ),
            artifact_bytes=self.config["budget"]["artifact_bytes"],
        )

    def clock(self, env: dict) -> float:
        """Seconds after which a run of this environment ends its training; 0 when it ends by its steps."""
        return float(
            env.get(
                "MAX_WALLCLOCK_SECONDS", self.space.base_values.get("MAX_WALLCLOCK_SECONDS", 0.0)
            )
        )

    def foretell(self):
        """Forecast every first run of a search experiment once, halfway, and end those that will hardly beat the
        anchor. Runs that judge, confirm or repeat are never cut short, and every fifth hopeless one runs on, by lot, so
        that forecasts are scored on good and bad runs alike."""
        state = self.state
        for run in self.running() if self.config["loop"]["forecasts"] else ():
            x = state.experiments[run.exp]
            if run.forecast or x.kind != "search" or (run.cid, run.seed) != (x.cid, x.seeds[0]):
                continue
            reading = self.runs.partway(run.key)
            seen = [
                (r.record["partway"], r.score)
                for r in state.runs.values()
                if r.rung == run.rung and r.score is not None and r.record.get("partway")
            ]
            bar = state.scores(state.anchor, run.rung)
            found = forecasts.forecast(seen, reading, sum(bar) / len(bar)) if reading and bar else None
            if found:
                hopeless = found["chance"] < forecasts.HOPELESS and forecasts.trusted(state)
                stop = hopeless and int(digest([self.config["seed"], run.key]), 16) % 5 > 0
                self.record("forecast", key=run.key, forecast=found | dict(stop=stop))
                if stop:
                    self.runs.prune(
                        run.key,
                        f"forecast {found['middle']:.4f} [{found['low']:.4f}, "
                        f"{found['high']:.4f}], the anchor has {sum(bar) / len(bar):.4f}",
                    )

    def sandbox(self, change: dict, key: str) -> list[str]:
        """The command in front of patched code; nothing for the campaign's own code."""
        if CODE not in change:
            return []
        from . import patches

        return patches.sandbox(
            self.folder / "runs" / key, self.config["agent"].get("allow_unsandboxed", False)
        )

    def running(self) -> list:
        return [r for r in self.state.runs.values() if r.started and not r.finished]

    def ingest(self) -> bool:
        """Take in finished runs; start again what nobody works on. True when something was finished."""
        changed = False
        for run in self.running():
            status, record = self.runs.poll(run.key)
            if status == "done":
                self.record("finished", key=run.key, record=self.short(run, record))
                changed = True
            elif status == "lost":
                self.runs.start(self.order(run.key))
        return changed

    def short(self, run, record: dict) -> dict:
        """What the ledger keeps of a run's record; the rest stays in its folder. A score of other text or from
        another class of hosts does not count."""
        m = record["metrics"]
        kept = {k: record.get(k) for k in KEPT} | {
            k: m.get(k)
            for k in (
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
        }
        kept |= dict(
            bpb=kept.pop("val_bpb"),
            host=record["host"]["class"],
            val=[record["data"].get(k) for k in ("val_tokens", "val_bytes", "tokenizer_sha256")],
        )
        kept["wall_s"] = kept["wall_s"] or 0.0
        wanted = self.state.reference.get(run.rung, {}).get("val") or next(
            (r["val"] for r in self.state.reference.values()), None
        )
        if kept["status"] == "ok" and wanted and kept["val"] != wanted:
            kept |= dict(
                status="tampered",
                reason=f"scored {kept['val'][:2]} tokens and bytes, not {wanted[:2]}",
            )
        here = self.state.reference.get(run.rung, {}).get("host", kept["host"])
        if kept["status"] == "ok" and kept["host"] != here:
            kept |= dict(
                status="invalid", reason=f"ran on {kept['host']}; this rung is measured on {here}"
            )
        if kept["status"] == "ok" and CODE in run.change:
            from . import patches

            reason = patches.rescore(self.script(), self.folder / "runs" / run.key, record)
            if reason:
                kept |= dict(status="tampered", reason=reason)
        return kept

    # Budgets.
    def spent(self) -> dict[str, float]:
        """What was used so far."""
        running = len(self.running())
        return dict(
            minutes=self.state.minutes(),
            runs=sum(r.started for r in self.state.runs.values()),
            running=running,
            experiments=len(self.state.searches()),
            agent_calls=len(self.state.agent_calls),
            agent_dollars=sum(c.get("dollars", 0.0) for c in self.state.agent_calls),
        )

    def reserve(self, rival: dict | None = None) -> list[dict]:
        """Configurations of the runs without which a claim of the anchor ends in nothing to report: those on fresh
        seeds against the rival (the champion unless said) and, when that is not the base, the closing comparison."""
        rival = self.state.champion if rival is None else rival
        arms = [self.state.anchor, rival] + ([self.state.anchor, {}] if rival else [])
        return arms * comparison.FRESH

    def exhausted(self, rung: str, more_runs: int = 1, reserve: bool = False) -> str:
        """Why `more_runs` further runs on a rung (and the reserve behind them) would break a budget; empty when they
        fit."""
        budget, spent, state, search = (
            self.config["budget"],
            self.spent(),
            self.state,
            self.config["search"],
        )
        kept, expected = self.reserve() if reserve else [], state.expected_seconds(rung)
        where = search["confirm_rung"] or search["rung"]
        last = sum(
            MARGIN * max(state.expected_seconds(where, c), state.expected_seconds(where))
            for c in kept
        )
        nproc = [self.config["rungs"][r].get("nproc", 1) for r in (rung, where)]
        more = ((spent["running"] + more_runs) * expected * nproc[0] + last * nproc[1]) / 60
        if budget["runs"] and spent["runs"] + more_runs + len(kept) > budget["runs"]:
            return (
                f"runs: {spent['runs']:.0f} of {budget['runs']} used"
                + f", {len(kept)} in reserve" * reserve
            )
        if budget["minutes"] and spent["minutes"] + more > budget["minutes"]:
            return (
                f"minutes: {spent['minutes']:.1f} of {budget['minutes']} used, a run takes {expected / 60:.1f}"
                + f", {last * nproc[1] / 60:.1f} in reserve" * reserve
            )
        if budget["deadline"] and time.time() + more * 60 / self.config["loop"][
            "workers"
        ] > seconds_of(budget["deadline"]):
            return f"deadline {budget['deadline']} " + (
                "is too near" if now() < budget["deadline"] else "has passed"
            )
        free = shutil.disk_usage(self.folder).free / 2**30
        return (
            f"disk: {free:.1f} GiB free, want {budget['disk_gib']}"
            if free < budget["disk_gib"]
            else ""
        )

    def launch(self):
        """Start wanted runs while there are workers and budget; sentinels and studies before the search."""
        todo = [r for r in self.state.runs.values() if not r.started]
        for run in todo[: max(0, self.config["loop"]["workers"] - len(self.running()))]:
            study = (
                self.state.experiments[run.exp].kind in STUDIES
            )  # the reserve is there to be used
            if reason := self.exhausted(run.rung, 0 if study else 1):
                if not self.running():
                    self.record("stopped", reason=reason)
                return
            self.record("started", key=run.key)
            self.runs.start(self.order(run.key))

    # Decisions.
    def decide(self) -> bool:
        """One decision that the state allows; False when there is nothing to do but wait."""
        before = self.state.events
        for x in self.state.open():
            getattr(self, "step_" + x.kind)(x)
        due = len(self.state.searches()) // self.config["loop"]["meta_every"]
        if due > len(self.state.metas):
            self.record(
                "meta", meta=skill_review.summarise(self.state, self.space, len(self.state.metas) + 1)
            )
        if self.state.events == before and not self.state.stopped:
            self.next_question()
        return self.state.events > before

    def next_question(self):
        """Open the next experiment: sentinel, study or proposal; or stop with the reason."""
        state, search = self.state, self.config["search"]["rung"]
        if not any(x.kind == "sentinel" for x in state.experiments.values()):
            return self.open(
                "sentinel",
                {},
                search,
                seeds=self.config["seeds"]["search"][: self.sentinels(search)],
            )
        if state.open("sentinel", *STUDIES):
            return
        if search not in state.reference:
            return self.record(
                "stopped",
                reason="the base configuration does not run: "
                + next(x for x in state.experiments.values()).verdict["reason"],
            )
        if not state.open():
            if (
                self.open_ablation()
                or self.open_pair()
                or self.open_confirm()
                or self.open_retest()
                or self.open_promotion()
            ):
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
        """Why no further search experiment may start; empty while one may. Runs to confirm a claim stay in reserve."""
        budget, done = (
            self.config["budget"],
            len(self.state.searches()) + len(self.state.open("search")),
        )
        if done >= budget["experiments"]:
            return f"experiments: {done} of {budget['experiments']} done"
        return self.exhausted(self.config["search"]["rung"], reserve=True)

    # The search.
    def next_seed(self, change: dict, rung: str) -> int | None:
        """The first search seed that a configuration has not run with."""
        return next(
            (
                s
                for s in self.config["seeds"]["search"]
                if self.state.run_of(change, rung, s) is None
            ),
            None,
        )

    def step_search(self, x: Experiment):
        """One run; more only while a race on a noisy rung is open. May move the anchor."""
        state, seeds = self.state, self.config["seeds"]["search"]
        asked = [
            (c, g, s)
            for c in (x.change, state.anchor)
            for g, s in [(x.rung, s) for s in seeds]
            if state.run_of(c, g, s)
        ]
        if not any(
            config_id(c) == config_id(state.anchor) for c, _, _ in asked
        ):  # an ablation's anchor never ran here
            asked.append((state.anchor, x.rung, seeds[0]))
        wanted = [(x.change, x.rung, s) for s in x.seeds] + asked
        found = self.gather(x, wanted)
        if found is None:
            return
        noise = state.noise(x.rung)
        old = next(s for c in (state.anchor, state.champion, {}) if (s := state.scores(c, x.rung)))
        failed = next(
            (
                r
                for w, y in zip(wanted, found)
                if y is None and w[0] == x.change and (r := state.run_of(*w))
            ),
            None,
        )
        if failed:
            cut = (
                failed.forecast["middle"] - sum(old) / len(old)
                if failed.forecast and (failed.record["status"] == "pruned")
                else None
            )
            return self.close(
                x,
                "reject",
                f"{failed.record['status']}: {failed.record['reason']}",
                delta=cut,
                sigma=noise.sigma,
            )
        new = state.scores(x.change, x.rung, seeds)
        if self.config["search"]["anchor"] == "greedy":
            step = "move" if new[0] < min(old) else "stay"
        else:
            step = comparison.anchor_step(new, old, noise.sigma, self.config["search"]["race_above"])
        if step in ("new", "anchor"):
            change = x.change if step == "new" else state.anchor
            seed = self.next_seed(change, x.rung)
            if seed is not None and not self.exhausted(x.rung, reserve=True):
                return self.want(x, change, x.rung, seed)
            step = comparison.anchor_step(
                new, old, noise.sigma, noise.sigma
            )  # no race can be paid: one margin decides
        delta = sum(new) / len(new) - sum(old) / len(old)
        more = dict(delta=delta, sigma=noise.sigma, runs=len(new), anchor_before=state.anchor)
        if step == "move":
            return self.close(
                x, "tentative", f"{delta:+.4f} against the anchor", anchor_after=x.change, **more
            )
        self.close(x, "reject", f"{delta:+.4f} against the anchor, noise {noise.sigma:.4f}", **more)

    def open_search(self):
        """Take the next hypothesis of a person, an agent or the sampler that is new and feasible."""
        for _ in range(3 * sampler.REDRAWS):
            from . import agent

            found = agent.next_hypothesis(self) or self.numeric()
            if found is None:
                break
            change, cid = found["change"], config_id(found["change"])
            if reason := self.refusal(change):
                plan = self.state.plans[cid]
                self.record(
                    "refused",
                    proposal=found
                    | dict(
                        infeasible=True,
                        reason=reason,
                        at=len(self.state.experiments),
                        oversize="bytes" in plan and not plan["ok"],
                    ),
                )
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
            self.record(
                "stopped", reason=f"no new feasible proposal in {3 * sampler.REDRAWS} draws"
            )

    def refusal(self, change: dict) -> str:
        """Why a change must not start, by what the script foretells of it; empty when it may."""
        for wanted in (change, {}) if self.config["search"]["max_flops"] else (change,):
            if config_id(wanted) not in self.state.plans:
                env = self.space.resolve(wanted, self.rung(self.config["search"]["rung"]))
                self.record("planned", cid=config_id(wanted), plan=self.plan(wanted, env))
        return self.infeasible(config_id(change)) or self.costly(config_id(change))

    def numeric(self) -> dict | None:
        """The sampler's next proposal."""
        found = sampler.propose(self.state, self.space)
        return found and dict(skill=found[0], change=found[1], source="sampler")

    def run_plan(self, change: dict, env: dict) -> dict:
        """What the script itself foretells."""
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return space_module.plan(self.script(change), env, scratch)

    def infeasible(self, cid: str) -> str:
        """Why a planned configuration must not start: refused by the script, or larger than the budget by more than
        past predictions were wrong."""
        plan = self.state.plans[cid]
        if plan["ok"] or "bytes" not in plan:
            return "" if plan["ok"] else plan["reason"]
        ratios = sorted(
            r.record["artifact_bytes"] / p["bytes"]
            for c, p in self.state.plans.items()
            if p.get("bytes")
            for (i, _, _), r in self.state.by_place.items()
            if i == c and r.record and r.record["artifact_bytes"]
        )
        expected = plan["bytes"] * (ratios[len(ratios) // 2] if ratios else 1.0)
        error = plan["bytes"] * ((ratios[-1] - ratios[0]) / 2 if len(ratios) > 1 else 0.01)
        over = expected - error - self.config["budget"]["artifact_bytes"]
        return plan["reason"] if over > 0 else ""

    def costly(self, cid: str) -> str:
        """Why a planned configuration would win only by computing more than the base: on a rung of equal tokens, more
        operations per token are more time."""
        limit, plans = self.config["search"]["max_flops"], self.state.plans
        base, mine = (plans.get(i, {}).get("flops", 0.0) for i in (config_id({}), cid))
        return (
            f"{mine / base:.2f} times the base's operations per token, the limit is {limit:g}"
            if (limit and base and mine > limit * base * 1.001)
            else ""
        )

    # The tick.
    def tick(self) -> bool:
        """Reap, judge, learn, propose, start. True when anything happened. Raises ForgeError when another decider is
        at work."""
        with locked(
            self.folder / "tick.lock", busy=f"{self.folder.name}: another decider is at work"
        ):
            self.catch_up()
            return self.locked_tick()

    def catch_up(self):
        """Take in what other commands recorded between two ticks."""
        if self.ledger.count() > self.state.events:
            for event in self.ledger.read()[self.state.events :]:
                self.state.apply(event)
            self._space = None  # a skill may have been added

    def locked_tick(self) -> bool:
        before = self.state.events
        if self.asked:
            self.asked.over()
        self.sync_config()
        self.ingest()
        self.foretell()
        while self.decide():
            pass
        if not self.state.stopped:
            self.launch()
        return self.state.events > before

    def sync_config(self):
        """Take in what the user changed in campaign.toml; code, data and base belong to the campaign for good."""
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
        end, quick = time.monotonic() + (seconds or 1e12), 0.02
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
            if self.asked:
                from . import agent

                agent.finish(self, "the loop ended before it answered")


# ---- Beginning -------------------------------------------------------------------------------------------------------
DEFAULTS: dict[str, dict[str, Any]] = dict(
    search=dict(
        rung="screen",
        confirm_rung="",
        promote_to="",
        anchor="sigma",
        race_above=0.0025,
        max_flops=0.0,
    ),
    loop=dict(
        workers=1,
        meta_every=5,
        confirm="large",
        confirm_every=20,
        ablation=True,
        lease_s=300.0,
        forecasts=True,
    ),
    seeds=dict(search=list(range(1, 21)), judge=list(range(101, 106)), fresh_from=1001),
    budget=dict(
        experiments=40,
        minutes=0.0,
        runs=0,
        deadline="",
        disk_gib=1.0,
        artifact_bytes=16_000_000,
        agent_calls=0,
        agent_dollars=0.0,
    ),
    agent=dict(cmd="", share=0.3, timeout_s=300.0, dollars_per_call=0.0, allow_unsandboxed=False),
)
CHOICES = dict(confirm=("large", "end"), anchor=("sigma", "greedy"))
AT_LEAST_ONE = ("workers", "meta_every", "confirm_every")


HEAD = """\
# A campaign's limits. Edit at any time, also while it runs; name, seed, code and base are fixed. 0 or "" is no limit.
# rungs: kill_s ends a run by force; env is added to every run; tokens, if given, makes runs equal in tokens.
# search: rung of the search; confirm_rung "" is the same; anchor "sigma" or "greedy"; race_above is a noise;
#   max_flops refuses what needs more operations per token than this times the base's (0 = no limit).
# loop: confirm "large" tests a large gain at once, "end" only when the budget is used; forecasts end hopeless runs
#   of the search halfway.

"""


def read_config(path: Path) -> dict:
    """A campaign.toml with every default filled in. Raises ForgeError naming what is wrong."""
    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ForgeError(f"{path.name}: {error}") from None
    errors = [
        f"{path.name}: unknown table [{t}]"
        for t in set(found)
        - set(DEFAULTS)
        - {"name", "seed", "base", "rungs", "code", "data_print"}
    ]
    config = dict(found)
    for table, defaults in DEFAULTS.items():
        mine = found.get(table, {})
        errors += [
            f"{path.name}: unknown [{table}] {k}; known: {', '.join(defaults)}"
            for k in set(mine) - set(defaults)
        ]
        for k, v in mine.items():
            kind = type(defaults.get(k, v))
            if not isinstance(v, (int, float) if kind in (int, float) else kind):
                errors.append(f"{path.name}: [{table}] {k} = {v!r}: want a {kind.__name__}")
            elif isinstance(v, (int, float)) and not v >= (least := int(k in AT_LEAST_ONE)):
                errors.append(f"{path.name}: [{table}] {k} = {v!r}: want {least} or more")
            elif v not in CHOICES.get(k, [v]):
                errors.append(
                    f"{path.name}: [{table}] {k} = {v!r}: want one of {', '.join(CHOICES[k])}"
                )
        config[table] = defaults | mine
    for name in (
        config["search"]["rung"],
        config["search"]["confirm_rung"],
        config["search"]["promote_to"],
    ):
        if name and name not in found.get("rungs", {}):
            errors.append(
                f"{path.name}: rung {name!r} is not among [rungs.*]: {', '.join(found.get('rungs', {}))}"
            )
    for name, rung in found.get("rungs", {}).items():
        if not isinstance(rung.get("kill_s"), (int, float)) or rung["kill_s"] <= 0:
            errors.append(f"{path.name}: [rungs.{name}] kill_s must be a number of seconds above 0")
        errors += [
            f"{path.name}: [rungs.{name}] {k} = {v!r}: want a number named {', '.join(RUNG)}"
            for k, v in rung.items()
            if k != "env" and (k not in RUNG or not isinstance(v, (int, float)))
        ]
    try:
        seconds_of(config["budget"]["deadline"] or now())
    except ValueError:
        errors.append(
            f"{path.name}: [budget] deadline {config['budget']['deadline']!r}: want 2026-12-01T08:00:00Z"
        )
    seeds = config["seeds"]
    if (
        set(seeds["search"]) & set(seeds["judge"])
        or max(*seeds["search"], *seeds["judge"]) >= seeds["fresh_from"]
    ):
        errors.append(f"{path.name}: search, judge and fresh seeds must not overlap")
    if len(seeds["judge"]) < max(comparison.LOOKS) or len(seeds["search"]) < 3:
        errors.append(
            f"{path.name}: want at least {max(comparison.LOOKS)} judge seeds and 3 search seeds"
        )
    if errors:
        raise ForgeError("\n".join(sorted(errors)))
    return config


def seconds_of(moment: str) -> float:
    """A UTC text such as 2026-12-01T08:00:00Z in seconds of time.time(). Raises ValueError."""
    return float(calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ")))


def to_toml(value: dict, prefix: str = "") -> str:
    """Nested tables of plain values as TOML."""
    lines = [f"[{prefix}]"] if prefix else []
    lines += [f"{k} = {json.dumps(v)}" for k, v in value.items() if not isinstance(v, dict)]
    tables = [
        to_toml(v, f"{prefix}.{k}" if prefix else k)
        for k, v in value.items()
        if isinstance(v, dict)
    ]
    return "\n".join(lines) + "\n\n" + "".join(tables)


def add_code(folder: Path, script: Path, data: Path | None = None) -> str:
    """Keep a script by content in code/<sha>/, read-only; returns its name. `data` is linked beside it."""
    sha = file_digest(script)[:12]
    place = folder / "code" / sha
    if not (place / "train_gpt.py").exists():
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / "train_gpt.py", script.read_bytes())
        (place / "train_gpt.py").chmod(0o444)
    if data and data.is_dir() and not (place / "data").exists():
        with contextlib.suppress(FileExistsError):
            (place / "data").symlink_to(data.resolve())
    return sha


def create(
    folder: Path, script: Path, skills: Path, config: dict, without: Sequence[str] = ()
) -> Campaign:
    """Begin a campaign in an empty folder, with all skills but some; nothing is left behind when the configuration is
    refused."""
    folder, known = Path(folder), {p.parent.name for p in skills.glob("*/SKILL.md")}
    if unknown := sorted(set(without) - known):
        raise ForgeError(
            f"--without {', '.join(unknown)}: want a skill of {', '.join(sorted(known))}"
        )
    if (folder / "events.jsonl").exists():
        raise ForgeError(f"{folder.name} already holds a campaign; go on with `run`")
    if not script.is_file():
        raise ForgeError(f"{script.name}: no such script")
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        code = add_code(folder, script, script.parent / "data")
        config = (
            dict(name=folder.name, seed=1)
            | config
            | dict(
                code=code,
                data_print=data_print(
                    space_module.located(
                        dict(DATA_PATH="auto") | config.get("base", {}),
                        folder / "code" / code / "train_gpt.py",
                    )["DATA_PATH"]
                ),
            )
        )
        write_atomic(folder / "campaign.toml", to_toml(config))
        config = read_config(folder / "campaign.toml")
        described = space_module.describe(folder / "code" / code / "train_gpt.py", config["base"])
        if tokens := config["rungs"][config["search"]["rung"]].get(
            "tokens"
        ):  # what counts steps is a part of these
            described["values"]["ITERATIONS"] = max(
                1, tokens // described["values"]["TRAIN_BATCH_TOKENS"]
            )
        Space.build(described, load_skills(skills), config["base"])
        write_atomic(folder / "code" / code / "knobs.json", json.dumps(described))
        shutil.copytree(
            skills,
            folder / "skills",
            dirs_exist_ok=True,
            ignore=lambda at, names: set(without) & set(names) if Path(at) == skills else (),
        )
        (folder / "runs").mkdir(exist_ok=True)
        write_atomic(folder / "campaign.toml", HEAD + to_toml(config))
    except (ForgeError, OSError) as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise (
            error
            if isinstance(error, ForgeError)
            else ForgeError(f"{folder.name}: {error.strerror}")
        ) from None
    Ledger(folder / "events.jsonl").append("created", config=config)
    return Campaign(folder)

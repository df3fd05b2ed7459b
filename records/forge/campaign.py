"""The loop: one idempotent tick reaps, judges, learns, proposes and starts. Everything decided is an event; a tick that
is killed anywhere is repeated by the next one from the ledger alone, with the same decisions.
"""
import calendar
import contextlib
import json
import shutil
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Sequence

from . import ForgeError, judge, ladder, meta, propose, runner, space as space_module
from .ledger import Ledger, digest, file_digest, locked, now, write_atomic
from .space import CODE, Space, config_id
from .state import Experiment, replay

RUNG = ("kill_s", "tokens", "stall_s", "sentinel_runs", "prior_sigma", "nproc")  # and env, a table of knobs
STUDIES = ("confirm", "ablation", "compose", "pair", "promote", "closing", "retest")
FRESH_STUDIES = tuple(k for k in STUDIES if k != "promote")  # each has fresh seeds of its own
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # of a 2x2: both changes, the first, the second, none
MARGIN = 1.15  # of the reserve: runs do not all take equally long
KEPT = ("status", "reason", "attempt", "exit_code", "log_sha256")  # of a run's record, in the ledger


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


class Campaign:
    """A folder with its ledger. `runs` starts and polls runs; `plan` foretells feasibility; tests replace both."""

    def __init__(self, folder: Path, runs=None, ledger: Ledger | None = None,
                 plan: Callable[[dict, dict], dict] | None = None):
        self.folder = Path(folder).resolve()
        self.ledger = ledger or Ledger(self.folder / "events.jsonl")
        self.state = replay(self.ledger.read())
        if not self.state.config:
            raise ForgeError(f"{self.folder.name}: no campaign here; begin one with `init`")
        self.runs = runs or runner.LocalRunner(self.folder / "runs")
        self.plan = plan or self.run_plan
        self._space: Space | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    def record(self, event: str, **data):
        """Append an event and take it in."""
        self.state.apply(self.ledger.append(event, **data))

    def script(self, change: dict | None = None) -> Path:
        """The code that a change runs on, by content."""
        return self.folder / "code" / ((change or {}).get(CODE) or self.config["code"]) / "train_gpt.py"

    @property
    def space(self) -> Space:
        """The search space; knobs of the script are read once per code and kept beside it."""
        code = self.state.anchor.get(CODE) or self.config["code"]
        if self._space is None or self._space_code != code:
            cache = self.folder / "code" / code / "knobs.json"
            if not cache.exists():
                write_atomic(cache, json.dumps(space_module.describe(self.script(self.state.anchor),
                                                                     self.config["base"])))
            fixed = self.config["rungs"][self.config["search"]["rung"]].get("env", {})  # no change could reach these
            skills = {s: {n: k for n, k in table.items() if n not in fixed} for s, table in load_skills(
                self.folder / "skills").items()}
            self._space = Space.build(json.loads(cache.read_text()), skills, self.config["base"])
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
            key = digest(dict(env=env, code=change.get(CODE) or self.config["code"], data=self.config["data_print"],
                              rung=rung, seed=seed, repeat=0))
            if key in self.state.runs:  # another change with the same environment on this rung: share its run
                self.state.by_place[config_id(change), rung, seed] = self.state.runs[key]
                return
            self.record("wanted", key=key, exp=x.id, change=change, rung=rung, seed=seed, env=env)

    def gather(self, x: Experiment, wanted: list[tuple[dict, str, int]]) -> list[float | None] | None:
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
        return dict(key=key, exp=run.exp, env=run.env, rung=run.rung, seed=run.seed,
                    script=str(self.script(run.change)), code=run.change.get(CODE) or self.config["code"],
                    kill_s=rung["kill_s"], stall_s=rung.get("stall_s", 300), nproc=rung.get("nproc", 1),
                    seconds=self.clock(run.env),
                    device_env=device, sandbox=self.sandbox(run.change, key), ordered=now(),
                    batch_tokens=int(run.env.get("TRAIN_BATCH_TOKENS",
                                                 self.space.base_values.get("TRAIN_BATCH_TOKENS", 0))),
                    artifact_bytes=self.config["budget"]["artifact_bytes"])

    def clock(self, env: dict) -> float:
        """Seconds after which a run of this environment ends its training; 0 when it ends by its steps."""
        return float(env.get("MAX_WALLCLOCK_SECONDS", self.space.base_values.get("MAX_WALLCLOCK_SECONDS", 0.0)))

    def foretell(self):
        """Forecast every first run of a search experiment once, halfway, and end those that will hardly beat the
        anchor. Runs that judge, confirm or repeat are never cut short, and every fifth hopeless one runs on, by lot, so
        that forecasts are scored on good and bad runs alike."""
        state = self.state
        for run in self.running() if self.config["loop"]["forecasts"] else ():
            x = state.experiments[run.exp]
            if run.forecast or x.kind != "search" or (config_id(run.change), run.seed) != (x.cid, x.seeds[0]):
                continue
            reading = self.runs.partway(run.key)
            seen = [(r.record["partway"], r.score) for r in state.runs.values() if r.rung == run.rung
                    and r.score is not None and r.record.get("partway")]
            bar = state.scores(state.anchor, run.rung)
            found = ladder.forecast(seen, reading, sum(bar) / len(bar)) if reading and bar else None
            if found:
                hopeless = found["chance"] < ladder.HOPELESS and ladder.trusted(state)
                stop = hopeless and int(digest([self.config["seed"], run.key]), 16) % 5 > 0
                self.record("forecast", key=run.key, forecast=found | dict(stop=stop))
                if stop:
                    self.runs.prune(run.key, f"forecast {found['middle']:.4f} [{found['low']:.4f}, "
                                    f"{found['high']:.4f}], the anchor has {sum(bar) / len(bar):.4f}")

    def sandbox(self, change: dict, key: str) -> list[str]:
        """The command in front of patched code; nothing for the campaign's own code."""
        if CODE not in change:
            return []
        from . import guard
        return guard.sandbox(self.folder / "runs" / key, self.config["agent"].get("allow_unsandboxed", False))

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
        kept = {k: record.get(k) for k in KEPT} | {k: m.get(k) for k in (
            "val_bpb", "val_loss", "val_bpb_prequant", "steps", "train_s", "step_ms", "artifact_bytes", "wall_s",
            "params", "partway")}
        kept |= dict(bpb=kept.pop("val_bpb"), host=record["host"]["class"], val=[record["data"].get(k) for k in (
            "val_tokens", "val_bytes", "tokenizer_sha256")])
        kept["wall_s"] = kept["wall_s"] or 0.0
        wanted = self.state.reference.get(run.rung, {}).get("val") or next(
            (r["val"] for r in self.state.reference.values()), None)
        if kept["status"] == "ok" and wanted and kept["val"] != wanted:
            kept |= dict(status="tampered", reason=f"scored {kept['val'][:2]} tokens and bytes, not {wanted[:2]}")
        here = self.state.reference.get(run.rung, {}).get("host", kept["host"])
        if kept["status"] == "ok" and kept["host"] != here:
            kept |= dict(status="invalid", reason=f"ran on {kept['host']}; this rung is measured on {here}")
        if kept["status"] == "ok" and CODE in run.change:
            from . import guard
            reason = guard.rescore(self.script(), self.folder / "runs" / run.key, record)
            if reason:
                kept |= dict(status="tampered", reason=reason)
        return kept

    # Budgets.
    def spent(self) -> dict[str, float]:
        """What was used so far."""
        running = len(self.running())
        return dict(minutes=self.state.minutes(), runs=sum(r.started for r in self.state.runs.values()),
                    running=running, experiments=len(self.state.searches()), agent_calls=len(self.state.agent_calls),
                    agent_dollars=sum(c.get("dollars", 0.0) for c in self.state.agent_calls))

    def reserve(self) -> list[dict]:
        """Configurations of the runs that stay in reserve: those that confirm the anchor and, when the champion was
        tested against an earlier one, those that compare the last champion with the base."""
        arms = [self.state.anchor, self.state.champion] + ([self.state.anchor, {}] if self.state.champion else [])
        return arms * judge.FRESH

    def exhausted(self, rung: str, more_runs: int = 1, reserve: bool = False) -> str:
        """Why `more_runs` further runs on a rung (and the reserve behind them) would break a budget; empty when they
        fit."""
        budget, spent, state, search = self.config["budget"], self.spent(), self.state, self.config["search"]
        kept, expected = self.reserve() if reserve else [], state.expected_seconds(rung)
        where = search["confirm_rung"] or search["rung"]
        last = sum(MARGIN * max(state.expected_seconds(where, c), state.expected_seconds(where)) for c in kept)
        nproc = [self.config["rungs"][r].get("nproc", 1) for r in (rung, where)]
        more = ((spent["running"] + more_runs) * expected * nproc[0] + last * nproc[1]) / 60
        if budget["runs"] and spent["runs"] + more_runs + len(kept) > budget["runs"]:
            return f"runs: {spent['runs']:.0f} of {budget['runs']} used" + f", {len(kept)} in reserve" * reserve
        if budget["minutes"] and spent["minutes"] + more > budget["minutes"]:
            return (f"minutes: {spent['minutes']:.1f} of {budget['minutes']} used, a run takes {expected / 60:.1f}"
                    + f", {last * nproc[1] / 60:.1f} in reserve" * reserve)
        if budget["deadline"] and time.time() + more * 60 / self.config["loop"]["workers"] > seconds_of(
                budget["deadline"]):
            return f"deadline {budget['deadline']} " + ("is too near" if now() < budget["deadline"] else "has passed")
        free = shutil.disk_usage(self.folder).free / 2**30
        return f"disk: {free:.1f} GiB free, want {budget['disk_gib']}" if free < budget["disk_gib"] else ""

    def launch(self):
        """Start wanted runs while there are workers and budget; sentinels and studies before the search."""
        todo = [r for r in self.state.runs.values() if not r.started]
        for run in todo[:max(0, self.config["loop"]["workers"] - len(self.running()))]:
            study = self.state.experiments[run.exp].kind in STUDIES  # the reserve is there to be used
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
            self.record("meta", meta=meta.summarise(self.state, self.space, len(self.state.metas) + 1))
        if self.state.events == before and not self.state.stopped:
            self.next_question()
        return self.state.events > before

    def next_question(self):
        """Open the next experiment: sentinel, study or proposal; or stop with the reason."""
        state, search = self.state, self.config["search"]["rung"]
        if not any(x.kind == "sentinel" for x in state.experiments.values()):
            return self.open("sentinel", {}, search, seeds=self.config["seeds"]["search"][:self.sentinels(search)])
        if state.open("sentinel", *STUDIES):
            return
        if search not in state.reference:
            return self.record("stopped", reason="the base configuration does not run: "
                               + next(x for x in state.experiments.values()).verdict["reason"])
        if not state.open():
            if (self.open_ablation() or self.open_pair() or self.open_confirm() or self.open_retest()
                    or self.open_promotion()):
                return
        if len(state.open("search")) < self.config["loop"]["workers"]:
            reason = self.search_over()
            if not reason:
                self.open_search()
            elif not state.open() and not self.open_closing():
                self.record("stopped", reason=reason)

    def sentinels(self, rung: str) -> int:
        return self.config["rungs"][rung].get("sentinel_runs", 3)

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
        budget, done = self.config["budget"], len(self.state.searches()) + len(self.state.open("search"))
        if done >= budget["experiments"]:
            return f"experiments: {done} of {budget['experiments']} done"
        return self.exhausted(self.config["search"]["rung"], reserve=True)

    # What each kind of experiment needs, and its verdict.
    def step_sentinel(self, x: Experiment):
        """The base configuration on a few seeds: noise, time, size, and what must be scored."""
        scores = self.gather(x, [(x.change, x.rung, s) for s in x.seeds])
        if scores is None:
            return
        runs = [self.state.run_of(x.change, x.rung, s).record for s in x.seeds]
        bad = [r for r in runs if r["status"] != "ok"]
        if bad:
            return self.close(x, "failed", f"{bad[0]['status']}: {bad[0]['reason']}")
        middle = {k: sorted(r[k] or 0 for r in runs)[len(runs) // 2] for k in ("steps", "wall_s", "artifact_bytes")}
        measured = dict(scores=scores, val=runs[0]["val"], host=runs[0]["host"], code=self.config["code"],
                        ratio=runs[0]["bpb"] / runs[0]["val_loss"], **middle)
        self.close(x, "measured", f"{len(scores)} runs of the base configuration", measured=measured)

    def next_seed(self, change: dict, rung: str) -> int | None:
        """The first search seed that a configuration has not run with."""
        return next((s for s in self.config["seeds"]["search"] if self.state.run_of(change, rung, s) is None), None)

    def step_search(self, x: Experiment):
        """One run; more only while a race on a noisy rung is open. May move the anchor."""
        state, seeds = self.state, self.config["seeds"]["search"]
        asked = [(c, g, s) for c in (x.change, state.anchor) for g, s in [(x.rung, s) for s in seeds]
                 if state.run_of(c, g, s)]
        if not any(config_id(c) == config_id(state.anchor) for c, _, _ in asked):  # an ablation's anchor never ran here
            asked.append((state.anchor, x.rung, seeds[0]))
        wanted = [(x.change, x.rung, s) for s in x.seeds] + asked
        found = self.gather(x, wanted)
        if found is None:
            return
        noise = state.noise(x.rung)
        old = next(s for c in (state.anchor, state.champion, {}) if (s := state.scores(c, x.rung)))
        failed = next((r for w, y in zip(wanted, found) if y is None and w[0] == x.change
                       and (r := state.run_of(*w))), None)
        if failed:
            cut = failed.forecast["middle"] - sum(old) / len(old) if failed.forecast and (
                failed.record["status"] == "pruned") else None
            return self.close(x, "reject", f"{failed.record['status']}: {failed.record['reason']}", delta=cut,
                              sigma=noise.sigma)
        new = state.scores(x.change, x.rung, seeds)
        if self.config["search"]["anchor"] == "greedy":
            step = "move" if new[0] < min(old) else "stay"
        else:
            step = judge.anchor_step(new, old, noise.sigma, self.config["search"]["race_above"])
        if step in ("new", "anchor"):
            change = x.change if step == "new" else state.anchor
            seed = self.next_seed(change, x.rung)
            if seed is not None and not self.exhausted(x.rung, reserve=True):
                return self.want(x, change, x.rung, seed)
            step = judge.anchor_step(new, old, noise.sigma, noise.sigma)  # no race can be paid: one margin decides
        delta = sum(new) / len(new) - sum(old) / len(old)
        more = dict(delta=delta, sigma=noise.sigma, runs=len(new), anchor_before=state.anchor)
        if step == "move":
            return self.close(x, "tentative", f"{delta:+.4f} against the anchor", anchor_after=x.change, **more)
        self.close(x, "reject", f"{delta:+.4f} against the anchor, noise {noise.sigma:.4f}", **more)

    def open_sentinel(self, rung: str) -> str:
        """Open the measurement of the base on a rung; returns its name. Raises ForgeError when there is one or no such
        rung."""
        if rung not in self.config["rungs"]:
            raise ForgeError(f"rung {rung!r}: want one of {', '.join(self.config['rungs'])}")
        if rung in self.state.reference or any(x.rung == rung for x in self.state.open("sentinel")):
            raise ForgeError(f"rung {rung}: the base is measured there already")
        return self.open("sentinel", {}, rung, seeds=self.config["seeds"]["search"][:self.sentinels(rung)])

    def promote(self, name: str, rung: str) -> str:
        """Open a run of an experiment's configuration on another rung, behind the base's own there; returns its
        name. Raises ForgeError."""
        x = self.state.experiments.get(name)
        if x is None or not x.change:
            raise ForgeError(f"{name}: want an experiment that changes something")
        if rung not in self.state.reference and not any(s.rung == rung for s in self.state.open("sentinel")):
            self.open_sentinel(rung)
        return self.open("promote", x.change, rung, skill=x.skill, seeds=self.config["seeds"]["search"][:1],
                         source="human", text=f"{name}: asked for")

    def open_confirm(self, asked_for: bool = False) -> bool:
        """Put the anchor's claim to the test when it is asked for, its gain is large, it is overdue, or nothing else
        can be afforded."""
        state, loop, rung = self.state, self.config["loop"], self.config["search"]["rung"]
        rival, slimmer = self.rival(), state.anchor.items() < state.champion.items()
        if config_id(state.anchor) in (config_id(state.champion), config_id(rival)):
            return False
        since = next((i for i, x in enumerate(reversed(list(state.experiments.values()))) if x.kind == "confirm"),
                     len(state.experiments))
        noise, old, new = state.noise(rung), state.scores(state.champion, rung), state.scores(state.anchor, rung)
        gain = sum(old) / len(old) - sum(new) / len(new) if old and new and not slimmer else 0.0
        over = "asked for" if asked_for else self.search_over()
        large = loop["confirm"] != "end" and gain > 3 * judge.minimal_gain(rung, noise)
        if not (over or large or loop["confirm"] != "end" and since >= loop["confirm_every"]):
            return False
        where = self.config["search"].get("confirm_rung") or rung
        if self.exhausted(where, 2 * judge.FRESH):
            return False
        short = bool(self.exhausted(where, 2 * judge.FRESH + 4))
        self.open("confirm", state.anchor, where, parent=rival, seeds=self.fresh_seeds(),
                  text="fresh seeds only: the reserve is all that is left" if short else
                  "the champion with fewer changes" if slimmer else over or "the gain is large",
                  factors=[] if slimmer else self.factors(), source="reserve" if short else "judge")
        return True

    def rival(self) -> dict:
        """What the anchor must beat: the champion or, when it is the champion less some changes, what that one beat. A
        test of gain would always refute a simplification, and one of equality takes 49 runs per arm."""
        state = self.state
        won = [x.parent for x in state.experiments.values() if x.kind == "confirm" and x.verdict
               and x.verdict["verdict"] == "confirmed" and x.cid == config_id(state.champion)]
        return won[-1] if won and state.anchor.items() < state.champion.items() else state.champion

    def open_closing(self) -> bool:
        """At the end, the last champion against the base on fresh seeds, unless that is what confirmed it."""
        state = self.state
        won = [x for x in state.experiments.values() if x.kind in ("confirm", "closing") and x.verdict
               and config_id(x.change) == config_id(state.champion)]
        if not state.champion or any(not x.parent for x in won) or self.exhausted(won[-1].rung, 2 * judge.FRESH):
            return False
        self.open("closing", state.champion, won[-1].rung, parent={}, seeds=self.fresh_seeds(), source="judge",
                  text="what the campaign gained in all")
        return True

    def open_retest(self) -> bool:
        """A proven claim without new evidence for long is tested once more, on the present anchor: never a second
        time."""
        done = {x.factors[0]["claim"] for x in self.state.experiments.values() if x.kind == "retest"}
        for claim in meta.claims(self.state) if self.state.evidence else ():
            if (claim["status"], claim["was"]) == ("stale", "proven") and claim["claim"] not in done:
                new, old = (self.space.normal(toggled(self.state.anchor, [claim], [sign])) for sign in (1, -1))
                if new != old and not self.exhausted(claim["rung"], 2 * judge.FRESH, reserve=True):
                    self.open("retest", new, claim["rung"], parent=old, skill=claim["skill"], seeds=self.fresh_seeds(),
                              factors=[{k: claim[k] for k in ("claim", "skill", "knobs")}], source="judge",
                              text=f"{claim['id']} is stale")
                    return True
        return False

    def step_closing(self, x: Experiment):
        """Six runs on fresh seeds that move nothing: what the report says of the champion, or evidence for a claim."""
        arms = [self.gather(x, [(c, x.rung, s) for s in x.seeds]) for c in (x.change, x.parent)]
        if None in arms:
            return
        new, old = ([y for y in arm if y is not None] for arm in arms)
        if not new or not old:
            return self.close(x, "failed", "the runs on fresh seeds failed")
        better, test = judge.fresh_test(new, old, self.state.noise(x.rung))
        against = f"{x.text}: {test.delta:+.4f}" if x.factors else f"{test.delta:+.4f} against the base"
        self.close(x, "upheld" if better else "not upheld", f"{against}, p {test.p:.4f}", seeds_used=x.seeds,
                   scores_new=new, scores_old=old, evidence=[self.comparison(f, test, x) for f in x.factors],
                   **self.numbers(test))

    step_retest = step_closing

    def fresh_seeds(self) -> list[int]:
        """Seeds that no experiment has had."""
        first = self.config["seeds"]["fresh_from"] + judge.FRESH * sum(
            x.kind in FRESH_STUDIES for x in self.state.experiments.values())
        return list(range(first, first + judge.FRESH))

    def compose(self, changes: list[dict]) -> str:
        """Open an interaction test of several changes of the anchor that were named by hand; returns its name. Raises
        ForgeError when they overlap or are not 2 to 11."""
        values, factors = self.space.values(self.state.anchor), []
        for change in map(self.space.normal, changes):
            knobs = {n: [values[n], v] for n, v in change.items() if values[n] != v}
            twice = set(knobs) & {n for f in factors for n in f["knobs"]}
            if twice or not knobs:
                raise ForgeError(f"{', '.join(sorted(twice))}: in two changes" if twice else "a change changes nothing")
            skill = self.space.knobs[min(knobs)].skill
            factors.append(dict(exp="hand", skill=skill, knobs=knobs, claim=meta.claim_name(skill, knobs, self.space)))
        if not 2 <= len(factors) <= 11:
            raise ForgeError(f"{len(factors)} changes: want 2 to 11")
        whole = self.space.normal(toggled(self.state.anchor, factors, [1] * len(factors)))
        return self.open("compose", whole, self.config["search"]["rung"], parent=self.state.anchor, source="human",
                         seeds=self.fresh_seeds(), factors=factors, text="which of these help together")

    def factors(self) -> list[dict]:
        """The chapter's moves as independent switches: which knobs, from what, to what. A knob that was moved twice
        belongs to its last move."""
        state, space, found = self.state, self.space, {}
        old, new = space.values(state.champion), space.values(state.anchor)
        moves = [state.experiments[name] for name in state.chapter]
        for knob in sorted(n for n in new if old[n] != new[n]):
            owner = next((x for x in reversed(moves) if x.change.get(knob) != x.parent.get(knob)), None)
            name, skill = (owner.id, owner.skill) if owner else ("joint", space.knobs[knob].skill)
            found.setdefault((name, skill), {})[knob] = [old[knob], new[knob]]
        return [dict(exp=name, skill=skill, knobs=knobs, claim=meta.claim_name(skill, knobs, space))
                for (name, skill), knobs in sorted(found.items())]

    def pairs_look(self, x: Experiment) -> tuple[str, int] | None:
        """The sequential part of a confirmation: (decision, pairs), or None while runs are missing. When the next look
        cannot be paid any more, fresh seeds decide alone."""
        seeds, pairs, state = self.config["seeds"]["judge"], 0, self.state
        while True:
            done, pairs = pairs, judge.next_look(pairs)
            new = [1 for c in (x.change, x.parent) for s in seeds[:pairs] if not state.run_of(c, x.rung, s)]
            if any(state.run_of(x.change, x.rung, s) for s in x.seeds) or (
                    new and self.exhausted(x.rung, len(new) + 2 * judge.FRESH)):
                return "fresh", done
            arms = [self.gather(x, [(c, x.rung, s) for s in seeds[:pairs]]) for c in (x.change, x.parent)]
            if None in arms:
                return None
            if any(y is None for arm in arms for y in arm):
                return "reject", pairs
            differences = [a - b for a, b in zip(*arms)]
            step = judge.look(differences, state.noise(x.rung).sigma_d)
            if step != "more":
                return step, pairs

    def step_confirm(self, x: Experiment):
        """Anchor against champion: sequential looks on common seeds, then the deciding test on fresh ones."""
        state, pairs = self.state, 0
        back = dict(anchor_after=state.champion)
        if x.source != "reserve":
            looked = self.pairs_look(x)
            if looked is None:
                return
            step, pairs = looked
            if step == "reject":
                seeds = self.config["seeds"]["judge"][:pairs]
                new, old = (state.scores(c, x.rung, seeds) for c in (x.change, x.parent))
                test = judge.compare(new, old, state.noise(x.rung)) if new and old else None
                return self.close(x, "refuted", f"no clear gain on {pairs} common seed{'s' * (pairs > 1)}", pairs=pairs,
                                  **back, **self.numbers(test))
        arms = [self.gather(x, [(c, x.rung, s) for s in x.seeds]) for c in (x.change, x.parent)]
        if None in arms:
            return
        new, old = ([y for y in arm if y is not None] for arm in arms)
        if len(new) < len(arms[0]) or not old:
            return self.close(x, "refuted", "a run on a fresh seed failed", pairs=pairs, **back)
        noise = state.noise(x.rung)
        better, test = judge.fresh_test(new, old, noise)
        numbers = dict(pairs=pairs, seeds_used=x.seeds, scores_new=new, scores_old=old, **self.numbers(test))
        after = dict(champion_after=x.change, anchor_after=x.change)
        if better and self.clearly_worse(x, noise):
            return self.close(x, "refuted", "clearly worse than the champion with all its changes", **numbers, **back)
        if better:
            evidence = [self.comparison(x.factors[0], test, x)] if len(x.factors) == 1 else []
            return self.close(x, "confirmed", f"{test.delta:+.4f} on fresh seeds, p {test.p:.4f}", factors=x.factors,
                              evidence=evidence, **numbers, **after)
        self.close(x, "refuted", f"{test.delta:+.4f} on fresh seeds, p {test.p:.3f}", **numbers, **back)

    def clearly_worse(self, x: Experiment, noise: judge.Noise) -> bool:
        """Whether a simplification is worse than the champion at level ALPHA, over all runs of both that no search
        chose them by."""
        seeds = {r.seed for r in self.state.runs.values()} - set(self.config["seeds"]["search"])
        new, old = (self.state.scores(change, x.rung, seeds) for change in (x.change, self.state.champion))
        return x.change.items() < self.state.champion.items() and bool(new and old) and (
            judge.compare(new, old, noise).p > 1 - judge.ALPHA)

    @staticmethod
    def numbers(test: judge.Test | None) -> dict:
        """A test as a verdict's fields."""
        return {} if test is None else dict(delta=test.delta, ci95=[test.low, test.high], t=test.t, df=test.df,
                                            p=test.p)

    def comparison(self, factor: dict, test: judge.Test, x: Experiment) -> dict:
        """One piece of evidence for a claim."""
        return dict(claim=factor["claim"], skill=factor["skill"], knobs=factor["knobs"], rung=x.rung,
                    delta=test.delta, se=abs(test.delta / test.t) if test.t else 0.0, parent=config_id(x.parent))

    def open_ablation(self) -> bool:
        """After a confirmed chapter of several moves: which of them did the work? Twelve runs."""
        studies = [x for x in self.state.experiments.values() if x.kind in ("confirm", "ablation")]
        last = studies[-1] if studies else None
        if not last or last.kind != "confirm" or last.verdict["verdict"] != "confirmed":
            return False
        factors = last.verdict["factors"][:11]
        if len(factors) < 2 or self.exhausted(last.rung, 12, reserve=True) or not self.config["loop"]["ablation"]:
            return False
        self.open("ablation", self.state.champion, last.rung, parent=last.parent, seeds=self.fresh_seeds(),
                  factors=factors, source="judge", text=f"effects of {len(factors)} moves of {last.id}")
        return True

    def design_of(self, x: Experiment) -> tuple:
        """A study's design and its twelve runs. Rows that are one configuration get a seed each: the same run counted
        twice would be no repetition."""
        design, seen, runs = judge.plackett_burman(len(x.factors)), Counter(), []
        for row in design:
            change = self.space.normal(toggled(x.change, x.factors, row))
            runs.append((change, x.rung, x.seeds[seen[config_id(change)] % len(x.seeds)]))
            seen[config_id(change)] += 1
        return design, runs

    def step_ablation(self, x: Experiment):
        """Plackett-Burman over the factors: drop what does not help, keep the rest as evidence."""
        design, runs = self.design_of(x)
        scores = self.gather(x, runs)
        if scores is None:
            return
        if None in scores:
            return self.close(x, "failed", "a run of the design failed; the moves stay together")
        noise = self.state.noise(x.rung)
        tests = judge.effects(design, scores, noise)
        keep = [judge.carries(t) for t in tests]
        slim = self.space.normal(toggled(x.change, x.factors, [1 if k else -1 for k in keep]))
        text = f"{sum(keep)} of {len(keep)} moves carry the gain"
        after = dict(anchor_after=slim) if x.kind == "ablation" or any(keep) else {}
        self.close(x, "ablated", text, suspect=judge.suspect(design, scores, noise),
                   **self.findings(x, keep, tests), **after)

    def findings(self, x: Experiment, keep: Sequence[bool], tests: list[judge.Test]) -> dict:
        """The effects of a study and the evidence that they are."""
        rows = [dict(claim=f["claim"], keep=bool(k), **self.numbers(t)) for f, k, t in zip(x.factors, keep, tests)]
        return dict(effects=rows, evidence=[self.comparison(f, t, x) for f, t in zip(x.factors, tests)])

    step_compose = step_ablation  # the same design over changes that were named by hand

    def open_pair(self) -> bool:
        """A 2x2 of the two changes that the last study suspects of an interaction, on fresh seeds: twelve runs."""
        last = next((x for x in reversed(self.state.experiments.values()) if x.kind in ("ablation", "compose", "pair")),
                    None)
        suspect = last and last.verdict.get("suspect")
        if not suspect or self.exhausted(last.rung, 4 * judge.FRESH, reserve=True):
            return False
        study = self.state.experiments[last.study or last.id]
        factors = [study.factors[i] for i in suspect]
        both, none = (self.space.normal(toggled(self.state.anchor, factors, s)) for s in ((1, 1), (-1, -1)))
        self.open("pair", both, last.rung, parent=none, study=study.id, seeds=self.fresh_seeds(), factors=factors,
                  source="judge", text=f"{study.id} suspects that these two do not simply add up")
        return True

    def step_pair(self, x: Experiment):
        """When two changes interact, the anchor takes their best corner, and the study's other effects are corrected
        for the third of the interaction that the design had mixed into them."""
        changes = [self.space.normal(toggled(x.change, x.factors, signs)) for signs in CORNERS]
        scores = self.gather(x, [(c, x.rung, s) for c in changes for s in x.seeds])
        if scores is None:
            return
        if None in scores:
            return self.close(x, "failed", "a run of the 2x2 failed")
        noise, n, study = self.state.noise(x.rung), len(x.seeds), self.state.experiments[x.study]
        corners = {signs: scores[i * n:(i + 1) * n] for i, signs in enumerate(CORNERS)}
        test = judge.interaction(*corners.values(), noise)
        text = f"together {test.delta:+.4f} [{test.low:+.4f}, {test.high:+.4f}] beyond their sum"
        if test.low <= 0 <= test.high:
            return self.close(x, "no interaction", text, **self.numbers(test))
        found = {tuple(map(study.factors.index, p.factors)): p.verdict["delta"] for p in self.state.experiments.values()
                 if p.study == x.study and p.verdict and p.verdict["verdict"] == "interaction"}
        pair = tuple(map(study.factors.index, x.factors))
        found[pair] = test.delta
        design, runs = self.design_of(study)
        measured = self.gather(x, runs)
        clean = [y - sum(d / 4 * row[i] * row[j] for (i, j), d in found.items()) for y, row in zip(measured, design)]
        tests, best = judge.effects(design, clean, noise), judge.best_corner(corners, noise)
        settled = {i: e["keep"] for i, e in enumerate(study.verdict["effects"]) if any(i in p for p in found)}
        settled |= {i: sign > 0 for i, sign in zip(pair, best)}
        keep = [settled.get(i, judge.carries(t)) for i, t in enumerate(tests)]
        slim = self.space.normal(toggled(self.state.anchor, study.factors, [1 if k else -1 for k in keep]))
        self.close(x, "interaction", text, suspect=judge.suspect(design, measured, noise, list(found)),
                   anchor_after=slim, **self.numbers(test), **self.findings(study, keep, tests))

    def open_promotion(self) -> bool:
        """Move the best third and a random tenth one rung up, so that transfer is measured and not assumed."""
        state, search, up = self.state, self.config["search"]["rung"], self.config["search"].get("promote_to", "")
        if not up or self.exhausted(up, reserve=True):
            return False
        if up not in state.reference:
            if not any(x.kind == "sentinel" and x.rung == up for x in state.experiments.values()):
                self.open("sentinel", {}, up, seeds=self.config["seeds"]["search"][:self.sentinels(up)])
                return True
            return False
        ranked = sorted((s[0], x.id) for x in state.searches() if (s := state.scores(x.change, search)))
        best = {name for _, name in ranked[:len(ranked) // 3]}
        gone = {x.cid for x in state.experiments.values() if x.kind == "promote"}
        for _, name in ranked:
            x = state.experiments[name]
            lucky = int(digest([self.config["seed"], name]), 16) % 10 == 0
            if x.cid not in gone and (lucky or len(ranked) >= 3 and name in best):
                self.open("promote", x.change, up, skill=x.skill, seeds=self.config["seeds"]["search"][:1],
                          source="ladder", text=f"{name}: " + ("random tenth" if name not in best else "best third"))
                return True
        return False

    def step_promote(self, x: Experiment):
        """A configuration on the next rung, once the base is measured there."""
        if any(s.rung == x.rung for s in self.state.open("sentinel")):
            return
        scores = self.gather(x, [(x.change, x.rung, s) for s in x.seeds])
        if scores is not None:
            base = self.state.reference.get(x.rung, {}).get("scores")
            delta = scores[0] - sum(base) / len(base) if scores[0] is not None and base else None
            self.close(x, "promoted", "measured" if delta is not None else "a run failed", delta=delta)

    # Proposals.
    def open_search(self):
        """Take the next hypothesis of a person, an agent or the sampler that is new and feasible."""
        for _ in range(3 * propose.REDRAWS):
            from . import agent
            found = agent.next_hypothesis(self) or self.numeric()
            if found is None:
                break
            change, cid = found["change"], config_id(found["change"])
            if reason := self.refusal(change):
                plan = self.state.plans[cid]
                self.record("refused", proposal=found | dict(
                    infeasible=True, reason=reason, at=len(self.state.experiments),
                    oversize="bytes" in plan and not plan["ok"]))
                continue
            tried = sum(x.kind == "search" for x in self.state.experiments.values())
            self.open("search", change, self.config["search"]["rung"], skill=found["skill"], parent=self.state.anchor,
                      source=found["source"], text=found.get("text", ""),
                      seeds=[self.config["seeds"]["search"][tried % 3]])
            return
        if not self.state.open():
            self.record("stopped", reason=f"no new feasible proposal in {3 * propose.REDRAWS} draws")

    def refusal(self, change: dict) -> str:
        """Why a change must not start, by what the script foretells of it; empty when it may."""
        for wanted in (change, {}) if self.config["search"]["max_flops"] else (change,):
            if config_id(wanted) not in self.state.plans:
                env = self.space.resolve(wanted, self.rung(self.config["search"]["rung"]))
                self.record("planned", cid=config_id(wanted), plan=self.plan(wanted, env))
        return self.infeasible(config_id(change)) or self.costly(config_id(change))

    def numeric(self) -> dict | None:
        """The sampler's next proposal."""
        found = propose.propose(self.state, self.space)
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
        ratios = sorted(r.record["artifact_bytes"] / p["bytes"] for c, p in self.state.plans.items() if p.get("bytes")
                        for (i, _, _), r in self.state.by_place.items() if i == c and r.record
                        and r.record["artifact_bytes"])
        expected = plan["bytes"] * (ratios[len(ratios) // 2] if ratios else 1.0)
        error = plan["bytes"] * ((ratios[-1] - ratios[0]) / 2 if len(ratios) > 1 else 0.01)
        over = expected - error - self.config["budget"]["artifact_bytes"]
        return plan["reason"] if over > 0 else ""

    def costly(self, cid: str) -> str:
        """Why a planned configuration would win only by computing more than the base: on a rung of equal tokens, more
        operations per token are more time."""
        limit, plans = self.config["search"]["max_flops"], self.state.plans
        base, mine = (plans.get(i, {}).get("flops", 0.0) for i in (config_id({}), cid))
        return f"{mine / base:.2f} times the base's operations per token, the limit is {limit:g}" if (
            limit and base and mine > limit * base * 1.001) else ""

    # The tick.
    def tick(self) -> bool:
        """Reap, judge, learn, propose, start. True when anything happened. Raises ForgeError when another decider is
        at work."""
        with locked(self.folder / "tick.lock", busy=f"{self.folder.name}: another decider is at work"):
            self.catch_up()
            return self.locked_tick()

    def catch_up(self):
        """Take in what other commands recorded between two ticks."""
        if self.ledger.count() > self.state.events:
            for event in self.ledger.read()[self.state.events:]:
                self.state.apply(event)
            self._space = None  # a skill may have been added

    def locked_tick(self) -> bool:
        before = self.state.events
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

    def loop(self, seconds: float = 0.0, publish: Callable[[], Any] | None = None, pause: float = 0.5):
        """Ticks until the campaign stops or `seconds` are over (0 = no limit)."""
        end, quick = time.monotonic() + (seconds or 1e12), 0.02
        while time.monotonic() < end:
            moved = self.tick()
            if moved and publish:
                publish()
            if self.state.stopped and not self.running():
                return
            quick = 0.02 if moved else min(quick * 1.5, pause)
            time.sleep(quick)


def toggled(change: dict, factors: list[dict], signs) -> dict:
    """A change with the factors of sign -1 undone and those of sign +1 done."""
    result = dict(change)
    for factor, sign in zip(factors, signs):
        result |= {knob: pair[1 if sign > 0 else 0] for knob, pair in factor["knobs"].items()}
    return result


# ---- Beginning -------------------------------------------------------------------------------------------------------
DEFAULTS: dict[str, dict[str, Any]] = dict(
    search=dict(rung="screen", confirm_rung="", promote_to="", anchor="sigma", race_above=0.0025, max_flops=0.0),
    loop=dict(workers=1, meta_every=5, confirm="large", confirm_every=20, ablation=True, lease_s=300.0,
              forecasts=True),
    seeds=dict(search=list(range(1, 21)), judge=list(range(101, 106)), fresh_from=1001),
    budget=dict(experiments=40, minutes=0.0, runs=0, deadline="", disk_gib=1.0, artifact_bytes=16_000_000,
                agent_calls=0, agent_dollars=0.0),
    agent=dict(cmd="", share=0.3, timeout_s=300.0, dollars_per_call=0.0, allow_unsandboxed=False))


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
    errors = [f"{path.name}: unknown table [{t}]" for t in set(found) - set(DEFAULTS) - {
        "name", "seed", "base", "rungs", "code", "data_print"}]
    config = dict(found)
    for table, defaults in DEFAULTS.items():
        mine = found.get(table, {})
        errors += [f"{path.name}: unknown [{table}] {k}; known: {', '.join(defaults)}"
                   for k in set(mine) - set(defaults)]
        for k, v in mine.items():
            kind = type(defaults.get(k, v))
            if not isinstance(v, (int, float) if kind in (int, float) else kind):
                errors.append(f"{path.name}: [{table}] {k} = {v!r}: want a {kind.__name__}")
        config[table] = defaults | mine
    for name in (config["search"]["rung"], config["search"]["confirm_rung"], config["search"]["promote_to"]):
        if name and name not in found.get("rungs", {}):
            errors.append(f"{path.name}: rung {name!r} is not among [rungs.*]: {', '.join(found.get('rungs', {}))}")
    for name, rung in found.get("rungs", {}).items():
        if not isinstance(rung.get("kill_s"), (int, float)) or rung["kill_s"] <= 0:
            errors.append(f"{path.name}: [rungs.{name}] kill_s must be a number of seconds above 0")
        errors += [f"{path.name}: [rungs.{name}] {k} = {v!r}: want a number named {', '.join(RUNG)}" for k, v in
                   rung.items() if k != "env" and (k not in RUNG or not isinstance(v, (int, float)))]
    try:
        seconds_of(config["budget"]["deadline"] or now())
    except ValueError:
        errors.append(f"{path.name}: [budget] deadline {config['budget']['deadline']!r}: want 2026-12-01T08:00:00Z")
    seeds = config["seeds"]
    if set(seeds["search"]) & set(seeds["judge"]) or max(*seeds["search"], *seeds["judge"]) >= seeds["fresh_from"]:
        errors.append(f"{path.name}: search, judge and fresh seeds must not overlap")
    if len(seeds["judge"]) < max(judge.LOOKS) or len(seeds["search"]) < 3:
        errors.append(f"{path.name}: want at least {max(judge.LOOKS)} judge seeds and 3 search seeds")
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
    tables = [to_toml(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items() if isinstance(v, dict)]
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


def create(folder: Path, script: Path, skills: Path, config: dict, without: Sequence[str] = ()) -> Campaign:
    """Begin a campaign in an empty folder, with all skills but some; nothing is left behind when the configuration is
    refused."""
    folder, known = Path(folder), {p.parent.name for p in skills.glob("*/SKILL.md")}
    if unknown := sorted(set(without) - known):
        raise ForgeError(f"--without {', '.join(unknown)}: want a skill of {', '.join(sorted(known))}")
    if (folder / "events.jsonl").exists():
        raise ForgeError(f"{folder.name} already holds a campaign; go on with `run`")
    if not script.is_file():
        raise ForgeError(f"{script.name}: no such script")
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        code = add_code(folder, script, script.parent / "data")
        config = dict(name=folder.name, seed=1) | config | dict(
            code=code, data_print=data_print(space_module.located(
                dict(DATA_PATH="auto") | config.get("base", {}), folder / "code" / code / "train_gpt.py")["DATA_PATH"]))
        write_atomic(folder / "campaign.toml", to_toml(config))
        config = read_config(folder / "campaign.toml")
        described = space_module.describe(folder / "code" / code / "train_gpt.py", config["base"])
        if tokens := config["rungs"][config["search"]["rung"]].get("tokens"):  # what counts steps is a part of these
            described["values"]["ITERATIONS"] = max(1, tokens // described["values"]["TRAIN_BATCH_TOKENS"])
        Space.build(described, load_skills(skills), config["base"])
        write_atomic(folder / "code" / code / "knobs.json", json.dumps(described))
        shutil.copytree(skills, folder / "skills", dirs_exist_ok=True, ignore=lambda at, names: set(
            without) & set(names) if Path(at) == skills else ())
        (folder / "runs").mkdir(exist_ok=True)
        write_atomic(folder / "campaign.toml", HEAD + to_toml(config))
    except (ForgeError, OSError) as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise error if isinstance(error, ForgeError) else ForgeError(f"{folder.name}: {error.strerror}") from None
    Ledger(folder / "events.jsonl").append("created", config=config)
    return Campaign(folder)

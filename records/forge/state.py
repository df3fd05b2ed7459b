"""What a campaign knows: a pure replay of its events. Counts are derived here and never stored."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import comparison
from .ledger import digest
from .space import config_id


@dataclass
class Run:
    """One process to be, in being, or done. `record` is what the supervisor found, once it is
    over."""

    key: str
    exp: str
    change: dict
    rung: str
    seed: int
    env: dict
    started: bool = False
    record: dict | None = None
    forecast: dict | None = None
    slots: list = field(default_factory=list)  # devices or workers that it has, by name

    def __post_init__(self):
        self.cid = config_id(self.change)

    @property
    def finished(self) -> bool:
        return self.record is not None

    @property
    def score(self) -> float | None:
        return self.record["bpb"] if self.record and self.record["status"] == "ok" else None


@dataclass
class Experiment:
    """One question and the verdict that answered it. Its kind is sentinel, search, confirm,
    ablation, compose, pair, promote, closing or retest; `study` is the experiment that a pair
    follows up."""

    id: str
    kind: str
    change: dict
    rung: str
    skill: str = ""
    parent: dict = field(default_factory=dict)
    source: str = "sampler"
    seeds: list = field(default_factory=list)
    text: str = ""
    factors: list = field(default_factory=list)
    study: str = ""
    verdict: dict | None = None

    def __post_init__(self):
        self.cid = config_id(self.change)


class State:
    """Fold of the events. `anchor` and `champion` are changes relative to the base."""

    def __init__(self):
        self.config: dict[str, Any] = {}
        self.runs: dict[str, Run] = {}
        self.by_place: dict[tuple, Run] = {}  # (configuration, rung, seed) -> run
        self.experiments: dict[str, Experiment] = {}
        self.plans: dict[str, dict] = {}
        self.anchor: dict = {}
        self.champion: dict = {}
        self.chapter: list[str] = []  # experiments that moved the anchor since the champion
        self.reference: dict[str, dict] = {}  # rung -> what the sentinel measured
        self.metas: list[dict] = []
        self.playbooks: dict[str, list[dict]] = defaultdict(list)  # skill -> versions
        self.evidence: dict[str, list[dict]] = defaultdict(list)  # claim -> comparisons
        self.agent_calls: list[dict] = []
        self.refused: list[dict] = []
        self.retired: set[str] = set()  # skills that were taken out of the search
        self.prior: dict[
            str, list[float]
        ] = {}  # skill -> [for, against] from the records of others
        self.stopped = ""
        self.events = 0

    # Events.
    def apply(self, event: dict):
        """Take in one event; unknown kinds are kept for people and ignored here."""
        handler = getattr(self, "on_" + event["event"])
        handler(event)
        self.events += 1

    def on_created(self, e):
        self.config = e["config"]

    def on_config(self, e):
        self.config = e["config"]
        self.stopped = ""

    def on_proposed(self, e):
        names = Experiment.__dataclass_fields__
        x = Experiment(**{k: v for k, v in e.items() if k in names})
        self.experiments[x.id] = x

    def on_wanted(self, e):
        run = Run(e["key"], e["exp"], e["change"], e["rung"], e["seed"], e["env"])
        self.runs[run.key] = self.by_place[run.cid, run.rung, run.seed] = run

    def on_started(self, e):
        run = self.runs[e["key"]]
        run.started = True
        run.slots = e.get("slots", [])

    def on_placed(self, e):
        self.runs[e["key"]].slots = e["slots"]

    def on_finished(self, e):
        self.runs[e["key"]].record = e["record"]

    def on_forecast(self, e):
        self.runs[e["key"]].forecast = e["forecast"]

    def on_forgotten(self, e):
        run = self.runs[e["key"]]
        run.started = False
        run.record = None
        run.forecast = None
        run.slots = []
        x = self.experiments[run.exp]
        if x.kind in ("sentinel", "search") and x.verdict["verdict"] in ("failed", "reject"):
            x.verdict = None  # to be judged anew; neither verdict had moved anything

    def on_planned(self, e):
        self.plans[e["cid"]] = e["plan"]

    def on_judged(self, e):
        x = self.experiments[e["exp"]]
        x.verdict = e["verdict"]
        if x.verdict["verdict"] == "measured":
            self.reference[x.rung] = x.verdict["measured"]
        if (
            x.study and "effects" in x.verdict
        ):  # two changes interact: the study's effects without their shadow
            whole = {x.study} | {p.id for p in self.experiments.values() if p.study == x.study}
            study = self.experiments[x.study]
            study.verdict = study.verdict | dict(effects=x.verdict["effects"])
            for known in self.evidence.values():
                known[:] = [e for e in known if e["exp"] not in whole]
        for claim in x.verdict.get("evidence", ()):
            self.evidence[claim["claim"]].append(claim | dict(exp=x.id, at=len(self.searches())))
        if "champion_after" in x.verdict:
            self.champion = x.verdict["champion_after"]
            self.chapter = []
        if "anchor_after" in x.verdict:
            self.anchor = x.verdict["anchor_after"]
            if x.verdict["verdict"] == "tentative":
                self.chapter.append(x.id)
            elif x.verdict["verdict"] == "refuted":
                self.chapter = []

    def on_meta(self, e):
        self.metas.append(e["meta"])
        for edit in e["meta"].get("edits", ()):
            self.playbooks[edit["skill"]].append(edit)

    def on_agent(self, e):
        self.agent_calls.append(e["call"])

    def on_skill(self, e):
        (self.retired.add if e["action"] == "retire" else self.retired.discard)(e["skill"])

    def on_harvested(self, e):
        self.prior = e["prior"]

    def on_refused(self, e):
        self.refused.append(e["proposal"])

    def on_stopped(self, e):
        self.stopped = e["reason"]

    def on_resumed(self, e):
        self.stopped = ""

    # Questions.
    def searches(self) -> list[Experiment]:
        """Finished search experiments in order."""
        return [x for x in self.experiments.values() if x.kind == "search" and x.verdict]

    def open(self, *kinds: str) -> list[Experiment]:
        """Experiments without a verdict, of these kinds or of all."""
        return [
            x for x in self.experiments.values() if not x.verdict and (not kinds or x.kind in kinds)
        ]

    def run_of(self, change: dict, rung: str, seed: int) -> Run | None:
        """The run of a configuration at a rung with a seed, if it was ever wanted."""
        return self.by_place.get((config_id(change), rung, seed))

    def scores(self, change: dict, rung: str, seeds: Iterable[int] | None = None) -> list[float]:
        """Finished scores of a configuration on a rung, of these seeds or of all."""
        cid = config_id(change)
        allowed = None if seeds is None else set(seeds)
        return [
            r.score
            for (c, g, s), r in self.by_place.items()
            if c == cid and g == rung and r.score is not None and (allowed is None or s in allowed)
        ]

    def halfway(self, rung: str) -> list[tuple[float, float]]:
        """(training loss partway, score) of every finished run on a rung."""
        return [
            (r.record["partway"], r.score)
            for r in self.runs.values()
            if r.rung == rung and r.score is not None and r.record.get("partway")
        ]

    def noise(self, rung: str) -> comparison.Noise:
        """The rung's noise over all replicates so far, on the host class that has most runs."""
        groups = defaultdict(list)
        hosts = Counter(r.record["host"] for r in self.runs.values() if r.score is not None)
        host = hosts.most_common(1)[0][0] if hosts else ""
        for (cid, where, _), run in self.by_place.items():
            if where == rung and run.score is not None and run.record["host"] == host:
                groups[cid].append(run.score)
        prior = self.config["rungs"][rung].get("prior_sigma", 0.0025)
        return comparison.noise(list(groups.values()), prior, 4.0 if rung == "target" else 1.0)

    def minutes(self) -> float:
        """Device minutes spent by finished runs."""
        return (
            sum(
                r.record["wall_s"] * self.config["rungs"][r.rung].get("nproc", 1)
                for r in self.runs.values()
                if r.finished
            )
            / 60
        )

    def expected_seconds(self, rung: str, change: dict | None = None) -> float:
        """How long a run on this rung takes: the median so far, of this configuration if it ran
        there, or half the rung's limit before any is known. Runs that were cut short do not
        count."""
        runs = [
            r
            for r in self.runs.values()
            if r.finished and r.rung == rung and r.record["status"] != "pruned"
        ]
        wanted = None if change is None else config_id(change)
        mine = [r for r in runs if r.cid == wanted]
        times = sorted(r.record["wall_s"] for r in mine or runs)
        return times[len(times) // 2] if times else 0.5 * self.config["rungs"][rung]["kill_s"]

    def digest(self) -> str:
        """One hash of everything derived: equal states, equal hashes."""
        return digest(
            dict(
                config=self.config,
                anchor=self.anchor,
                champion=self.champion,
                chapter=self.chapter,
                metas=self.metas,
                runs={
                    k: [r.exp, r.change, r.rung, r.seed, r.started, r.record, r.forecast]
                    for k, r in self.runs.items()
                },
                experiments={
                    k: [x.kind, x.change, x.skill, x.verdict] for k, x in self.experiments.items()
                },
                evidence=dict(self.evidence),
                reference=self.reference,
                stopped=self.stopped,
                **{
                    k: v
                    for k, v in dict(
                        retired=sorted(self.retired),
                        prior=self.prior,
                        slots={key: r.slots for key, r in self.runs.items() if r.slots},
                    ).items()
                    if v
                },
            )
        )


def replay(events: Iterable[dict]) -> State:
    """The state after these events."""
    state = State()
    for event in events:
        state.apply(event)
    return state

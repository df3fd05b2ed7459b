"""Studies: the questions of a campaign besides the search, what runs each needs, and the verdict
that answers it."""

from collections import Counter
from collections.abc import Sequence

from . import ForgeError, comparison, skill_review
from .ledger import digest
from .space import config_id
from .state import Experiment

STUDIES = ("confirm", "ablation", "compose", "pair", "promote", "closing", "retest")
FRESH_STUDIES = tuple(k for k in STUDIES if k != "promote")  # each has fresh seeds of its own
CORNERS = (
    (1, 1),
    (1, -1),
    (-1, 1),
    (-1, -1),
)  # of a 2x2: both changes, the first, the second, none


def toggled(change: dict, factors: list[dict], signs) -> dict:
    """A change with the factors of sign -1 undone and those of sign +1 done."""
    result = dict(change)
    for factor, sign in zip(factors, signs):
        result |= {knob: pair[1 if sign > 0 else 0] for knob, pair in factor["knobs"].items()}
    return result


class Studies:
    """The part of a Campaign that opens and answers its studies. `open_*` says whether it opened
    one, `step_*` asks for the runs of an open one and judges it once they are there; both are
    repeated at every tick."""

    # The base on a rung.
    def sentinels(self, rung: str) -> int:
        return self.config["rungs"][rung].get("sentinel_runs", 3)

    def step_sentinel(self, x: Experiment):
        """The base configuration on a few seeds: noise, time, size, and what must be scored."""
        scores = self.gather(x, [(x.change, x.rung, s) for s in x.seeds])
        if scores is None:
            return
        runs = [self.state.run_of(x.change, x.rung, s).record for s in x.seeds]
        bad = [r for r in runs if r["status"] != "ok"]
        if bad:
            return self.close(x, "failed", f"{bad[0]['status']}: {bad[0]['reason']}")
        middle = {
            k: sorted(r[k] or 0 for r in runs)[len(runs) // 2]
            for k in ("steps", "wall_s", "artifact_bytes")
        }
        measured = dict(
            scores=scores,
            val=runs[0]["val"],
            host=runs[0]["host"],
            code=self.config["code"],
            ratio=runs[0]["bpb"] / runs[0]["val_loss"],
            **middle,
        )
        self.close(
            x, "measured", f"{len(scores)} runs of the base configuration", measured=measured
        )

    def open_sentinel(self, rung: str) -> str:
        """Open the measurement of the base on a rung; returns its name. Raises ForgeError when
        there is one or no such rung."""
        if rung not in self.config["rungs"]:
            raise ForgeError(f"rung {rung!r}: want one of {', '.join(self.config['rungs'])}")
        if rung in self.state.reference or any(x.rung == rung for x in self.state.open("sentinel")):
            raise ForgeError(f"rung {rung}: the base is measured there already")
        return self.open(
            "sentinel", {}, rung, seeds=self.config["seeds"]["search"][: self.sentinels(rung)]
        )

    # A claim on fresh seeds.
    def fresh_seeds(self) -> list[int]:
        """Seeds that no experiment has had."""
        first = self.config["seeds"]["fresh_from"] + comparison.FRESH * sum(
            x.kind in FRESH_STUDIES for x in self.state.experiments.values()
        )
        return list(range(first, first + comparison.FRESH))

    @staticmethod
    def numbers(test: comparison.Test | None) -> dict:
        """A test as a verdict's fields."""
        return (
            {}
            if test is None
            else dict(delta=test.delta, ci95=[test.low, test.high], t=test.t, df=test.df, p=test.p)
        )

    def piece_of_evidence(self, factor: dict, test: comparison.Test, x: Experiment) -> dict:
        """One piece of evidence for a claim."""
        return dict(
            claim=factor["claim"],
            skill=factor["skill"],
            knobs=factor["knobs"],
            rung=x.rung,
            delta=test.delta,
            se=abs(test.delta / test.t) if test.t else 0.0,
            parent=config_id(x.parent),
        )

    def open_confirm(self, asked_for: bool = False) -> bool:
        """Put the anchor's claim to the test when it is asked for, its gain is large, it is
        overdue, or nothing else can be afforded."""
        state = self.state
        loop = self.config["loop"]
        rung = self.config["search"]["rung"]
        rival = self.rival()
        slimmer = state.anchor.items() < state.champion.items()
        if config_id(state.anchor) in (config_id(state.champion), config_id(rival)):
            return False
        since = 0  # experiments after the last confirmation
        for x in reversed(list(state.experiments.values())):
            if x.kind == "confirm":
                break
            since += 1
        noise = state.noise(rung)
        old = state.scores(state.champion, rung)
        new = state.scores(state.anchor, rung)
        gain = 0.0
        if old and new and not slimmer:
            gain = sum(old) / len(old) - sum(new) / len(new)
        over = "asked for" if asked_for else self.search_over()
        large = gain > 3 * comparison.minimal_gain(rung, noise)
        due = loop["confirm"] != "end" and (large or since >= loop["confirm_every"])
        if not over and not due:
            return False
        where = self.config["search"].get("confirm_rung") or rung
        last = len(self.reserve(rival))
        if self.exhausted(where, last):
            return False
        short = bool(self.exhausted(where, last + 4))
        text = over or "the gain is large"
        if short:
            text = "fresh seeds only: the reserve is all that is left"
        elif slimmer:
            text = "the champion with fewer changes"
        self.open(
            "confirm",
            state.anchor,
            where,
            parent=rival,
            seeds=self.fresh_seeds(),
            text=text,
            factors=[] if slimmer else self.factors(),
            source="reserve" if short else "judge",
        )
        return True

    def rival(self) -> dict:
        """What the anchor must beat: the champion or, when it is the champion less some changes,
        what that one beat. A test of gain would always refute a simplification, and one of equality
        takes 49 runs per arm."""
        state = self.state
        won = [
            x.parent
            for x in state.experiments.values()
            if x.kind == "confirm"
            and x.verdict
            and x.verdict["verdict"] == "confirmed"
            and x.cid == config_id(state.champion)
        ]
        return won[-1] if won and state.anchor.items() < state.champion.items() else state.champion

    def pairs_look(self, x: Experiment) -> tuple[str, int] | None:
        """The sequential part of a confirmation: (decision, pairs), or None while runs are missing.
        When the next look cannot be paid any more, fresh seeds decide alone."""
        seeds = self.config["seeds"]["judge"]
        pairs = 0
        state = self.state
        while True:
            done = pairs
            pairs = comparison.next_look(pairs)
            new = [
                1
                for c in (x.change, x.parent)
                for s in seeds[:pairs]
                if not state.run_of(c, x.rung, s)
            ]
            if any(state.run_of(x.change, x.rung, s) for s in x.seeds) or (
                new and self.exhausted(x.rung, len(new) + len(self.reserve(x.parent)))
            ):
                return "fresh", done
            arms = [
                self.gather(x, [(c, x.rung, s) for s in seeds[:pairs]])
                for c in (x.change, x.parent)
            ]
            if None in arms:
                return None
            if any(y is None for arm in arms for y in arm):
                return "reject", pairs
            differences = [a - b for a, b in zip(*arms)]
            step = comparison.look(differences, state.noise(x.rung).sigma_d)
            if step != "more":
                return step, pairs

    def step_confirm(self, x: Experiment):
        """Anchor against champion: sequential looks on common seeds, then the deciding test on
        fresh ones."""
        state = self.state
        pairs = 0
        back = dict(anchor_after=state.champion)
        if x.source != "reserve":
            looked = self.pairs_look(x)
            if looked is None:
                return
            step, pairs = looked
            if step == "reject":
                seeds = self.config["seeds"]["judge"][:pairs]
                new, old = (state.scores(c, x.rung, seeds) for c in (x.change, x.parent))
                test = comparison.compare(new, old, state.noise(x.rung)) if new and old else None
                return self.close(
                    x,
                    "refuted",
                    f"no clear gain on {pairs} common seed{'s' if pairs > 1 else ''}",
                    pairs=pairs,
                    **back,
                    **self.numbers(test),
                )
        arms = [self.gather(x, [(c, x.rung, s) for s in x.seeds]) for c in (x.change, x.parent)]
        if None in arms:
            return
        new, old = ([y for y in arm if y is not None] for arm in arms)
        if len(new) < len(arms[0]) or not old:
            return self.close(x, "refuted", "a run on a fresh seed failed", pairs=pairs, **back)
        noise = state.noise(x.rung)
        better, test = comparison.fresh_test(new, old, noise)
        numbers = dict(
            pairs=pairs, seeds_used=x.seeds, scores_new=new, scores_old=old, **self.numbers(test)
        )
        after = dict(champion_after=x.change, anchor_after=x.change)
        if better and self.clearly_worse(x, noise):
            return self.close(
                x,
                "refuted",
                "clearly worse than the champion with all its changes",
                **numbers,
                **back,
            )
        if better:
            evidence = (
                [self.piece_of_evidence(x.factors[0], test, x)] if len(x.factors) == 1 else []
            )
            return self.close(
                x,
                "confirmed",
                f"{test.delta:+.4f} on fresh seeds, p {test.p:.4f}",
                factors=x.factors,
                evidence=evidence,
                **numbers,
                **after,
            )
        self.close(
            x, "refuted", f"{test.delta:+.4f} on fresh seeds, p {test.p:.3f}", **numbers, **back
        )

    def clearly_worse(self, x: Experiment, noise: comparison.Noise) -> bool:
        """Whether a simplification is worse than the champion at level ALPHA, over all runs of both
        that no search chose them by."""
        seeds = {r.seed for r in self.state.runs.values()} - set(self.config["seeds"]["search"])
        new, old = (
            self.state.scores(change, x.rung, seeds) for change in (x.change, self.state.champion)
        )
        return (
            x.change.items() < self.state.champion.items()
            and bool(new and old)
            and (comparison.compare(new, old, noise).p > 1 - comparison.ALPHA)
        )

    def open_closing(self) -> bool:
        """At the end, the last champion against the base on fresh seeds, unless that is what
        confirmed it."""
        state = self.state
        won = [
            x
            for x in state.experiments.values()
            if x.kind in ("confirm", "closing")
            and x.verdict
            and config_id(x.change) == config_id(state.champion)
        ]
        if (
            not state.champion
            or any(not x.parent for x in won)
            or self.exhausted(won[-1].rung, 2 * comparison.FRESH)
        ):
            return False
        self.open(
            "closing",
            state.champion,
            won[-1].rung,
            parent={},
            seeds=self.fresh_seeds(),
            source="judge",
            text="what the campaign gained in all",
        )
        return True

    def open_retest(self) -> bool:
        """A proven claim without new evidence for long is tested once more, on the present anchor:
        never a second time."""
        done = {
            x.factors[0]["claim"] for x in self.state.experiments.values() if x.kind == "retest"
        }
        searched = {
            name for name, knob in self.space.knobs.items() if knob.skill not in self.state.retired
        }
        for claim in skill_review.claims(self.state) if self.state.evidence else ():
            if (
                (claim["status"], claim["was"]) == ("stale", "proven")
                and claim["claim"] not in done
                and claim["knobs"].keys() <= searched
            ):
                new, old = (
                    self.space.normal(toggled(self.state.anchor, [claim], [sign]))
                    for sign in (1, -1)
                )
                if new != old and not self.exhausted(
                    claim["rung"], 2 * comparison.FRESH, reserve=True
                ):
                    self.open(
                        "retest",
                        new,
                        claim["rung"],
                        parent=old,
                        skill=claim["skill"],
                        seeds=self.fresh_seeds(),
                        factors=[{k: claim[k] for k in ("claim", "skill", "knobs")}],
                        source="judge",
                        text=f"{claim['id']} is stale",
                    )
                    return True
        return False

    def step_closing(self, x: Experiment):
        """Six runs on fresh seeds that move nothing: what the report says of the champion, or
        evidence for a claim."""
        arms = [self.gather(x, [(c, x.rung, s) for s in x.seeds]) for c in (x.change, x.parent)]
        if None in arms:
            return
        new, old = ([y for y in arm if y is not None] for arm in arms)
        if not new or not old:
            return self.close(x, "failed", "the runs on fresh seeds failed")
        better, test = comparison.fresh_test(new, old, self.state.noise(x.rung))
        against = (
            f"{x.text}: {test.delta:+.4f}" if x.factors else f"{test.delta:+.4f} against the base"
        )
        self.close(
            x,
            "upheld" if better else "not upheld",
            f"{against}, p {test.p:.4f}",
            seeds_used=x.seeds,
            scores_new=new,
            scores_old=old,
            evidence=[self.piece_of_evidence(f, test, x) for f in x.factors],
            **self.numbers(test),
        )

    step_retest = step_closing

    # Which changes did it.
    def factors(self) -> list[dict]:
        """The chapter's moves as independent switches: which knobs, from what, to what. A knob that
        was moved twice belongs to its last move."""
        state = self.state
        space = self.space
        found = {}
        old, new = space.values(state.champion), space.values(state.anchor)
        moves = [state.experiments[name] for name in state.chapter]
        for knob in sorted(n for n in new if old[n] != new[n]):
            owner = next(
                (x for x in reversed(moves) if x.change.get(knob) != x.parent.get(knob)), None
            )
            name, skill = (owner.id, owner.skill) if owner else ("joint", space.knobs[knob].skill)
            found.setdefault((name, skill), {})[knob] = [old[knob], new[knob]]
        return [
            dict(
                exp=name,
                skill=skill,
                knobs=knobs,
                claim=skill_review.claim_name(skill, knobs, space),
            )
            for (name, skill), knobs in sorted(found.items())
        ]

    def compose(self, changes: list[dict]) -> str:
        """Open an interaction test of several changes of the anchor that were named by hand;
        returns its name. Raises ForgeError when they overlap or are not 2 to 11."""
        values = self.space.values(self.state.anchor)
        factors = []
        for change in map(self.space.normal, changes):
            knobs = {n: [values[n], v] for n, v in change.items() if values[n] != v}
            twice = set(knobs) & {n for f in factors for n in f["knobs"]}
            if twice or not knobs:
                raise ForgeError(
                    f"{', '.join(sorted(twice))}: in two changes"
                    if twice
                    else "a change changes nothing"
                )
            skill = self.space.knobs[min(knobs)].skill
            factors.append(
                dict(
                    exp="hand",
                    skill=skill,
                    knobs=knobs,
                    claim=skill_review.claim_name(skill, knobs, self.space),
                )
            )
        if not 2 <= len(factors) <= 11:
            raise ForgeError(f"{len(factors)} changes: want 2 to 11")
        whole = self.space.normal(toggled(self.state.anchor, factors, [1] * len(factors)))
        return self.open(
            "compose",
            whole,
            self.config["search"]["rung"],
            parent=self.state.anchor,
            source="human",
            seeds=self.fresh_seeds(),
            factors=factors,
            text="which of these help together",
        )

    def open_ablation(self) -> bool:
        """After a confirmed chapter of several moves: which of them did the work? Twelve runs."""
        studies = [x for x in self.state.experiments.values() if x.kind in ("confirm", "ablation")]
        last = studies[-1] if studies else None
        if not last or last.kind != "confirm" or last.verdict["verdict"] != "confirmed":
            return False
        factors = last.verdict["factors"][:11]
        if (
            len(factors) < 2
            or self.exhausted(last.rung, 12, reserve=True)
            or not self.config["loop"]["ablation"]
        ):
            return False
        self.open(
            "ablation",
            self.state.champion,
            last.rung,
            parent=last.parent,
            seeds=self.fresh_seeds(),
            factors=factors,
            source="judge",
            text=f"effects of {len(factors)} moves of {last.id}",
        )
        return True

    def design_of(self, x: Experiment) -> tuple:
        """A study's design and its twelve runs. Rows that are one configuration get a seed each:
        the same run counted twice would be no repetition."""
        design = comparison.plackett_burman(len(x.factors))
        seen = Counter()
        runs = []
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
        tests = comparison.effects(design, scores, noise)
        keep = [comparison.carries(t) for t in tests]
        slim = self.space.normal(toggled(x.change, x.factors, [1 if k else -1 for k in keep]))
        text = f"{sum(keep)} of {len(keep)} moves carry the gain"
        after = dict(anchor_after=slim) if x.kind == "ablation" or any(keep) else {}
        self.close(
            x,
            "ablated",
            text,
            suspect=comparison.suspect(design, scores, noise),
            **self.findings(x, keep, tests),
            **after,
        )

    def findings(self, x: Experiment, keep: Sequence[bool], tests: list[comparison.Test]) -> dict:
        """The effects of a study and the evidence that they are."""
        rows = [
            dict(claim=f["claim"], keep=bool(k), **self.numbers(t))
            for f, k, t in zip(x.factors, keep, tests)
        ]
        return dict(
            effects=rows,
            evidence=[self.piece_of_evidence(f, t, x) for f, t in zip(x.factors, tests)],
        )

    step_compose = step_ablation  # the same design over changes that were named by hand

    def open_pair(self) -> bool:
        """A 2x2 of the two changes that the last study suspects of an interaction, on fresh seeds:
        twelve runs."""
        last = next(reversed(self.state.experiments.values()))
        suspect = last.verdict.get(
            "suspect"
        )  # the anchor has not moved since: nothing was asked in between
        if not suspect or self.exhausted(last.rung, 4 * comparison.FRESH, reserve=True):
            return False
        study = self.state.experiments[last.study or last.id]
        factors = [study.factors[i] for i in suspect]
        both, none = (
            self.space.normal(toggled(self.state.anchor, factors, s)) for s in ((1, 1), (-1, -1))
        )
        self.open(
            "pair",
            both,
            last.rung,
            parent=none,
            study=study.id,
            seeds=self.fresh_seeds(),
            factors=factors,
            source="judge",
            text=f"{study.id} suspects that these two do not simply add up",
        )
        return True

    def step_pair(self, x: Experiment):
        """When two changes interact, the anchor takes their best corner, and the study's other
        effects are corrected for the third of the interaction that the design had mixed into
        them."""
        changes = [self.space.normal(toggled(x.change, x.factors, signs)) for signs in CORNERS]
        scores = self.gather(x, [(c, x.rung, s) for c in changes for s in x.seeds])
        if scores is None:
            return
        if None in scores:
            return self.close(x, "failed", "a run of the 2x2 failed")
        noise = self.state.noise(x.rung)
        n = len(x.seeds)
        study = self.state.experiments[x.study]
        corners = {signs: scores[i * n : (i + 1) * n] for i, signs in enumerate(CORNERS)}
        test = comparison.interaction(*corners.values(), noise)
        text = f"together {test.delta:+.4f} [{test.low:+.4f}, {test.high:+.4f}] beyond their sum"
        if test.low <= 0 <= test.high:
            return self.close(x, "no interaction", text, **self.numbers(test))
        found = {
            tuple(map(study.factors.index, p.factors)): p.verdict["delta"]
            for p in self.state.experiments.values()
            if p.study == x.study and p.verdict and p.verdict["verdict"] == "interaction"
        }
        pair = tuple(map(study.factors.index, x.factors))
        found[pair] = test.delta
        design, runs = self.design_of(study)
        measured = self.gather(x, runs)
        clean = [
            y - sum(d / 4 * row[i] * row[j] for (i, j), d in found.items())
            for y, row in zip(measured, design)
        ]
        tests = comparison.effects(design, clean, noise)
        best = comparison.best_corner(corners, noise)
        settled = {
            i: e["keep"]
            for i, e in enumerate(study.verdict["effects"])
            if any(i in p for p in found)
        }
        settled |= {i: sign > 0 for i, sign in zip(pair, best)}
        keep = [settled.get(i, comparison.carries(t)) for i, t in enumerate(tests)]
        slim = self.space.normal(
            toggled(self.state.anchor, study.factors, [1 if k else -1 for k in keep])
        )
        self.close(
            x,
            "interaction",
            text,
            suspect=comparison.suspect(design, measured, noise, list(found)),
            anchor_after=slim,
            **self.numbers(test),
            **self.findings(study, keep, tests),
        )

    def open_study(self) -> bool:
        """Open the study that is due, if one is."""
        return (
            self.open_ablation()
            or self.open_pair()
            or self.open_confirm()
            or self.open_retest()
            or self.open_promotion()
        )

    # Another rung.
    def promote(self, name: str, rung: str) -> str:
        """Open a run of an experiment's configuration on another rung, behind the base's own there;
        returns its name. Raises ForgeError."""
        x = self.state.experiments.get(name)
        if x is None or not x.change:
            raise ForgeError(f"{name}: want an experiment that changes something")
        if rung not in self.state.reference and not any(
            s.rung == rung for s in self.state.open("sentinel")
        ):
            self.open_sentinel(rung)
        return self.open(
            "promote",
            x.change,
            rung,
            skill=x.skill,
            seeds=self.config["seeds"]["search"][:1],
            source="human",
            text=f"{name}: asked for",
        )

    def open_promotion(self) -> bool:
        """Move the best third and a random tenth one rung up, so that transfer is measured and not
        assumed."""
        state = self.state
        search = self.config["search"]["rung"]
        up = self.config["search"].get("promote_to", "")
        if not up or self.exhausted(up, reserve=True):
            return False
        if up not in state.reference:
            if not any(x.kind == "sentinel" and x.rung == up for x in state.experiments.values()):
                self.open_sentinel(up)
                return True
            return False
        ranked = sorted(
            (s[0], x.id) for x in state.searches() if (s := state.scores(x.change, search))
        )
        best = {name for _, name in ranked[: len(ranked) // 3]}
        gone = {x.cid for x in state.experiments.values() if x.kind == "promote"}
        for _, name in ranked:
            x = state.experiments[name]
            lucky = int(digest([self.config["seed"], name]), 16) % 10 == 0
            if x.cid not in gone and (lucky or len(ranked) >= 3 and name in best):
                self.open(
                    "promote",
                    x.change,
                    up,
                    skill=x.skill,
                    seeds=self.config["seeds"]["search"][:1],
                    source="ladder",
                    text=f"{name}: " + ("random tenth" if name not in best else "best third"),
                )
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
            self.close(
                x, "promoted", "measured" if delta is not None else "a run failed", delta=delta
            )

"""What the loop learns beyond single moves: pairs that interact, simplifications, claims that grew
old, records of others, and skills that come and go. Rates are simulated through the code that the
campaign uses.
"""

import itertools
import json
import math

import fake_trainer
import forge_lab
import numpy as np
import pytest
from forge import (
    ForgeError,
    agent,
    comparison,
    confirmation,
    forge,
    harvest,
    report,
    sampler,
    skill_files,
    skill_review,
    standing,
)
from forge.ledger import Ledger
from forge.state import replay

CHANGE = dict(MATRIX_LR=0.022, MUON_MOMENTUM=0.98, WARMDOWN_ITERS=0.6)
QUIET = dict(budget=dict(experiments=0))


def settle(c, before: str = "stop", limit: int = 400):
    """Ticks until a campaign without search has nothing left to ask, or until it opens an
    experiment of a kind."""
    c.record("resumed", after="")
    for _ in range(limit):
        c.decide()
        if c.state.stopped or c.state.open(before):
            return c.state
        c.launch()
        c.ingest()
    raise AssertionError("it never ends")


def planted(tmp_path, effect, seed: int = 0, **more):
    """A campaign in which MATRIX_LR, MUON_MOMENTUM and WARMDOWN_ITERS are switches a, b and c worth
    effect(a, b, c) times the noise of one run."""

    def score(order):
        return 1.2 + 0.001 * effect(*(name in order["env"] for name in CHANGE))

    first = 10_000 * seed
    seeds = dict(
        search=list(range(first + 1, first + 21)),
        judge=list(range(first + 101, first + 106)),
        fresh_from=first + 1001,
    )
    return forge_lab.instant(tmp_path, score=score, seeds=seeds, **(QUIET | more))


# ---- Pairs ---------------------------------------------------------------------------------------
def followed_up(rng, factors: int, together: float, df: int = 20) -> tuple[bool, bool]:
    """Changes worth 2 sigma each, the first two of which give `together` sigma beyond their sum,
    through the design and the 2x2: whether the right interaction is claimed, and whether a wrong
    one is."""
    noise = comparison.Noise(math.sqrt(rng.chisquare(df) / df), df)  # the true sigma is 1
    design = comparison.plackett_burman(factors)
    truth = lambda on: -2.0 * sum(on) + together * (on[0] and on[1])  # noqa: E731
    pair = comparison.suspect(design, [truth(row > 0) + rng.normal() for row in design], noise)
    if pair is None:
        return False, False
    corners = [
        [
            truth([i in pair and corner[pair.index(i)] > 0 for i in range(factors)]) + rng.normal()
            for _ in range(comparison.FRESH)
        ]
        for corner in confirmation.CORNERS
    ]
    test = comparison.interaction(*corners, noise)
    claimed = not test.low <= 0 <= test.high
    return claimed and pair == (0, 1) and together != 0, claimed and (
        pair != (0, 1) or together == 0
    )


def test_interactions_are_found_and_none_is_invented():
    rng = np.random.default_rng(0)
    rate = lambda factors, together, n: np.mean(
        [
            followed_up(rng, factors, together)  # noqa: E731
            for _ in range(n)
        ],
        axis=0,
    )
    for factors in (2, 3, 5):
        assert rate(factors, 0.0, 400)[1] <= 0.03, factors
    for factors, size, found in ((2, -4.0, 0.9), (3, 4.0, 0.8), (3, -6.0, 0.99), (5, 6.0, 0.91)):
        right, wrong = rate(factors, size, 200)
        assert right == pytest.approx(found, abs=0.08) and wrong <= 0.03, (
            "the rates that the README states"
        )
    assert rate(7, -6.0, 5)[0] == 0, (
        "among seven changes a design of twelve runs cannot tell which pair it is"
    )


@pytest.mark.parametrize("factors, known", [(3, ()), (4, ()), (4, ((0, 1),)), (6, ())])
def test_the_suspected_pair_is_the_one_of_a_regression(factors, known):
    """Against the t-value of each product in a least-squares fit with all main effects."""
    rng = np.random.default_rng(factors)
    design = comparison.plackett_burman(factors).astype(float)
    y = rng.normal(0, 1, 12) + 3 * design[:, 1] * design[:, 2]
    products = {
        p: design[:, p[0]] * design[:, p[1]] for p in itertools.combinations(range(factors), 2)
    }
    sizes = {}
    for p in products.keys() - set(known):
        x = np.column_stack([np.ones(12), design, *(products[k] for k in known), products[p]])
        sizes[p] = abs(np.linalg.lstsq(x, y, rcond=None)[0][-1]) / math.sqrt(
            np.linalg.inv(x.T @ x)[-1, -1]
        )
    assert comparison.suspect(design, y, comparison.Noise(1.0, 20), known) == max(
        sizes, key=sizes.get
    )
    assert (
        comparison.suspect(
            design, 2 + design @ np.arange(factors), comparison.Noise(0.1, 20), known
        )
        is None
    )


def test_an_interaction_is_the_difference_of_differences():
    groups = [[1.0, 1.2], [2.0, 2.2], [3.0], [5.0, 5.0]]
    test = comparison.interaction(*groups, comparison.Noise(0.1, 10))
    assert test.delta == pytest.approx(1.1 - 2.1 - 3.0 + 5.0)
    assert test.delta / test.t == pytest.approx(0.1 * math.sqrt(1 / 2 + 1 / 2 + 1 + 1 / 2))


@pytest.mark.parametrize(
    "effect, wanted",
    [
        (lambda a, b, c: -6 * (a and b) - 3 * c, {frozenset(CHANGE)}),
        (
            lambda a, b, c: -8 * (a != b) - 3 * c,
            {
                frozenset(["MATRIX_LR", "WARMDOWN_ITERS"]),
                frozenset(["MUON_MOMENTUM", "WARMDOWN_ITERS"]),
            },
        ),
    ],
    ids=["only together", "either, but not both"],
)
def test_a_study_is_followed_by_a_2x2_and_the_anchor_takes_the_best_corner(
    tmp_path, effect, wanted
):
    right = 0
    for seed in range(6):
        c = planted(tmp_path, effect, seed)
        forge_lab.finish(c)
        study = c.compose([{name: value} for name, value in CHANGE.items()])
        state = settle(c, "confirm")
        pairs = [x for x in state.experiments.values() if x.kind == "pair"]
        right += (
            frozenset(state.anchor) in wanted
            and bool(pairs)
            and pairs[0].verdict["verdict"] == "interaction"
            and {n for f in pairs[0].factors for n in f["knobs"]} == {"MATRIX_LR", "MUON_MOMENTUM"}
        )
        if pairs and pairs[-1].verdict["verdict"] == "interaction":
            kept = {
                n
                for f, e in zip(
                    state.experiments[study].factors, state.experiments[study].verdict["effects"]
                )
                if e["keep"]
                for n in f["knobs"]
            }
            assert kept == set(state.anchor), "the study's effects are the corrected ones"
            assert {e["exp"] for known in state.evidence.values() for e in known} == {pairs[-1].id}
        assert replay(c.ledger.read()).digest() == state.digest()
    assert right >= 5, right
    assert pairs[-1].verdict["reason"] in report.page(standing.everything(c.view)), (
        "the last one's 2x2 is shown"
    )


def test_what_simply_adds_up_stays_and_is_rarely_asked_again(tmp_path):
    asked = claimed = 0
    for seed in range(12):
        c = planted(tmp_path, lambda a, b, c: -4 * (a + b + c), seed)
        forge_lab.finish(c)
        c.compose([{name: value} for name, value in CHANGE.items()])
        pairs = [x for x in settle(c, "confirm").experiments.values() if x.kind == "pair"]
        asked, claimed = (
            asked + len(pairs),
            claimed + any(x.verdict["verdict"] == "interaction" for x in pairs),
        )
        assert set(c.state.anchor) == set(CHANGE)
    assert asked <= 6 and claimed <= 1, (asked, claimed)


def test_rows_of_a_design_that_are_one_configuration_get_a_seed_each(tmp_path):
    """Two changes make four configurations: twelve runs, and not four of which each is counted
    three times."""
    c = planted(tmp_path, lambda a, b, c: 0.0)
    forge_lab.finish(c)
    name = c.compose([dict(MATRIX_LR=0.022), dict(WARMDOWN_ITERS=0.6)])
    design, runs = c.design_of(c.state.experiments[name])
    assert len({(sampler.config_id(change), seed) for change, _, seed in runs}) == 12 == len(design)


# ---- Simplification and old claims ---------------------------------------------------------------
@pytest.mark.parametrize(
    "worth, spare, kept",
    [(-6, 0, True), (0, -6, False), (-6, -4, False)],
    ids=["idle", "it was the gain", "a part of the gain"],
)
def test_a_champion_can_lose_a_change_that_does_nothing(tmp_path, worth, spare, kept):
    """The slimmer one is tested against what the champion had beaten, and must not be clearly worse
    than the champion; equality is never claimed. Two seeds may fail: 5 % of equal ones look clearly
    worse."""
    slim, both, right = dict(MATRIX_LR=0.022), dict(MATRIX_LR=0.022, WARMDOWN_ITERS=0.6), 0
    for seed in range(8):
        c = planted(
            tmp_path,
            lambda a, b, c: worth * a + spare * c,
            seed,
            loop=dict(confirm="end", ablation=False),
        )
        forge_lab.finish(c)
        name = c.open("confirm", both, "screen", parent={}, seeds=c.fresh_seeds(), factors=[])
        while not c.state.experiments[name].verdict:
            c.decide()
            c.launch()
            c.ingest()
        assert c.state.champion == both
        study = c.open("compose", both, "screen", parent={}, seeds=c.fresh_seeds(), factors=[])
        c.close(c.state.experiments[study], "ablated", "planted", effects=[], anchor_after=slim)
        last = [x for x in settle(c).experiments.values() if x.kind == "confirm"][-1]
        assert last.change == slim and last.parent == {} and c.state.anchor == c.state.champion
        assert (last.verdict["verdict"] == "confirmed") == (c.state.champion == slim)
        right += c.state.champion == (slim if kept else both)
    assert right >= 6, right


@pytest.mark.parametrize("effect, word", [(-4.0, "upheld"), (4.0, "not upheld")])
def test_a_proven_claim_that_grew_old_is_tested_once_more(tmp_path, effect, word):
    """On the anchor of today; with the change in the anchor, the other arm takes it out."""
    for anchor in ({}, dict(MATRIX_LR=0.022)):
        c = planted(tmp_path, lambda a, b, c: effect * a)
        forge_lab.finish(c)
        claim = dict(
            claim="optimizer: MATRIX_LR down",
            skill="optimizer",
            knobs=dict(MATRIX_LR=[0.04, 0.022]),
            rung="screen",
        )
        other = claim | dict(claim="optimizer: BETA2 up", knobs=dict(BETA2=[0.95, 0.97]))
        name = c.open("confirm", {}, "screen", parent={}, seeds=[1, 2, 3], factors=[])
        c.close(
            c.state.experiments[name],
            "refuted",
            "planted",
            anchor_after=anchor,
            evidence=[claim | dict(delta=-0.004, se=0.0005, parent=str(i)) for i in range(3)]
            + [other | dict(delta=-0.004, se=0.0005, parent="0")],
        )
        assert [r["status"] for r in skill_review.claims(c.state)] == [
            "heuristic",
            "proven",
        ] and not c.open_retest()
        for i in range(skill_review.STALE_AFTER):
            tried = c.open(
                "search", dict(INERT_A=round(0.001 * i, 6)), "screen", skill="inert", seeds=[1]
            )
            c.close(c.state.experiments[tried], "reject", "planted", delta=0.0, sigma=0.001)
        assert [(r["status"], r["was"]) for r in skill_review.claims(c.state)] == [
            ("stale", "heuristic"),
            ("stale", "proven"),
        ]
        assert c.open_retest()
        state = settle(c, "confirm")
        again = [x for x in state.experiments.values() if x.kind == "retest"]
        assert len(again) == 1 and again[0].verdict["verdict"] == word
        assert "MATRIX_LR" in again[0].change and "MATRIX_LR" not in again[0].parent
        assert not set(again[0].seeds) & set(
            c.config["seeds"]["search"] + c.config["seeds"]["judge"]
        )
        standing = next(r for r in skill_review.claims(state) if "MATRIX_LR" in r["claim"])
        assert standing["k"] == 4 and (standing["status"] == "proven") == (effect < 0)
        assert not c.open_retest()


# ---- Records of others ---------------------------------------------------------------------------
def record(root, name: str, bpb: float, seeds: int, script: str, readme: str = "", **table):
    folder = root / "track" / name
    folder.mkdir(parents=True)
    scores = {str(i): bpb + 1e-4 * i for i in range(seeds)}
    (folder / "submission.json").write_text(
        json.dumps(dict(val_bpb=bpb, date=name[:10], seed_results=scores) | table)
    )
    (folder / "train_gpt.py").write_text(script)
    (folder / "README.md").write_text(readme)


def tree(root):
    """Four records: the first, one better by its rate, one worse by its layers, one of
    records/tools.py."""
    read = 'a = os.environ.get("MATRIX_LR", 0.04)\n'
    read += 'b = int(os.environ.get("NUM_LAYERS", "9"))\nc = 524_288\n'
    record(root, "2026-03-01_first", 1.22, 1, read)
    record(
        root,
        "2026-03-02_rate",
        1.20,
        3,
        read,
        "```\nMATRIX_LR=0.022 SEED=1 torchrun train_gpt.py\n```",
    )
    record(
        root, "2026-03-03_deep", 1.21, 3, read, "NUM_LAYERS=12 MATRIX_LR=0.0220 python train_gpt.py"
    )
    record(root, "2026-03-04_ours", 1.19, 2, "")
    (root / "track" / "2026-03-04_ours" / "config.json").write_text(
        json.dumps(
            dict(
                knobs=dict(
                    matrix_lr=dict(value=0.022),
                    num_layers=dict(value=9),
                    warmdown_iters=dict(value=0.6),
                    flag=dict(value=True),
                )
            )
        )
    )
    return root


def test_a_record_speaks_for_the_knobs_that_it_changed(tmp_path):
    found = harvest.harvest(tree(tmp_path))
    assert {r["folder"][11:]: (r["bucket"], r["changed"]) for r in found["records"]} == dict(
        first=("Medium", []),
        rate=("High", ["MATRIX_LR"]),
        deep=("Low", ["NUM_LAYERS"]),
        ours=("High", []),
    )
    owners = dict(MATRIX_LR="optimizer", NUM_LAYERS="architecture", MIN_LR="schedule")
    assert harvest.prior(found, owners) == dict(optimizer=[3, 1], architecture=[1, 3])
    many = dict(
        records=[dict(bucket=b, changed=["MATRIX_LR"]) for b in ("High", "High", "Low", "Medium")]
    )
    assert harvest.prior(many, owners) == dict(
        optimizer=[pytest.approx(8 / 14 * 4, abs=1e-3), pytest.approx(6 / 14 * 4, abs=1e-3)]
    )
    assert [harvest.plain(v) for v in (1, "1.0", True, "524_288", "sp1024", "False")] == [
        "1",
        "1",
        "1",
        "524288",
        "sp1024",
        "0",
    ]


def tries(prior: dict, rng, worth: dict, n: int = 60) -> list[str]:
    """Which skills the bandit chooses when half of the tries of each win nothing, the others
    `worth` on average."""
    state = forge_lab.State()
    state.prior = prior
    chosen: list[str] = []
    won: list[float] = []
    original, sampler.credits = (
        sampler.credits,
        lambda _: [(s, g, 1.0) for s, g in zip(chosen, won)],
    )
    try:
        for _ in range(n):
            chosen.append(sampler.choose_skill(state, sorted(worth), rng))
            won.append(max(0.0, worth[chosen[-1]] * 2 * rng.random()) * (rng.random() < 0.5))
    finally:
        sampler.credits = original
    return chosen


def test_own_results_overcome_a_misleading_prior():
    worth = dict(good=0.002, fair=0.001, poor=0.0005, idle=0.0, other=0.0005)
    priors = dict(
        none={}, right=dict(good=[3, 1], idle=[1, 3]), wrong=dict(good=[1, 3], idle=[3, 1])
    )
    share = {}
    for name, prior in priors.items():
        rng = np.random.default_rng(1)
        runs = [tries(prior, rng, worth) for _ in range(40)]
        share[name] = [
            np.mean([[s == skill for s in r[a:b]] for r in runs])
            for skill in ("good", "idle")
            for a, b in ((0, 10), (30, 60))
        ]
    assert (
        share["right"][0] > share["none"][0] > share["wrong"][0]
        and share["wrong"][2] > share["none"][2]
    ), share
    assert np.abs(np.subtract(share["wrong"], share["none"]))[[1, 3]].max() <= 0.05, share


def test_a_large_model_whose_smaller_forms_were_all_tried_ends_no_campaign(tmp_path):
    c = forge_lab.instant(tmp_path, **QUIET)
    forge_lab.finish(c)
    for bits in c.space.knobs["MATRIX_BITS"].choices:
        c.record(
            "refused",
            proposal=dict(
                change=c.space.normal(dict(NUM_LAYERS=16, MATRIX_BITS=bits)),
                oversize=True,
                skill="architecture",
                reason="",
                at=len(c.state.experiments),
            ),
        )
    skill, change = sampler.propose(c.state, c.space)
    assert change != {} and skill in c.space.skills


# ---- Commands ------------------------------------------------------------------------------------
def told(capsys, *args) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line."""
    code = forge.main([str(a) for a in args])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_a_harvest_seeds_a_campaign(tmp_path, capsys):
    c = forge_lab.real(tmp_path)
    code, out, _ = told(capsys, "harvest", tree(tmp_path / "records"), "--into", c.folder)
    assert code == 0 and "architecture: 1 for, 3 against" in out
    state = replay(Ledger(c.folder / "events.jsonl").read())
    assert state.prior == dict(optimizer=[3, 1], architecture=[1, 3])
    assert json.loads(told(capsys, "skills", "--of", c.folder, "--json")[1])["prior"] == state.prior
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "changed a knob"),
        (tmp_path / "none", "no such folder"),
    ):
        code, _, error = told(capsys, "harvest", folder, "--into", c.folder)
        assert code == 2 and message in error


@pytest.mark.slow
def test_skills_come_and_go(tmp_path, capsys):
    """A new one is valid and searched, a retired one is left alone by sampler, agent and people,
    and comes back."""
    skills = {
        s: {n: k for n, k in table.items() if n != "MIN_LR"}
        for s, table in fake_trainer.SKILLS.items()
    }
    (tmp_path / "given").mkdir()
    c = forge_lab.real(tmp_path / "given", budget=dict(experiments=6), loop=dict(confirm="end"))
    (c.folder / "skills" / "schedule" / "assets" / "knobs.json").write_text(
        json.dumps(skills["schedule"])
    )
    new = [
        "skills",
        "new",
        "floor",
        "--of",
        c.folder,
        "--about",
        "Keeps a floor: under the rate.",
        "--knob",
    ]
    for knob, message in (
        ("MIN_LR=0.5", "want NAME=LOW:HIGH"),
        ("MIN_LR=0:9", "want a range inside 0 to 1"),
        ("NUM_LAYERS=4:8", "already belongs to skill architecture"),
        ("X=1:2", "no such knob"),
    ):
        code, _, error = told(capsys, *new, knob)
        assert code == 2 and message in error and not (c.folder / "skills" / "floor").exists()
    assert (
        told(capsys, *new, "MIN_LR=0:0.5")[0] == 0
        and skill_files.check(c.folder / "skills" / "floor") == []
    )
    assert told(capsys, *new, "MIN_LR=0:0.5")[0] == 2, "there is one already"
    assert told(capsys, "skills", "new", "../floor", "--of", c.folder, "--about", "x")[0] == 2
    assert told(capsys, "skills", "retire", "inert", "--of", c.folder)[0] == 0
    assert told(capsys, "skills", "retire", "inert", "--of", c.folder)[0] == 2
    assert told(capsys, "skills", "retire", "inert")[0] == 2, "only of a campaign"
    assert (
        "inert                  INERT_A, INERT_B, INERT_C (retired)"
        in told(capsys, "skills", "--of", c.folder)[1]
    )
    assert told(capsys, "skills", "validate", "--of", c.folder)[1] == "6 skills are valid\n"
    c.loop(60, pause=0.02)  # the same process, which must notice what other commands did
    chosen = {x.skill for x in c.state.searches()}
    assert (
        len(c.state.searches()) == 6
        and "inert" not in chosen
        and c.space.knobs["MIN_LR"].skill == "floor"
    )
    assert not any(set(x.change) & {"INERT_A", "INERT_B", "INERT_C"} for x in c.state.searches())
    assert told(capsys, "propose", c.folder, "--skill", "inert")[0] == 2
    with pytest.raises(ForgeError, match="INERT_A: of a retired skill"):
        agent.check(dict(env=dict(INERT_A=0.7)), c.view)
    assert "Retired: inert" in report.page(
        standing.everything(c.view)
    ) and "inert" in standing.marks(c.state)
    assert told(capsys, "skills", "restore", "inert", "--of", c.folder)[0] == 0
    assert told(capsys, "skills", "restore", "inert", "--of", c.folder)[0] == 2
    state = replay(Ledger(c.folder / "events.jsonl").read())
    assert (
        state.retired == set()
        and sum(
            sampler.choose_skill(state, ["inert", "floor"], np.random.default_rng(i)) == "inert"
            for i in range(20)
        )
        > 0
    )


def test_the_last_skill_cannot_retire(tmp_path, capsys):
    c = forge_lab.real(tmp_path)
    for skill in sorted(fake_trainer.SKILLS)[1:]:
        assert told(capsys, "skills", "retire", skill, "--of", c.folder)[0] == 0
    code, _, error = told(
        capsys, "skills", "retire", sorted(fake_trainer.SKILLS)[0], "--of", c.folder
    )
    assert code == 2 and "last one" in error


@pytest.mark.parametrize(
    "answers, proposals, calls",
    [
        ([dict(env=dict(MATRIX_LR=0.022))], 1, [True]),
        ([dict(env=dict(MATRIX_LR=9)), dict(env=dict(MATRIX_LR=0.022))], 1, [False, True]),
        ([dict(env=dict(SEED=9)), dict(env=dict(SEED=9))], 0, [False, False]),
        ([dict(env=dict(NUM_LAYERS=16, MODEL_DIM=640))], 1, [True]),
    ],
    ids=["good", "repaired", "refused", "too large"],
)
def test_the_agent_shows_a_proposal_without_running_it(tmp_path, capsys, answers, proposals, calls):
    for i, answer in enumerate(answers):
        (tmp_path / f"answer{i}").write_text(
            json.dumps(dict(schema="forge.hypothesis/1", hypothesis="h") | answer)
        )
    command = (
        f"cat > /dev/null; cd {tmp_path}; n=$(ls asked.* 2>/dev/null | wc -l); touch asked.$n; "
        "cat answer$n"
    )
    c = forge_lab.real(tmp_path, agent=dict(cmd=command), budget=dict(experiments=5, agent_calls=2))
    code, out, _ = told(capsys, "propose", c.folder, "--agent", "--skill", "optimizer", "--json")
    found, state = json.loads(out), replay(Ledger(c.folder / "events.jsonl").read())
    assert (
        code == 0
        and len(found["proposals"]) == proposals
        and [call["ok"] for call in found["calls"]] == calls
    )
    assert len(state.agent_calls) == len(calls) and not state.experiments and not state.runs
    if proposals:
        made = found["proposals"][0]
        assert made["env"].keys() >= answers[-1]["env"].keys()
        assert bool(made["refused"]) == ("NUM_LAYERS" in made["env"]), "by what the plan foretells"
    while len(state.agent_calls) < 2:
        (tmp_path / f"answer{len(state.agent_calls)}").write_text("nothing")
        assert "nothing" not in told(capsys, "propose", c.folder, "--agent")[1]
        state = replay(Ledger(c.folder / "events.jsonl").read())
    code, _, error = told(capsys, "propose", c.folder, "--agent")
    assert code == 2 and "budget for the agent is used" in error


def test_without_an_agent_there_is_none_to_ask(tmp_path, capsys):
    c = forge_lab.real(tmp_path)
    code, _, error = told(capsys, "propose", c.folder, "--agent")
    assert code == 2 and "no agent" in error

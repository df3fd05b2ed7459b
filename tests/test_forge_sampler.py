"""The search: better than random, than hill-climbing and than one TPE over all knobs; skills that
do nothing starve."""

from collections import Counter

import fake_trainer
import forge_lab
import numpy as np
import optuna
import pytest
from forge import sampler
from forge.space import Space, config_id

SPACE = Space.build(forge_lab.DESCRIBED, fake_trainer.SKILLS, {})
RUNS = 60
SEEDS = 12
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def noisy(change: dict, rng) -> tuple[bool, float]:
    v = forge_lab.values(SPACE.resolve(change, dict(steps=100)))
    return fake_trainer.model_bytes(v) + 1000 <= fake_trainer.BUDGET, fake_trainer.true_score(
        v
    ) + 0.001 * rng.normal()


def with_optuna(chosen, seed: int) -> float:
    """Share of the gain that Optuna finds on its own: best of RUNS feasible runs, infeasible draws
    repeated."""
    rng, study = np.random.default_rng(seed), optuna.create_study(sampler=chosen)
    table = {n: sampler.distribution(k) for n, k in SPACE.knobs.items()}
    best = ({}, fake_trainer.DEFAULT)
    for _ in range(RUNS):
        for _ in range(sampler.REDRAWS):
            trial = study.ask(table)
            change = SPACE.normal({n: SPACE.knobs[n].clip(v) for n, v in trial.params.items()})
            fits, score = noisy(change, rng)
            study.tell(trial, score if fits else best[1] + 0.1)
            if fits:
                best = min(best, (change, score), key=lambda b: b[1])
                break
    return forge_lab.share(best[0], SPACE)


def hill_climb(seed: int) -> float:
    """One to three knobs at a time by a fifth of their range, lower is kept."""
    rng, best = np.random.default_rng(seed), ({}, fake_trainer.DEFAULT)
    for _ in range(RUNS):
        for _ in range(sampler.REDRAWS):
            change = dict(SPACE.values(best[0]))
            for name in rng.choice(list(change), 1 + rng.integers(3), replace=False):
                k = SPACE.knobs[name]
                if k.kind == "choice":
                    change[name] = k.choices[rng.integers(len(k.choices))]
                    continue
                low, high, x = (
                    np.log([k.low, k.high, float(change[name])])
                    if k.log
                    else (k.low, k.high, float(change[name]))
                )
                x = min(max(x + 0.2 * rng.normal() * (high - low), low), high)
                change[name] = k.clip(np.exp(x) if k.log else x)
            change = SPACE.normal(change)
            fits, score = noisy(change, rng)
            if fits:
                best = min(best, (change, score), key=lambda b: b[1])
                break
    return forge_lab.share(best[0], SPACE)


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory):
    """The forge's own search on the planted problem, its claims judged at the end."""
    found = []
    for seed in range(SEEDS):
        c = forge_lab.instant(
            tmp_path_factory.mktemp("lab"),
            seed=seed,
            budget=dict(experiments=RUNS),
            loop=dict(confirm="end"),
        )
        while len(c.state.searches()) < RUNS:
            c.locked_tick()
        searched = c.state.anchor
        found.append((c, forge_lab.share(searched, c.space), forge_lab.finish(c)))
    return found


def test_the_planted_problem_is_what_it_says():
    default = {n: f.default for n, (_, f) in fake_trainer.KNOBS.items()}
    assert fake_trainer.true_score(default) == pytest.approx(fake_trainer.DEFAULT, abs=1e-6)
    best = default | dict(
        num_layers=12,
        model_dim=448,
        mlp_mult=3.5,
        matrix_lr=0.021867,
        scalar_lr=0.019941,
        muon_momentum=0.980375,
        beta2=0.969795,
        warmdown_iters=60,
        min_lr=0.05,
        matrix_bits=6,
        clip_sigmas=8.016,
    )
    assert fake_trainer.true_score(best) == pytest.approx(fake_trainer.BEST, abs=1e-6)
    assert (
        fake_trainer.model_bytes(best)
        < fake_trainer.BUDGET
        < fake_trainer.model_bytes(best | dict(matrix_bits=8))
    )


@pytest.mark.slow
def test_search_beats_random(campaigns):
    """Acceptance 1, with three times its seeds."""
    ours = np.array([share for _, share, _ in campaigns])
    random = np.array([with_optuna(optuna.samplers.RandomSampler(seed=s), s) for s in range(SEEDS)])
    assert ours.mean() >= 0.55 and (ours > random).all(), (ours, random)
    assert (ours.mean() - random.mean()) * (fake_trainer.DEFAULT - fake_trainer.BEST) >= 0.010


@pytest.mark.slow
def test_search_beats_hill_climbing_and_plain_tpe(campaigns):
    """Acceptance 2: by 0.05 of the attainable gain on the mean of 12 seeds."""
    ours = np.mean([share for _, share, _ in campaigns])
    tpe = np.mean(
        [
            with_optuna(optuna.samplers.TPESampler(multivariate=True, seed=s), s)
            for s in range(SEEDS)
        ]
    )
    hill = np.mean([hill_climb(s) for s in range(SEEDS)])
    assert ours >= max(tpe, hill) + 0.05, (ours, tpe, hill)


@pytest.mark.slow
def test_a_skill_that_does_nothing_starves_and_is_flagged(campaigns):
    """Acceptance 3: of runs 10 to 60 the skill without effect gets at most 16 %, and the campaign's
    own last word says so in 80 % of the seeds; no useful skill is called inert in more than 10
    %."""
    late = [x.skill for c, _, _ in campaigns for x in c.state.searches()[10:]]
    assert late.count("inert") / len(late) <= 0.16, late.count("inert") / len(late)
    called = Counter(skill for _, _, state in campaigns for skill in state.metas[-1]["inert"])
    assert called.pop("inert") >= 0.8 * SEEDS and all(n <= 0.1 * SEEDS for n in called.values()), (
        called
    )


@pytest.mark.slow
def test_proposals_stay_inside_one_skill_and_never_repeat(campaigns):
    for c, _, state in campaigns[:3]:
        searches = [x for x in state.experiments.values() if x.kind == "search"]
        assert len({x.cid for x in searches}) == len(searches)
        for x in searches:
            before, after = c.space.values(x.parent), c.space.values(x.change)
            moved = {c.space.knobs[n].skill for n in before if before[n] != after[n]}
            assert moved <= {x.skill, "compression"}, "compression joins what was too large"


@pytest.mark.slow
def test_no_run_was_started_that_the_plan_foretold_to_be_too_large(campaigns):
    """Acceptance 11: too large by more than the forecast's own error, which is 1 % until two have
    met their size."""
    for _, _, state in campaigns:
        sizes = [
            r.record["artifact_bytes"]
            for r in state.runs.values()
            if state.experiments[r.exp].kind == "search"
        ]
        assert (
            max(sizes[:2]) <= 1.01 * fake_trainer.BUDGET and max(sizes[2:]) <= fake_trainer.BUDGET
        )
        assert any(p["oversize"] for p in state.refused)


def test_a_proposal_depends_on_the_ledger_alone(tmp_path):
    a, b = (forge_lab.instant(tmp_path, seed=3, budget=dict(experiments=10)) for _ in range(2))
    for c in (a, b):
        forge_lab.finish(c)
    assert sampler.propose(a.state, a.space) == sampler.propose(b.state, b.space)
    other = forge_lab.instant(tmp_path, seed=4, budget=dict(experiments=10))
    assert [x.cid for x in forge_lab.finish(other).experiments.values()][1:] != [
        x.cid for x in a.state.experiments.values()
    ][1:]


def test_a_change_has_one_form():
    """Values equal to the base and knobs without effect are no changes; equal configurations get
    equal names."""
    described = forge_lab.DESCRIBED | dict(
        knobs=forge_lab.DESCRIBED["knobs"]
        | dict(
            CLIP_SIGMAS=dict(forge_lab.DESCRIBED["knobs"]["CLIP_SIGMAS"], needs="matrix_bits < 8")
        )
    )
    space = Space.build(described, fake_trainer.SKILLS, {})
    assert space.normal(dict(NUM_LAYERS=9, MATRIX_LR=0.04)) == {}
    assert space.normal(dict(CLIP_SIGMAS=9.0)) == {}
    kept = space.normal(dict(CLIP_SIGMAS=9.00001, MATRIX_BITS=6))
    assert kept == dict(CLIP_SIGMAS=9.0, MATRIX_BITS="6")
    assert config_id(kept) == config_id(space.normal(dict(MATRIX_BITS="6", CLIP_SIGMAS="9.0")))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(NUM_LAYER=3), "unknown knob NUM_LAYER"),
        (dict(NUM_LAYERS=99), "NUM_LAYERS=99: want 4 to 16"),
        (dict(MATRIX_BITS=3), "MATRIX_BITS=3: want one of 4, 5, 6, 7, 8"),
        (dict(MATRIX_LR="x"), "want a number"),
    ],
)
def test_bad_changes_are_named(change, message):
    with pytest.raises(forge_lab.campaign_module.ForgeError, match=message):
        SPACE.normal(change)


def test_steps_are_stored_as_parts_of_the_run():
    change = SPACE.normal(dict(WARMDOWN_ITERS=0.5))
    assert SPACE.resolve(change, dict(steps=100))["WARMDOWN_ITERS"] == "50"
    assert SPACE.resolve(change, dict(steps=20_000))["WARMDOWN_ITERS"] == "10000"


def test_all_mistakes_of_skills_are_reported_at_once():
    skills = dict(
        a=dict(NUM_LAYERS=dict(low=4, high=99), TYPO=dict(low=1, high=2)),
        b=dict(
            NUM_LAYERS=dict(low=4, high=8),
            INERT_C=dict(choices=["one", "four"]),
            MATRIX_LR=dict(low=0, high=1, log=True),
        ),
    )
    with pytest.raises(forge_lab.campaign_module.ForgeError) as error:
        Space.build(forge_lab.DESCRIBED, skills, {})
    for part in (
        "range 4 to 99: want a range inside 1 to 64",
        "the script has no such knob",
        "choices four",
        "a logarithmic range begins above 0",
    ):
        assert part in str(error.value)
    twice = dict(a=dict(NUM_LAYERS=dict(low=4, high=8)), b=dict(NUM_LAYERS=dict(low=4, high=8)))
    with pytest.raises(forge_lab.campaign_module.ForgeError, match="already belongs to skill a"):
        Space.build(forge_lab.DESCRIBED, twice, {})

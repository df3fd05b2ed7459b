"""The loop with real processes: limits that kill, budgets that hold, scores that survive checks,
and its commands."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fake_trainer
import forge_lab
import pytest
from conftest import ROOT
from forge import (
    ForgeError,
    campaign,
    comparison,
    forecasts,
    processes,
    publish,
    report,
    run_record,
    runner,
    sandbox,
    settings,
    skill_files,
    skill_review,
    standing,
    verbs,
)
from forge.ledger import Ledger, locked
from forge.state import replay


def processes_of(folder: Path) -> list[int]:
    """Living processes that mention a folder in their command line or run inside it."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                where = os.readlink(f"/proc/{entry}/cwd") + open(f"/proc/{entry}/cmdline").read()
            except OSError:
                continue
            if str(folder) in where and processes.identity(int(entry)):
                found.append(int(entry))
    return found


def outcomes(c) -> list[str]:
    return [r.record["status"] for r in c.state.runs.values() if r.finished]


@pytest.mark.slow
def test_a_run_that_ignores_its_end_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    """Acceptance 10: SIGTERM ignored, a grandchild, and a process that left the session; the next
    run is unharmed."""
    c = forge_lab.real(
        tmp_path, dict(by_seed={"1": "stubborn"}), rungs=dict(screen=dict(kill_s=4.0, env={}))
    )
    monkeypatch.setattr(runner, "GRACE", 1.0)
    c.locked_tick()
    run = c.running()[0]
    c.runs.stop([run.key])
    begin = time.monotonic()
    record = runner.supervise(c.folder / "runs" / run.key)
    assert record["status"] == "timeout" and "ran longer than 4 s" in record["reason"]
    assert record["metrics"]["val_bpb"] is None and time.monotonic() - begin < 15
    assert not processes_of(c.folder / "runs" / run.key), "something survived"
    c.locked_tick()
    after = c.running()[0]
    assert after.seed == 2 and runner.supervise(c.folder / "runs" / after.key)["status"] == "ok"


@pytest.mark.parametrize(
    "trick, status, reason",
    [
        ("crash", "crash", "planted crash"),
        ("nan", "nan", "nan in the training loss"),
        ("silent", "timeout", "stalled: no output for 1 s"),
        ("fake_line", "tampered", "2 official score lines"),
        ("short_text", "tampered", "do not follow"),
    ],
)
def test_only_a_sound_run_has_a_score(tmp_path, trick, status, reason):
    """Acceptance 16: a second final line and a shortened text make a run tampered."""
    c = forge_lab.real(
        tmp_path, dict(always=trick), rungs=dict(screen=dict(kill_s=20, stall_s=1, env={}))
    )
    c.locked_tick()
    key = c.running()[0].key
    while c.runs.poll(key)[0] != "done":
        time.sleep(0.05)
    record = c.runs.poll(key)[1]
    assert record["status"] == status and reason in record["reason"], record["reason"]
    assert record["metrics"]["val_bpb"] is None


def test_a_base_that_does_not_run_stops_the_campaign_with_the_reason(tmp_path):
    c = forge_lab.real(tmp_path, dict(always="crash"))
    c.loop(30, pause=0.05)
    assert "does not run" in c.state.stopped and "planted crash" in c.state.stopped
    assert c.state.searches() == []


def test_a_failure_of_the_machine_can_be_tried_again(tmp_path):
    c = forge_lab.real(
        tmp_path, dict(by_seed={"2": "crash"}), budget=dict(experiments=1), loop=dict(confirm="end")
    )
    c.loop(30, pause=0.05)
    assert "does not run" in c.state.stopped
    key = next(k for k, r in c.state.runs.items() if r.record and r.record["status"] == "crash")
    (c.script().parent / "tricks.json").unlink()
    assert forge_lab.here("retry", c.folder, key).returncode == 0
    assert forge_lab.here("retry", c.folder, "e000001").returncode == 2
    again = campaign.Campaign(c.folder)
    again.record("resumed", after="")
    again.loop(60, pause=0.05)
    assert len(again.state.searches()) == 1 and again.state.runs[key].score is not None
    assert len(list((c.folder / "runs").glob(f"{key}.forgotten-*"))) == 1


def test_a_missing_package_or_a_locked_folder_is_one_clear_error(tmp_path):
    """Acceptance 17: -S hides every installed package."""
    c = forge_lab.real(tmp_path)
    command = [sys.executable, "-S", *forge_lab.FORGE[1:], "status", str(c.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "is not installed: pip install" in done.stderr
        and "Traceback" not in done.stderr
    )
    (tmp_path / "file").write_text("")
    done = forge_lab.forge(
        "init", tmp_path / "file" / "c", "--script", forge_lab.FAKE, "--skills", tmp_path / "skills"
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_a_script_without_its_packages_and_a_machine_without_programs(tmp_path):
    """Acceptance 17: no torch is one clear error; no git, no bwrap and no GPU cost nothing but
    patches."""
    script = tmp_path / "train_gpt.py"
    script.write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    args = [
        "--script",
        script,
        "--skills",
        forge_lab.write_skills(tmp_path / "skills"),
        "--experiments",
        1,
        "--rung",
        "screen.sentinel_runs=1",
    ]
    done = forge_lab.forge("start", tmp_path / "c", *args)
    assert (
        done.returncode == 2 and "cannot read its knobs" in done.stderr and "'torch'" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "c").exists()
    script.write_bytes(forge_lab.FAKE.read_bytes())
    empty = tmp_path / "bin"
    empty.mkdir()
    bare = dict(os.environ, PATH=str(empty), CUDA_VISIBLE_DEVICES="")
    done = forge_lab.forge("start", tmp_path / "c", *args, env=bare)
    assert done.returncode == 0 and "stopped: experiments: 1 of 1 done" in done.stdout, done.stderr
    done = forge_lab.forge("doctor", "--script", script, env=bare)
    assert done.returncode == 0 and "0: knobs only; patches are refused" in done.stdout, (
        done.stdout + done.stderr
    )


def test_patches_are_refused_without_a_sandbox(tmp_path, monkeypatch):
    """Acceptance 17: neither bwrap nor unshare."""
    monkeypatch.setattr(sandbox, "works", lambda kind: False)
    with pytest.raises(ForgeError, match="patches need a sandbox: install bwrap"):
        sandbox.cage(tmp_path / "run", forge_lab.FAKE)
    assert sandbox.cage(tmp_path / "run", forge_lab.FAKE, allow_none=True) == []


@pytest.mark.slow
@pytest.mark.skipif(not sandbox.works("unshare"), reason="no mount namespace for this user here")
def test_a_full_disk_and_a_read_only_one(tmp_path):
    """Acceptance 17: a small tmpfs that is full, and then a read-only one: one clear error, nothing
    acknowledged is lost, and the campaign goes on once there is room."""
    skills, script, place = (
        forge_lab.write_skills(tmp_path / "skills"),
        tmp_path / "train_gpt.py",
        tmp_path / "disk",
    )
    script.write_bytes(forge_lab.FAKE.read_bytes())
    place.mkdir()
    tool = " ".join(forge_lab.FORGE)
    steps = f"""mount -t tmpfs -o size=64m none {place}
{tool} init {place}/c --script {script} --skills {skills} --experiments 1 --set budget.disk_gib=0 \\
    --rung screen.sentinel_runs=1; echo code $?
head -c 90000000 /dev/zero > {place}/fill
{tool} run {place}/c; echo code $?
rm {place}/fill
mount -o remount,ro {place}
{tool} run {place}/c; echo code $?
mount -o remount,rw {place}
{tool} run {place}/c; echo code $?
{tool} verify {place}/c; echo code $?"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", steps], capture_output=True, text=True, timeout=200
    )
    codes = re.findall(r"^code (\d+)", done.stdout, re.M)
    assert codes == ["0", "2", "2", "0", "0"] and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    assert "1 of 1 done" in done.stdout and "every checksum holds" in done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 2, (
        done.stderr
    )


def test_a_failed_experiment_costs_itself_only(tmp_path):
    c = forge_lab.real(
        tmp_path,
        dict(by_seed={"2": "crash"}),
        rungs=dict(screen=dict(kill_s=20, sentinel_runs=1, prior_sigma=0.001, env={})),
        budget=dict(experiments=3),
        loop=dict(confirm="end"),
    )
    c.loop(60, pause=0.05)
    verdicts = [x.verdict["reason"][:5] for x in c.state.searches()]
    assert (
        verdicts.count("crash") == 1
        and len(verdicts) == 3
        and c.state.searches()[1].verdict["delta"] is None
    )


def test_budgets_hold(tmp_path):
    """Acceptance 11: runs, minutes and deadline; the reserve for a confirmation stays."""
    c = forge_lab.instant(tmp_path, budget=dict(experiments=100, runs=20))
    state = forge_lab.finish(c)
    assert len([r for r in state.runs.values() if r.started]) <= 20 and "runs" in state.stopped
    kinds = [x.kind for x in state.experiments.values() if x.verdict]
    assert "confirm" in kinds or state.anchor == state.champion
    c = forge_lab.instant(tmp_path, budget=dict(experiments=100, minutes=30.0))
    state = forge_lab.finish(c)  # every run takes one minute
    assert (
        15 <= state.minutes() <= 31 and "minutes" in state.stopped and "in reserve" in state.stopped
    )
    c = forge_lab.instant(
        tmp_path, budget=dict(experiments=100, minutes=3.0), kind=forge_lab.QuickRuns
    )
    state = forge_lab.finish(c)
    assert 1.5 <= state.minutes() <= 3.0 + 2 / 60 and "minutes: " in state.stopped
    c = forge_lab.instant(tmp_path, budget=dict(experiments=100, deadline="2020-01-01T00:00:00Z"))
    assert forge_lab.finish(c).runs and not any(r.started for r in c.state.runs.values())
    assert "deadline" in c.state.stopped


@pytest.mark.parametrize(
    "part, value, status",
    [
        ("host", {"class": "other"}, "invalid"),
        ("data", dict(val_tokens=999, val_bytes=2500, tokenizer_sha256="x"), "tampered"),
    ],
)
def test_scores_of_other_hosts_and_other_text_do_not_count(tmp_path, part, value, status):
    c = forge_lab.instant(tmp_path, budget=dict(experiments=1), loop=dict(confirm="end"))
    poll = c.runs.poll
    c.runs.poll = lambda key: ("done", poll(key)[1] | ({part: value} if c.state.reference else {}))
    state = forge_lab.finish(c)
    assert [r.record["status"] for r in state.runs.values()] == ["ok"] * 3 + [status]
    assert (
        state.searches()[0].verdict["verdict"] == "reject"
        and state.searches()[0].verdict["delta"] is None
    )


def test_what_the_reserve_is_for(tmp_path):
    """When only the reserve is left, an unconfirmed anchor goes straight to fresh seeds."""
    for seed in range(6):
        c = forge_lab.instant(
            tmp_path, seed=seed, budget=dict(experiments=100, runs=24), loop=dict(confirm="end")
        )
        state = forge_lab.finish(c)
        confirms = [x for x in state.experiments.values() if x.kind == "confirm" and x.verdict]
        if confirms:
            assert len(confirms[0].seeds) == comparison.FRESH and len(state.runs) <= 24
            return
    raise AssertionError("no campaign reached a confirmation")


def test_hopeless_runs_of_the_search_end_halfway_and_no_other_does(tmp_path):
    """Savings without distortion: what was cut is worse than the anchor of its moment, judging runs
    are whole."""
    cut = whole = better = 0
    for seed in range(4):
        c = forge_lab.instant(
            tmp_path, seed=seed, kind=forge_lab.HalfwayRuns, budget=dict(experiments=40)
        )
        state = forge_lab.finish(c)
        assert len(state.searches()) == 40 and all(
            r.record["status"] in ("ok", "pruned") for r in state.runs.values()
        )
        for run in state.runs.values():
            x = state.experiments[run.exp]
            if run.record["status"] != "pruned":
                whole += x.kind == "search"
                continue
            assert (
                x.kind == "search" and run.seed == x.seeds[0] and x.verdict["verdict"] == "reject"
            )
            assert x.verdict["delta"] > 0 and "forecast" in x.verdict["reason"]
            cut += 1
            truth = [
                fake_trainer.true_score(forge_lab.values(c.space.resolve(change, c.rung("screen"))))
                for change in (run.change, x.parent)
            ]
            better += truth[0] < truth[1]
        stopped = sum(r.forecast["stop"] for r in state.runs.values() if r.forecast)
        spared = [
            r
            for r in state.runs.values()
            if r.forecast and r.forecast["chance"] < 0.05 and not r.forecast["stop"]
        ]
        assert (
            stopped == sum(r.record["status"] == "pruned" for r in state.runs.values()) and spared
        )
    assert cut > 30 and better / cut <= 0.05, (cut, whole, better)


def test_forecasts_that_were_wrong_end_nothing(tmp_path, monkeypatch):
    """Losses that say nothing about scores: intervals miss or are wide, and every run is whole."""
    monkeypatch.setattr(
        forge_lab.HalfwayRuns, "partway", lambda self, key: self.loss(key) + 1.0
    )  # not what is kept
    c = forge_lab.instant(
        tmp_path, kind=forge_lab.HalfwayRuns, budget=dict(experiments=30), loop=dict(confirm="end")
    )
    state = forge_lab.finish(c)
    assert not forecasts.trusted(state) and forecasts.calibration(state)[0] >= 5
    assert all(r.record["status"] == "ok" for r in state.runs.values())


@pytest.mark.slow
def test_a_pruned_process_ends_and_has_no_score(tmp_path):
    c = forge_lab.real(tmp_path, dict(pause=0.1, steps=40))
    c.locked_tick()
    key = c.running()[0].key
    while c.runs.partway(key) is None:
        time.sleep(0.02)
    assert c.runs.poll(key) == ("running", None)
    c.runs.prune(key, "forecast 9")
    while c.runs.poll(key)[0] != "done":
        time.sleep(0.02)
    record = c.runs.poll(key)[1]
    assert (record["status"], record["reason"]) == ("pruned", "pruned: forecast 9")
    assert record["metrics"]["val_bpb"] is None and record["metrics"]["steps"] < 40


def test_the_last_champion_is_compared_with_the_base(tmp_path):
    """Two confirmed chapters: the gain in all comes from fresh seeds and not from the sum of two
    selected gains."""
    c = forge_lab.instant(tmp_path, budget=dict(experiments=40), loop=dict(ablation=False))
    state = forge_lab.finish(c)
    confirmed = [
        x
        for x in state.experiments.values()
        if x.kind == "confirm" and x.verdict["verdict"] == "confirmed"
    ]
    closing = [x for x in state.experiments.values() if x.kind == "closing"]
    assert len(confirmed) >= 2 and len(closing) == 1 and closing[0].change == state.champion
    v = closing[0].verdict
    assert (
        v["verdict"] == "upheld"
        and v["ci95"][1] < 0
        and len(v["scores_new"]) == len(v["scores_old"]) == comparison.FRESH
    )
    truth = fake_trainer.true_score(
        forge_lab.values(c.space.resolve(state.champion, c.rung("screen")))
    )
    assert v["delta"] == pytest.approx(truth - fake_trainer.DEFAULT, abs=4 * 0.001 * (2 / 3) ** 0.5)
    assert not set(closing[0].seeds) & {s for x in confirmed for s in x.seeds}


@pytest.mark.parametrize("seed", range(4))
def test_a_campaign_within_its_minutes_ends_with_its_confirmation(tmp_path, seed):
    """Champions that take half as long again: the reserve is counted in their own minutes."""

    class Slower(forge_lab.InstantRuns):
        def poll(self, key):
            state, record = super().poll(key)
            record["metrics"]["wall_s"] = 60.0 + 30.0 * ("MATRIX_LR" in self.orders[key]["env"])
            return state, record

    for confirm in ("end", "large"):
        c = forge_lab.instant(
            tmp_path,
            seed=seed,
            kind=Slower,
            budget=dict(experiments=100, minutes=40.0),
            loop=dict(confirm=confirm, workers=2),
        )
        state = forge_lab.finish(c)
        assert state.minutes() <= 40.0 + 2 * 1.5, "never exceeded by more than what was running"
        assert not state.open(), "no experiment is left half done"
        tested = [x for x in state.experiments.values() if x.kind == "confirm"]
        assert tested and (
            standing.gain_in_all(state) or all(x.verdict["verdict"] == "refuted" for x in tested)
        )


def test_what_costs_more_operations_is_refused_before_it_starts(tmp_path):
    c = forge_lab.instant(
        tmp_path, budget=dict(experiments=30), loop=dict(confirm="end"), search=dict(max_flops=1.1)
    )
    flops = lambda env: float(forge_lab.values(env)["num_layers"])  # noqa: E731
    c.plan = lambda change, env: forge_lab.plan(change, env) | dict(flops=flops(env))
    state = forge_lab.finish(c)
    assert all(flops(r.env) <= 9.9 for r in state.runs.values()) and len(state.searches()) == 30
    reasons = [p["reason"] for p in state.refused if "operations per token" in p["reason"]]
    assert reasons and all("the limit is 1.1" in r for r in reasons)


def test_runs_of_equal_tokens_never_end_by_the_clock():
    space = forge_lab.Space.build(
        forge_lab.DESCRIBED
        | dict(values=forge_lab.DESCRIBED["values"] | dict(TRAIN_BATCH_TOKENS=100)),
        fake_trainer.SKILLS,
        {},
    )
    rung = dict(steps=50, tokens=1000, env=dict(MAX_WALLCLOCK_SECONDS="30", EVAL="chunked"))
    env = space.resolve(dict(WARMDOWN_ITERS=0.5), rung)
    assert env == dict(
        ITERATIONS="10", MAX_WALLCLOCK_SECONDS="0", EVAL="chunked", WARMDOWN_ITERS="5"
    )


def test_relative_data_paths_belong_to_the_checkout():
    from forge.space import located

    env = located(
        dict(DATA_PATH="data/x", TOKENIZER_PATH="/abs/t.model", SEED="1"),
        Path("/c/code/1/train_gpt.py"),
    )
    assert env == dict(DATA_PATH="/c/code/1/data/x", TOKENIZER_PATH="/abs/t.model", SEED="1")
    assert located(dict(DATA_PATH="auto"), Path("/c/train_gpt.py")) == dict(DATA_PATH="auto")


def test_search_judge_and_fresh_seeds_are_never_mixed(tmp_path):
    c = forge_lab.instant(tmp_path, seed=5, budget=dict(experiments=40))
    state = forge_lab.finish(c)
    seeds = c.config["seeds"]
    studies = [x for x in state.experiments.values() if x.kind in ("confirm", "ablation")]
    assert studies and all(min(x.seeds) >= seeds["fresh_from"] for x in studies)
    used = [s for x in studies for s in x.seeds]
    assert len(used) == len(set(used)), "a fresh seed was used twice"
    for run in state.runs.values():
        if state.experiments[run.exp].kind in ("search", "sentinel"):
            assert run.seed in seeds["search"]


def test_a_chapter_ablation_drops_what_does_nothing(tmp_path):
    """A planted move of an inert knob goes, the useful ones stay and become evidence."""
    c = forge_lab.instant(tmp_path, budget=dict(experiments=4))
    useful, idle = dict(MATRIX_LR=0.022, WARMDOWN_ITERS=0.6), dict(INERT_A=0.9)
    forge_lab.finish(c, 2)
    factors = [
        dict(
            exp="e1",
            skill="optimizer",
            knobs=dict(MATRIX_LR=[0.04, 0.022]),
            claim="optimizer: lower rate",
        ),
        dict(exp="e2", skill="inert", knobs=dict(INERT_A=[0.5, 0.9]), claim="inert: INERT_A up"),
        dict(
            exp="e3",
            skill="schedule",
            knobs=dict(WARMDOWN_ITERS=[0.3, 0.6]),
            claim="schedule: longer",
        ),
    ]
    kept = []
    for seed in range(5001, 5011):
        name = c.open("compose", useful | idle, "screen", parent={}, seeds=[seed], factors=factors)
        c.record("resumed", after="")
        while not c.state.experiments[name].verdict:
            c.decide()
            c.launch()
            c.ingest()
        kept.append([e["keep"] for e in c.state.experiments[name].verdict["effects"]])
    assert all(k[0] and k[2] for k in kept) and sum(k[1] for k in kept) <= 4, (
        "one-sided 80 % bounds"
    )
    v = c.state.experiments[name].verdict
    assert v["anchor_after"] == (useful if not v["effects"][1]["keep"] else useful | idle)
    assert (
        len(c.state.evidence["optimizer: lower rate"]) == 10
        and skill_review.survivors(c.state)["schedule"] == 10
    )


@pytest.mark.slow
def test_changes_named_by_hand_are_composed(tmp_path):
    c = forge_lab.real(tmp_path, budget=dict(experiments=0))
    done = forge_lab.here(
        "compose", c.folder, "MATRIX_LR=0.022", "MUON_MOMENTUM=0.98,SCALAR_LR=0.02", "INERT_A=0.9"
    )
    assert done.returncode == 0 and "e000001" in done.stdout, done.stderr
    assert forge_lab.here("compose", c.folder, "MATRIX_LR=0.022", "MATRIX_LR=0.03").returncode == 2
    again = campaign.Campaign(c.folder)
    x = again.state.experiments["e000001"]
    assert len(x.factors) == 3 and x.change == dict(
        INERT_A=0.9, MATRIX_LR=0.022, MUON_MOMENTUM=0.98, SCALAR_LR=0.02
    )
    again.loop(60, pause=0.05)
    verdict = again.state.experiments["e000001"].verdict
    assert verdict["verdict"] == "ablated" and [e["keep"] for e in verdict["effects"]][:2] == [
        True,
        True,
    ]


def test_promotion_takes_the_best_third_and_some_by_lot(tmp_path):
    c = forge_lab.instant(
        tmp_path,
        rungs=dict(
            screen=dict(kill_s=20, prior_sigma=0.001, env={}),
            local=dict(kill_s=20, prior_sigma=0.001, env=dict(ITERATIONS="200")),
        ),
        search=dict(rung="screen", promote_to="local"),
        budget=dict(experiments=30),
        loop=dict(confirm="end"),
    )
    state = forge_lab.finish(c)
    up = [x for x in state.experiments.values() if x.kind == "promote"]
    assert (
        len(up) >= 9
        and any("random" in x.text for x in up)
        and any("best third" in x.text for x in up)
    )
    rows = forecasts.report(state, c.space)
    assert (
        rows[0]["klass"] == "all"
        and rows[0]["n"] == len({x.cid for x in up})
        and rows[0]["word"] != "too few"
    )
    assert all(r["word"] in ("too few", "unknown", "transfers", "does not transfer") for r in rows)


def test_a_harmful_playbook_edit_is_rolled_back(tmp_path):
    """Acceptance 6: narrowed ranges after which the skill stops winning are taken back, and stay
    so."""
    c = forge_lab.instant(tmp_path, budget=dict(experiments=0))
    forge_lab.finish(c)

    def tries(n, wins):
        for i in range(n):
            name = c.open(
                "search",
                dict(MATRIX_LR=round(0.01 + 0.0001 * len(c.state.experiments), 6)),
                "screen",
                skill="optimizer",
                parent={},
                seeds=[1],
            )
            won = i < wins
            c.record(
                "judged",
                exp=name,
                verdict=dict(
                    verdict="tentative" if won else "reject",
                    reason="",
                    delta=-0.002 if won else 0.002,
                    sigma=0.001,
                ),
            )

    tries(20, 8)
    c.record(
        "meta",
        meta=dict(
            index=1,
            inert=[],
            edits=[
                dict(
                    skill="optimizer",
                    version=1,
                    at=20,
                    text="",
                    ranges=dict(MATRIX_LR=[0.1, 0.2]),
                    reason="claims",
                )
            ],
        ),
    )
    tries(9, 0)
    assert skill_review.edits(c.state, c.space, []) == [], "nine tries are too few"
    tries(3, 0)
    skills = forge_lab.write_skills(tmp_path / "skills")
    publish.write_skills(c.view)
    assert "search MATRIX_LR in 0.1 to 0.2" in (
        skills / "optimizer" / "references" / "playbook.md"
    ).read_text("utf-8")
    assert skill_files.check(skills / "optimizer") == [], "a skill with a playbook stays valid"
    edit = skill_review.edits(c.state, c.space, [])[0]
    assert edit["reason"] == "rollback" and edit["ranges"] == {} and "0 of 12" in edit["note"]
    c.record("meta", meta=dict(index=2, inert=[], edits=[edit]))
    tries(10, 0)
    assert skill_review.edits(c.state, c.space, []) == []


@pytest.mark.slow
def test_the_meta_layer_runs_once_per_five_experiments_and_writes_the_same_files(tmp_path):
    """Acceptance 20."""
    c = forge_lab.real(tmp_path, budget=dict(experiments=5), loop=dict(confirm="end"))
    c.loop(60, pause=0.05)
    publish.publish(c.view)
    first = (c.folder / "meta" / "0001.json").read_text("utf-8")
    state = replay(Ledger(c.folder / "events.jsonl").read())
    assert len(state.metas) == 1 == len(list((c.folder / "meta").iterdir()))
    again = campaign.Campaign(c.folder)
    assert not again.tick() and len(again.state.metas) == 1
    (c.folder / "meta" / "0001.json").unlink()
    publish.publish(again.view)
    assert (c.folder / "meta" / "0001.json").read_text("utf-8") == first
    lines = (c.folder / "events.jsonl").read_bytes().splitlines(True)
    at = next(i for i, line in enumerate(lines) if b'"event":"meta"' in line)
    (c.folder / "events.jsonl").write_bytes(
        b"".join(lines[:at])
    )  # killed before it was acknowledged
    (c.folder / "meta" / "0001.json").unlink()
    again = campaign.Campaign(c.folder)
    again.tick()
    publish.publish(again.view)
    assert (c.folder / "meta" / "0001.json").read_text("utf-8") == first and len(
        again.state.metas
    ) == 1


@pytest.mark.slow
def test_replay_repeats_a_run_exactly_and_refuses_changed_code(tmp_path):
    """Acceptance 12: five records."""
    c = forge_lab.real(tmp_path, budget=dict(experiments=2), loop=dict(confirm="end"))
    c.loop(60, pause=0.05)
    assert len(c.state.runs) >= 5
    for key in list(c.state.runs)[:5]:
        done = forge_lab.here("replay", c.folder, key, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["equal"], done.stdout
        again = json.loads(
            next((c.folder / "scratch").glob(f"replay-{key}-*/metrics.json")).read_text("utf-8")
        )
        first = json.loads((c.folder / "runs" / key / "metrics.json").read_text("utf-8"))
        assert (
            all(again[part] == first[part] for part in ("key", "env", "code", "seed"))
            and again["losses"]
        )
    script = c.script()
    script.chmod(0o644)
    script.write_text(script.read_text("utf-8") + "\n# edited\n")
    done = forge_lab.here("replay", c.folder, key)
    assert (
        done.returncode == 2
        and "was changed since" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert forge_lab.here("verify", c.folder).returncode == 2


def test_a_second_decider_is_refused(tmp_path):
    c = forge_lab.real(tmp_path)
    with locked(c.folder / "tick.lock"):
        done = forge_lab.here("tick", c.folder)
        assert done.returncode == 2 and "another decider is at work" in done.stderr


@pytest.mark.parametrize(
    "edit, message",
    [
        ("[loop]\nworkres = 2\n", "unknown [loop] workres"),
        ("[serach]\n", "unknown table [serach]"),
        ("[budget]\nexperiments = -1\n", "want 0 or more"),
        ("[loop]\nworkers = 0\n", "want 1 or more"),
        ("[budget]\nminutes = nan\n", "want 0 or more"),
        ('[loop]\nconfirm = "now"\n', "want one of large, end"),
        ('[budget]\nexperiments = "many"\n', "want a int"),
        ('[search]\nrung = "big"\n', "rung 'big' is not among"),
        ("[seeds]\nsearch = [1, 2, 3]\njudge = [3, 4, 5, 6, 7]\n", "must not overlap"),
        ("nonsense", "campaign.toml:"),
    ],
)
def test_a_bad_campaign_file_gets_one_clear_error(tmp_path, edit, message):
    path = tmp_path / "campaign.toml"
    path.write_text(edit + "\n[rungs.screen]\nkill_s = 5\n")
    with pytest.raises(ForgeError) as error:
        settings.read_config(path)
    assert message in str(error.value)


def test_limits_can_be_changed_while_it_runs(tmp_path):
    c = forge_lab.real(tmp_path, budget=dict(experiments=1), loop=dict(confirm="end"))
    c.loop(60, pause=0.05)
    assert c.state.stopped
    path = c.folder / "campaign.toml"
    path.write_text(path.read_text("utf-8").replace("experiments = 1\n", "experiments = 2\n"))
    c.loop(60, pause=0.05)
    assert len(c.state.searches()) == 2
    events = Ledger(c.folder / "events.jsonl").read()
    assert (
        sum(e["event"] == "config" for e in events) == 1
        and replay(events).digest() == c.state.digest()
    )


@pytest.mark.slow
def test_commands_of_a_finished_campaign(tmp_path, capsys):
    """Every view answers in words and in JSON; mistakes get one line and exit code 2."""
    c = forge_lab.real(tmp_path, budget=dict(experiments=2), loop=dict(confirm="end"))
    done = forge_lab.forge("run", c.folder)
    assert done.returncode == 0 and "stopped: experiments: 2 of 2 done" in done.stdout, done.stderr
    page = (c.folder / "report.html").read_text("utf-8")
    assert page.count("<svg") >= 6 and "Nothing is confirmed: " in page
    assert not re.search(r"(src|href)=.?(https?:|//)|@import|url\(http", page), (
        "nothing is loaded from elsewhere"
    )
    from forge import forge as command

    for verb in (
        ["status"],
        ["transfer"],
        ["meta"],
        ["playbook"],
        ["propose"],
        ["diff"],
        ["verify"],
        ["report"],
        ["inbox"],
        ["rebuild"],
    ):
        more = ["base", "e000002"] if verb == ["diff"] else []
        assert command.main([*verb, str(c.folder), *more]) == 0 and capsys.readouterr().out.strip()
        if verb[0] not in ("verify", "report", "rebuild"):
            assert command.main([*verb, str(c.folder), *more, "--json"]) == 0
            assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert command.main(["show", str(c.folder), "e000002"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "search"
    for args in (
        ["show", c.folder, "e9"],
        ["status", "nowhere"],
        ["replay", c.folder, "abc"],
        ["diff", c.folder, "base", "x"],
        ["project", c.folder, "abc"],
        ["submit", c.folder, "nofile"],
        ["sentinel", c.folder],
        ["sentinel", c.folder, "--rung", "big"],
        ["promote", c.folder, "e000001", "--to", "screen"],
        ["promote", c.folder, "e000002", "--to", "big"],
    ):
        assert command.main(list(map(str, args))) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_tables_show_the_digits_that_matter_and_any_locale_will_do(tmp_path):
    """Findings R6 and M17: no 0.0011729 in the committed campaign's page, and the command line
    reads and writes UTF-8 in the C locale too."""
    c = verbs.campaign("cpu40")
    page = report.page(standing.everything(c.view))
    assert len(re.findall(r"<td>[-+]?\d+\.\d{4}</td>", page)) > 50
    assert not re.search(r"<td>[-+]?\d+\.\d{5,}</td>", page)
    c = forge_lab.real(tmp_path)
    skill = c.folder / "skills" / "inert" / "SKILL.md"
    skill.write_text(skill.read_text("utf-8") + "Größe, ½\n", "utf-8")
    idea = dict(schema="forge.hypothesis/1", env=dict(MATRIX_LR=0.03), hypothesis="größer, ½")
    (tmp_path / "idée.json").write_text(json.dumps(idea, ensure_ascii=False), "utf-8")
    plain = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    for verb in (["submit", c.folder, tmp_path / "idée.json"], ["inbox", c.folder]):
        done = forge_lab.forge(*verb, env=plain)
        assert done.returncode == 0, done.stderr
    assert "größer, ½" in done.stdout


@pytest.mark.slow
def test_a_person_asks_for_a_confirmation_and_for_another_rung(tmp_path):
    rung = dict(kill_s=20, prior_sigma=0.001, env={})
    rungs = dict(screen=rung, local=rung | dict(sentinel_runs=2))
    c = forge_lab.real(tmp_path, rungs=rungs, budget=dict(experiments=0))
    c.loop(60, pause=0.05)
    good = dict(MATRIX_LR=0.022, MUON_MOMENTUM=0.98)
    name = c.open("search", good, "screen", skill="optimizer", parent={}, seeds=[1])
    from forge import forge as command

    assert command.main(["confirm", str(c.folder)]) == 2, "the anchor is the champion"
    again = campaign.Campaign(c.folder)
    again.record("resumed", after="")
    again.loop(60, pause=0.05)
    assert again.state.anchor == again.state.champion == good, "the end confirms it by itself"
    assert command.main(["promote", str(c.folder), name, "--to", "local"]) == 0
    assert forge_lab.forge("run", c.folder).returncode == 0
    state = replay(Ledger(c.folder / "events.jsonl").read())
    up = [x for x in state.experiments.values() if x.kind == "promote"]
    assert (
        len(up) == 1 and up[0].verdict["delta"] < 0 and len(state.reference["local"]["scores"]) == 2
    )
    assert (c.folder / "report.html").read_text("utf-8").count("What did not work") == 1


@pytest.mark.slow
def test_settings_of_a_new_campaign(tmp_path):
    """--set, --without and knobs that a rung fixes, which no proposal may touch."""
    script = tmp_path / "train_gpt.py"
    script.write_bytes(forge_lab.FAKE.read_bytes())
    args = [
        "init",
        tmp_path / "c",
        "--script",
        script,
        "--skills",
        forge_lab.write_skills(tmp_path / "skills"),
        "--set",
        "loop.confirm=end",
        "--set",
        "search.max_flops=1.1",
        "--without",
        "inert",
        "--rung",
        "screen.MATRIX_BITS=8",
    ]
    assert forge_lab.here(*args).returncode == 0
    c = campaign.Campaign(tmp_path / "c")
    assert c.config["loop"]["confirm"] == "end" and c.config["search"]["max_flops"] == 1.1
    assert (
        "inert" not in c.space.skills
        and "MATRIX_BITS" not in c.space.knobs
        and "CLIP_SIGMAS" in c.space.knobs
    )
    args[1] = tmp_path / "d"
    for more, message in (
        (["--set", "loop.cnfirm=end"], "unknown [loop] cnfirm"),
        (["--set", "x.y=1"], "with a table of"),
        (["--without", "magic"], "want a skill of"),
        (["--rung", "screen.tokns=5"], "tokns = 5"),
        (["--deadline", "tomorrow"], "deadline 'tomorrow'"),
    ):
        done = forge_lab.here(*args, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


@pytest.mark.slow
def test_beginning_twice_and_beginning_badly(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_bytes(forge_lab.FAKE.read_bytes())
    skills = forge_lab.write_skills(tmp_path / "skills")
    args = ["--script", script, "--skills", skills, "--preset", "baseline+cpu"]
    assert forge_lab.here("init", tmp_path / "c", *args).returncode == 0
    again = forge_lab.here("init", tmp_path / "c", *args)
    assert again.returncode == 2 and "already holds a campaign" in again.stderr
    for more, message in (
        (["--knob", "NUM_LAYERS"], "want NAME=VALUE"),
        (["--rung", "big.kill_s=1"], "with a rung of"),
        (["--knob", "MODEL_DIM=100"], "not divisible by 64"),
        (["--on", "big"], "rung 'big'"),
        (["--experiments", "-1"], "experiments = -1: want 0 or more"),
    ):
        done = forge_lab.here("init", tmp_path / "d", *args, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not (tmp_path / "d").exists(), "nothing is left behind"


def test_logs_of_the_real_format_are_read():
    lines = "\n".join(
        fake_trainer.log_lines({n: f.default for n, (_, f) in fake_trainer.KNOBS.items()}, 1.25)
    )
    found = run_record.parse_log(lines, 512)
    assert found["finals"][0][1] == 1.25 and found["steps"] == 10 and found["val_tokens"] == 1000
    real = (ROOT / "records" / "evidence" / "cpu_two_cores" / "default_run.log").read_text("utf-8")
    found = run_record.parse_log(real, 8192)
    assert len(found["finals"]) == 1 and 1.5 < found["finals"][0][1] < 2.5 and found["steps"] > 50
    assert (
        found["curve"]
        and found["code_sha256"]
        and found["logged_bytes"] > 10**5
        and found["step_ms"] > 1
    )

"""Skills that ship are valid and fit the real script; records of others are sorted; a real campaign
runs end to end."""

import json
import os
import subprocess
import sys
import time

import forge_lab
import pytest
from conftest import ROOT, SCRIPT, clean_env, official, run_script
from forge import ForgeError, agent, export, harvest, run_record, skill_files, space
from forge import forge as command
from forge.campaign_folder import load_skills
from forge.ledger import Ledger
from forge.state import replay

SKILLS = ROOT / "records" / "forge" / "skills"
GOOD = """---
name: my-skill
description: "Does: this. Use when that."
metadata:
  forge-version: "1"
---

Body.
"""


@pytest.mark.slow
def test_shipped_skills_are_valid_and_fit_the_script():
    assert skill_files.check_all(SKILLS, SCRIPT, dict(PRESET="baseline+cpu")) == []
    assert skill_files.check(SKILLS.parent / "skill-forge") == []
    tables = load_skills(SKILLS)
    wanted = {
        "architecture-search",
        "optimizer-tuning",
        "schedule-shaping",
        "quantisation",
        "artifact-compression",
        "eval-strategy",
        "tokenizer-choice",
        "systems-speed",
        "init-strategy",
        "training-dynamics",
    }
    assert wanted <= set(tables)
    owned = {name for table in tables.values() for name in table}
    assert len(owned) >= 50 and not owned & {
        "SEED",
        "DATA_PATH",
        "EVAL",
        "VOCAB_SIZE",
        "MAX_WALLCLOCK_SECONDS",
    }


@pytest.mark.parametrize(
    "change, reason",
    [
        (("my-skill\n", "MySkill\n"), "is not the folder's"),
        (('"Does: this. Use when that."', "Does: this"), "SKILL.md: "),
        (('"Does: this. Use when that."', '""'), "1 to 1024 characters"),
        (("metadata:", "meta:"), "unknown keys meta"),
        (('"1"', "1"), "table of texts"),
        (("---\nname", "name"), "no frontmatter"),
        (("Body.", "Body.\n" * 500), "500 lines"),
    ],
)
def test_bad_skills_are_named(tmp_path, change, reason):
    folder = tmp_path / "my-skill"
    folder.mkdir()
    (folder / "SKILL.md").write_text(GOOD)
    assert skill_files.check(folder) == []
    (folder / "SKILL.md").write_text(GOOD.replace(*change))
    assert any(reason in problem for problem in skill_files.check(folder))


@pytest.mark.slow
def test_the_space_and_the_forecast_come_from_the_real_script(tmp_path):
    env = dict(PRESET="baseline+tiny", THREADS="1")
    described = space.describe(SCRIPT, env)
    s = space.Space.build(described, load_skills(SKILLS), env)
    assert s.knobs["NUM_LAYERS"].base == 3 and s.knobs["MATRIX_LR"].base == 0.04
    assert s.normal(dict(ENGRAM_DIM=64)) == {}, "no effect without ENGRAM_BUCKETS"
    assert s.normal(dict(ENGRAM_DIM=64, ENGRAM_BUCKETS=4096)) == dict(
        ENGRAM_BUCKETS="4096", ENGRAM_DIM="64"
    )
    tokens = s.resolve(dict(TRAIN_BATCH_TOKENS="2048"), dict(tokens=8192, steps=16))
    assert tokens["ITERATIONS"] == "4", "a larger batch gets fewer steps on a rung of tokens"
    deep = s.resolve(dict(NUM_LAYERS=5), dict(steps=8))
    over = space.plan(SCRIPT, deep | dict(ARTIFACT_BUDGET_BYTES="1000"), tmp_path)
    assert (
        not over["ok"]
        and "over the budget" in over["reason"]
        and over["bytes"] > 1000
        and over["flops"] > 1e5
    )
    bad = space.plan(SCRIPT, env | dict(NUM_HEADS="3"), tmp_path)
    assert not bad["ok"] and "NUM_HEADS=3" in bad["reason"]
    with pytest.raises(ForgeError, match="MATRIX_LR='x'"):
        space.describe(forge_lab.FAKE, dict(MATRIX_LR="x"))


@pytest.mark.slow
def test_a_real_campaign_end_to_end(toy, tmp_path):
    """Acceptance 19: the real script on real text: six experiments, two reviews, a
    confirmation on fresh seeds, report, verify, replay, and a record that the repository's own tool
    passes and that repeats its score from its own path. The base's embedding rate is crippled and
    the first experiment is a person's that repairs it, so that there is something to confirm; 2
    runs of the base, 6 experiments and 6 fresh seeds make the 14 runs of the budget."""
    folder, knobs = (
        tmp_path / "c",
        dict(DATA_PATH=toy, THREADS=1, NUMERICS="fp32", ATTENTION="sdpa", DEVICE="cpu"),
    )
    args = [
        "init",
        folder,
        "--preset",
        "baseline+tiny",
        "--experiments",
        6,
        "--runs",
        14,
        "--workers",
        2,
    ]
    for option, items in (
        ("--rung", ("screen.tokens=12288", "screen.sentinel_runs=2", "screen.prior_sigma=0.01")),
        ("--knob", [f"{n}={v}" for n, v in (knobs | dict(TIED_EMBED_LR=0.002)).items()]),
        (
            "--set",
            (
                "loop.confirm=end",
                "loop.meta_every=3",
                "loop.ablation=false",
                "search.race_above=1.0",
            ),
        ),
    ):
        args += [word for item in items for word in (option, item)]
    assert command.main(list(map(str, args))) == 0
    idea = dict(
        schema=agent.SCHEMA,
        kind="env",
        env=dict(TIED_EMBED_LR=0.03),
        hypothesis="the rate is far too low",
    )
    (tmp_path / "idea.json").write_text(json.dumps(idea))
    assert command.main(["submit", str(folder), str(tmp_path / "idea.json")]) == 0
    done = forge_lab.forge("run", folder, env=clean_env(), timeout=1200)
    assert done.returncode == 0 and "min left]" in done.stdout, done.stdout + done.stderr
    state = replay(Ledger(folder / "events.jsonl").read())
    confirmed = next(x for x in state.experiments.values() if x.kind == "confirm").verdict
    assert len(state.searches()) == 6 and len(state.metas) == 2 and len(state.runs) == 14
    assert state.searches()[0].source == "human" and confirmed["verdict"] == "confirmed", confirmed
    assert confirmed["ci95"][1] < 0 and state.champion == state.anchor, (
        "the anchor is better than the base"
    )
    first = next(iter(state.runs.values()))
    record = json.loads((folder / "runs" / first.key / "metrics.json").read_text("utf-8"))
    assert 1 < first.score < 8 and record["data"]["val_bytes"] > 1000
    assert record["metrics"]["artifact_bytes"] > SCRIPT.stat().st_size
    page = (folder / "report.html").read_text("utf-8")
    titles = ["Progress", "Skills", "Size", "Learning curves", "Noise", "Where the time went"]
    assert page.count("<svg") >= len(titles) and all(f"<h2>{t}</h2>" in page for t in titles)
    assert not [
        e
        for name in load_skills(folder / "skills")
        for e in skill_files.check(folder / "skills" / name)
    ]
    assert command.main(["verify", str(folder)]) == 0
    again = forge_lab.forge("replay", folder, first.key, "--json", env=clean_env())
    assert json.loads(again.stdout)["equal"], (
        "fixed arithmetic and one thread: the same score to the last digit"
    )
    assert (
        command.main(
            [
                "export",
                str(folder),
                "--title",
                "A test",
                "--author",
                "a",
                "--out",
                str(tmp_path / "records"),
            ]
        )
        == 0
    )
    made = next((tmp_path / "records").glob("*/*/submission.json")).parent
    checked = subprocess.run(
        [sys.executable, str(ROOT / "records" / "tools.py"), "check", str(made)],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0 and "PASS (0 fail" in checked.stdout, checked.stdout
    run = state.run_of(state.champion, "screen", confirmed["seeds_used"][0])
    own = run_script(
        script=made / "train_gpt.py",
        cwd=made,
        **run.env | dict(SEED=run.seed, RUNS_DIR=tmp_path / "own"),
    )
    assert f" val_bpb:{run.score:.8f} " in official(own.out), own.out[-500:] + own.err


# ---- Records of others ---------------------------------------------------------------------------
def record(
    root,
    name: str,
    table,
    track: str = "track",
    logs: dict | None = None,
    file: str = "submission.json",
):
    folder = root / track / name
    folder.mkdir(parents=True)
    (folder / file).write_text(table if isinstance(table, str) else json.dumps(table))
    for seed, bpb in (logs or {}).items():
        (folder / f"train_seed{seed}.log").write_text(
            f"final_int8_zlib_roundtrip_exact val_loss:2.0 val_bpb:{bpb}\n"
        )


def test_records_are_sorted_with_reasons(tmp_path):
    """Acceptance 18 on planted folders; every shape that the public tree has for per-seed
    scores."""
    seeds = {"1": dict(val_bpb=1.199), "2": dict(val_bpb=1.201)}
    record(tmp_path, "1_first", dict(val_bpb=1.22, date="2026-03-01", bytes_total=15_000_000))
    record(tmp_path, "2_high", dict(val_bpb=1.20, date="2026-03-02", seed_results=seeds))
    record(tmp_path, "3_medium", dict(val_bpb=1.19, date="2026-03-03"))
    record(
        tmp_path, "4_low", dict(val_bpb=1.21, date="2026-03-04", seeds=[dict(seed=1, val_bpb=1.21)])
    )
    record(tmp_path, "5_large", dict(val_bpb=1.10, date="2026-03-05", bytes_total=16_000_001))
    record(
        tmp_path, "6_logs", dict(mean_bpb=1.05, date="2026-03-06"), logs={42: 1.0501, 314: 1.0499}
    )
    record(tmp_path, "7_broken", "{")
    record(tmp_path, "8_empty", dict(name="x"))
    record(tmp_path, "9_only_a_log", "step:1", file="train.log")
    record(
        tmp_path,
        "10_suffix",
        dict(
            val_bpb=1.04,
            date="2026-03-07",
            seeds=[1, 2, 3],
            n_seeds=3,
            seed_scores=[1.0399, 1.04, 1.0401],
        ),
        file="submission_ternary.json",
    )
    (tmp_path / "track" / "10_suffix" / "logs").mkdir()
    (tmp_path / "track" / "10_suffix" / "logs" / "train_seed1.log").write_text(
        "part of the record above it"
    )
    found = harvest.harvest(tmp_path)
    assert {r["folder"]: r["bucket"] for r in found["records"]} == {
        "1_first": "Medium",
        "2_high": "High",
        "3_medium": "Medium",
        "4_low": "Low",
        "5_large": "Low",
        "6_logs": "High",
        "10_suffix": "High",
    }
    reasons = {u["folder"]: u["reason"] for u in found["unparsed"]}
    assert (
        set(reasons) == {"7_broken", "8_empty", "9_only_a_log"}
        and "no submission.json" in reasons["9_only_a_log"]
    )
    assert found["with_seeds"] == 3 and len(found["records"]) + len(reasons) == 10, (
        "no folder is passed over"
    )
    because = {r["folder"]: r["reason"] for r in found["records"]}
    assert "against 3_medium" in because["6_logs"], "what is over the budget is no bar for others"
    assert all(because.values()) and harvest.harvest(tmp_path) == found
    assert "no score" in harvest.text(found) and "over the budget" in harvest.text(found)


def test_a_record_that_cannot_be_read_is_listed_and_the_rest_goes_on(tmp_path):
    """Finding R4: 1e999, NaN, numbers too large, of the wrong type or nested without end, folders
    and files that cannot be opened, logs without end."""
    record(tmp_path, "good", dict(val_bpb=1.2, date="2026-03-01"))
    sound = dict(date="2026-03-02", val_bpb=1.1)
    bad = {
        "huge": '{"val_bpb": 1.1, "bytes_total": 1e999}',
        "nan": '{"val_bpb": NaN}',
        "infinite": '{"val_bpb": -Infinity}',
        "digits": '{"val_bpb": 1.1, "bytes_total": ' + "9" * 100_000 + "}",
        "large": json.dumps(sound | dict(bytes_total=10**25)),
        "negative": json.dumps(sound | dict(bytes_total=-1)),
        "absurd": json.dumps(sound | dict(val_bpb=1e300)),
        "types": json.dumps(dict(val_bpb=[1], seeds={"1": [2]}, bytes_total=dict(a=1))),
        "true": json.dumps(dict(val_bpb=True)),
        "deep": "[" * 100_000,
        "deeper": '{"a":' * 5000 + "1" + "}" * 5000,
        "list": "[1]",
        "utf16": json.dumps(sound).encode("utf-16").decode("latin-1"),
        "long": '{"val_bpb": 1.1, "x": "' + "y" * (2 << 20) + '"}',
    }
    for name, text in bad.items():
        record(tmp_path, name, text)
    os.mkfifo(tmp_path / "track" / "good" / "train_seed1.log")
    (tmp_path / "track" / "good" / "README.md").symlink_to("/dev/zero")
    (tmp_path / "track" / "loop").symlink_to(tmp_path)
    odd = dict(sound, name=[1], date=5, seed_results={"1": "x", "2": None}, seeds=[dict(seed={})])
    record(tmp_path, "odd", odd)
    (tmp_path / "track" / "odd" / "train_seed2.log").write_text("final_x_exact " * 10**5, "utf-8")
    begin = time.monotonic()
    found = harvest.harvest(tmp_path)
    assert time.monotonic() - begin < 10
    assert {r["folder"] for r in found["records"]} == {"good", "odd"}
    reasons = {u["folder"]: u["reason"] for u in found["unparsed"]}
    assert set(reasons) == set(bad) and all(reasons.values()) and len(harvest.text(found)) < 5000
    closed = tmp_path / "track" / "closed"
    closed.mkdir(mode=0)
    if not os.access(closed, os.R_OK):  # a superuser reads everything
        reasons = {u["folder"] for u in harvest.harvest(tmp_path)["unparsed"]}
        assert "closed" in reasons


def test_variables_of_published_scripts_are_read_as_ours(tmp_path):
    """A record that sets another script's name of a knob speaks for the skill that owns ours."""
    told = harvest.translated(SCRIPT, [dict(GLOBAL_TTT_EPOCHS="3"), dict(MATRIX_LR="0.03"), {}])
    assert told[0] == dict(TTT_EPOCHS="3") and told[2] == {}
    assert harvest.translated(forge_lab.FAKE, [{}]) == [{}], "a script that knows no names"


@pytest.mark.slow
def test_export_hands_the_confirmed_runs_to_the_records_tool(tmp_path, monkeypatch):
    c = forge_lab.real(tmp_path, budget=dict(experiments=0))
    with pytest.raises(ForgeError, match="nothing is confirmed yet"):
        export.export(c.view, "non_record_16mb", "t", "a")
    c.loop(60, pause=0.05)
    change = dict(MATRIX_LR=0.022, MUON_MOMENTUM=0.98, SCALAR_LR=0.02)
    c.record("resumed", after="")
    name = c.open("confirm", change, "screen", parent={}, seeds=[1001, 1002, 1003], factors=[])
    while not c.state.experiments[name].verdict:
        c.decide()
        c.launch()
        c.ingest()
    assert (
        c.state.experiments[name].verdict["verdict"] == "confirmed" and c.state.champion == change
    )
    seen = []

    def tool(command, **_):
        seen.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, 0, "made a folder\n", "")

    monkeypatch.setattr(export, "TOOLS", SCRIPT)
    monkeypatch.setattr(export.subprocess, "run", tool)
    assert (
        export.export(c.view, "non_record_16mb", "A title", "An author", tmp_path / "out")
        == "made a folder"
    )
    command = seen[0]
    folders = command[command.index("new") + 1 : command.index("--name")]
    assert command[command.index("--name") + 1] == "A_title", "names of folders have no spaces"
    assert len(folders) == 3 and all((tmp_path / f / "model.golf").exists() for f in folders)
    scores = [
        run_record.parse_log((tmp_path / f).with_suffix(".out").read_text("utf-8"))["finals"][0][1]
        for f in folders
    ]
    assert scores == c.state.experiments[name].verdict["scores_new"]
    with pytest.raises(ForgeError, match="--track x: want one of"):
        export.export(c.view, "x", "t", "a")

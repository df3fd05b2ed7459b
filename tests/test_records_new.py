"""new: from real runs to a folder that check accepts and that runs alone; and everything it
refuses."""

import html.parser
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, clean_env
from helpers import config, distance
from running import launch, made_once, train, wait_until
from synthetic import RUNS, Record, changed

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
from facts.files import sha256_of  # noqa: E402
from toolkit import audit, check, readme, report, snapshot, table  # noqa: E402

TOOLS = [sys.executable, str(ROOT / "records" / "tools.py")]
KNOBS = dict(
    PRESET="baseline+tiny", NUM_LAYERS=2, MATRIX_LR=0.03, CHECKPOINT_EVERY=0, ITERATIONS=24
)


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory) -> list[Path]:
    """Three seeds of one configuration."""

    def make(top: Path):
        done = [train(toy, top, f"s{seed}", SEED=seed, **KNOBS) for seed in (1, 2, 3)]
        assert not any(d.code for d in done), done[0].err

    return [made_once(tmp_path_factory, "three_seeds", make) / f"s{seed}" for seed in (1, 2, 3)]


def new(records: Path, runs: list[Path], *more, name: str = "Tiny_Runs"):
    return subprocess.run(
        [
            *TOOLS,
            "new",
            *map(str, runs),
            "--name",
            name,
            "--records",
            str(records),
            *map(str, more),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def record(runs, toy, tmp_path_factory) -> Path:
    def make(records: Path):
        done = new(
            records,
            runs,
            "--data",
            toy,
            "--date",
            "2026-11-21",
            "--keep-artifacts",
            "--author",
            "A",
        )
        assert done.returncode == 0, done.stderr

    return (
        made_once(tmp_path_factory, "records", make)
        / "track_non_record_16mb"
        / "2026-11-21_Tiny_Runs"
    )


def official(run: Path) -> tuple[float, float]:
    found = re.search(
        r"^final:official \S+ val_loss:(\S+) val_bpb:(\S+)",
        (run / "log.txt").read_text(),
        re.MULTILINE,
    )
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_every_number_is_that_of_the_runs(record, runs):
    s = json.loads((record / "submission.json").read_text())
    scores = [official(r)[1] for r in runs]
    assert record.parent.name == "track_non_record_16mb" and record.name == "2026-11-21_Tiny_Runs"
    assert s["val_bpb"] == pytest.approx(statistics.mean(scores)) and s["seeds"] == [1, 2, 3]
    assert s["val_bpb_std"] == pytest.approx(statistics.stdev(scores))
    assert [r["val_bpb"] for r in s["seed_results"].values()] == scores
    shipped = (runs[0] / "submission" / "train_gpt.py").read_bytes()
    assert len(shipped) < 0.3 * SCRIPT.stat().st_size, "packed before training"
    sizes = [(r / "model.golf").stat().st_size + len(shipped) for r in runs]
    assert s["bytes_total"] == max(sizes) and s["bytes_code"] == len(shipped)
    assert [r["artifact_bytes"] for r in s["seed_results"].values()] == sizes
    assert s["compliance"]["no_slot"] is None and s["compliance"]["three_seeds"] is True
    assert s["evidence"]["implied_bytes"] == s["evidence"]["val_bytes"] and s["author"] == "A"
    assert (record / "train_gpt.py").read_bytes() == shipped
    for seed, run in zip((1, 2, 3), runs):
        assert (record / f"train_seed{seed}.log").read_bytes() == (run / "log.txt").read_bytes()
    knobs = json.loads((record / "config.json").read_text())["knobs"]
    assert knobs["matrix_lr"] == dict(value=0.03, origin="environment") and "seed" not in knobs


@pytest.mark.slow
def test_a_record_of_own_text_runs_alone_or_says_what_is_missing(toy, tmp_path):
    """Finding R8: runs on one's own shards gave a folder without smoke/, which neither audit nor
    launch.sh +tiny could run."""
    text, model = tmp_path / "my own text", tmp_path / "models" / "words.model"
    text.mkdir()
    model.parent.mkdir()
    for shard in toy.glob("fineweb_*.bin"):
        shutil.copyfile(shard, text / shard.name)
    shutil.copyfile(toy / "tokenizer.model", model)
    done = train(text, tmp_path / "runs", "own", TOKENIZER_PATH=model, **KNOBS | dict(ITERATIONS=2))
    assert done.code == 0, done.err
    lost = new(tmp_path / "records", [done.folder])
    assert lost.returncode == 2 and "--tokenizer" in lost.stderr, lost.stderr
    made = new(tmp_path / "records", [done.folder], "--data", text, "--tokenizer", model)
    assert made.returncode == 0, made.stderr
    folder = Path(made.stdout.strip())
    shutil.rmtree(text)
    model.unlink()
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    ran = subprocess.run(
        ["bash", "launch.sh", "+tiny"],
        cwd=alone,
        env=clean_env(PYTHON=sys.executable, DEVICE="cpu", THREADS=1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0 and "final:official" in ran.stdout, ran.stderr
    gone = new(tmp_path / "more", [done.folder])
    assert gone.returncode == 2 and len(gone.stderr.splitlines()) == 1, gone.stderr
    assert "my own text" in gone.stderr and "--data" in gone.stderr
    assert new(tmp_path / "more", [done.folder], "--without-smoke").returncode == 0


@pytest.mark.slow
def test_it_passes_check_with_nothing_to_say(record):
    assert check.check(record)["findings"] == []


@pytest.mark.slow
def test_the_readme_is_generated_from_the_submission(record):
    text = (record / "README.md").read_text()
    assert text == readme.refreshed(record) and "not leaderboard scores" in text
    s = json.loads((record / "submission.json").read_text())
    for r in s["seed_results"].values():
        assert f"{r['val_bpb']:.6f}" in text
    with pytest.raises(ValueError, match="no marker"):
        readme.between_markers(text.replace("<!-- generated: seeds -->", ""), dict(seeds="x"))


@pytest.mark.slow
def test_launch_repeats_the_run(record, runs, toy, tmp_path):
    """The same settings, bit for bit: NUM_LAYERS and MATRIX_LR came from the environment. Where
    there is no text, it says so."""
    env = clean_env(PYTHON=sys.executable, RUNS_DIR=tmp_path, RUN_ID="again")
    command = ["bash", str(record / "launch.sh"), "2"]
    wrong = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert (
        wrong.returncode == 2
        and wrong.stderr == "error: set DATA_PATH to the folder of the shards\n"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=env | dict(DATA_PATH=str(toy)), timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert official(tmp_path / "again") == official(runs[1])


def edited(run: Path, to: Path, **changes: str) -> Path:
    """A copy of a run folder with texts replaced in its files, {file: (old, new)}."""
    shutil.copytree(run, to)
    for name, (old, fresh) in changes.items():
        path = to / name.replace("_", ".")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, fresh))
    return to


@pytest.mark.slow
def test_it_refuses(runs, toy, tmp_path):
    """Mixed settings, a seed twice, another script, another text, an unfinished run, a run left
    out; in one message."""
    mixed = edited(runs[1], tmp_path / "mixed", config_json=('"value": 0.03', '"value": 0.04'))
    digest = re.search(r"audit:code sha256:(\w+)", (runs[1] / "log.txt").read_text())[1]
    foreign = edited(runs[1], tmp_path / "foreign", log_txt=(digest, digest[::-1]))
    other_text = edited(
        runs[1], tmp_path / "text", log_txt=("manifest_sha256:", "manifest_sha256:ff")
    )
    cut = edited(runs[1], tmp_path / "cut", log_txt=("final:official", "partial"))
    twice = edited(runs[0], tmp_path / "twice")
    for chosen, message in (
        ([runs[0], mixed], "MATRIX_LR differ"),
        ([runs[0], twice], "seed 1 stands for 2 runs"),
        ([runs[0], foreign], "made by code"),
        ([runs[0], other_text], "not the same text"),
        ([runs[0], cut], "not finished"),
        (runs[:2], "left out: s3"),
        ([tmp_path], "not a run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            snapshot.new(chosen, SCRIPT, tmp_path / "records", snapshot.Wanted("Name", data=toy))
    with pytest.raises(ValueError, match="no score"):
        snapshot.new(runs, SCRIPT, tmp_path / "records", snapshot.Wanted("Best_1.0611", data=toy))
    done = new(tmp_path / "records", runs, "--data", toy, "--track", "10min_16mb")
    assert (
        done.returncode == 2 and "check fails: W7" in done.stderr
    )  # a toy text is no leaderboard text
    assert not list((tmp_path / "records").glob("*/*")) and not list(
        (tmp_path / "records").glob(".track*")
    )


@pytest.mark.slow
def test_a_run_left_out_needs_a_reason_which_is_shown(runs, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "draw", lambda folder: None)
    wanted = snapshot.Wanted("Two", data=toy, left_out="the third was interrupted by hand")
    folder = snapshot.new(runs[:2], SCRIPT, tmp_path, wanted)
    assert "the third was interrupted by hand" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_an_interrupted_run_makes_the_same_record(runs, toy, tmp_path, monkeypatch):
    """Stopped by a signal and resumed: nothing of the record differs but times and hashes of
    logs."""
    knobs = dict(KNOBS, SEED=1)
    process = launch(toy, tmp_path, "run", **knobs)
    log = tmp_path / "run" / "log.txt"
    wait_until(process, lambda: log.exists() and "step:3/" in log.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert train(toy, tmp_path, "run", RESUME="auto", **knobs).code == 0
    found = []
    monkeypatch.setattr(snapshot, "draw", lambda folder: None)
    for i, run in enumerate((runs[0], tmp_path / "run")):
        wanted = snapshot.Wanted("One", data=toy, left_out="a test", date="2026-11-21")
        folder = snapshot.new([run], SCRIPT, tmp_path / f"records_{i}", wanted)
        s = json.loads((folder / "submission.json").read_text())
        free = re.compile(r".*time.*|wallclock_seconds|(log|metrics)_sha256|phases_ms")
        found.append(
            (
                drop(s, free),
                json.loads((folder / "config.json").read_text()),
                (folder / "launch.sh").read_text(),
            )
        )
    assert "resumed:step" in log.read_text() and found[0] == found[1]


def drop(value, pattern):
    """A JSON value without keys that match."""
    if isinstance(value, dict):
        return {k: drop(v, pattern) for k, v in value.items() if not pattern.fullmatch(k)}
    return value


@pytest.mark.slow
def test_a_comparison_is_put_into_the_record(record, tmp_path):
    base, fresh = (tmp_path / n / record.parent.name / record.name for n in "ab")
    for folder in (base, fresh):
        shutil.copytree(record, folder)
    for log in base.glob("train_seed*.log"):  # a worse base
        log.write_text(
            re.sub(
                r"(val_loss|val_bpb):(\d+\.\d+)",
                lambda m: f"{m[1]}:{float(m[2]) * 1.1:.8f}",
                log.read_text(),
            )
        )
    subprocess.run(
        [*TOOLS, "compare", str(base), str(fresh), "--write"], check=True, capture_output=True
    )
    s = json.loads((fresh / "submission.json").read_text())["evidence"]["statistics"]
    assert s["delta_bpb"] == pytest.approx(0.1 * snapshot_bpb(fresh), rel=1e-4) and s["n"] == [3, 3]
    text = (fresh / "README.md").read_text()
    assert f"{s['delta_bpb']:+.5f} bits per byte" in text and text == readme.refreshed(fresh)
    assert check.check(fresh)["passed"]


@pytest.mark.slow
def test_the_leaderboard_ranks_within_a_text_and_is_rewritten(record, tmp_path):
    records = tmp_path / "records"
    shutil.copytree(record.parent, records / record.parent.name)
    better = records / record.parent.name / "2026-11-22_Better"
    shutil.copytree(record, better)
    for name, bpb, size in (
        ("2026-11-22_Better", 1.5, None),
        ("2026-11-23_Other_Text", 1.0, 384_909),
    ):
        folder = records / record.parent.name / name
        if not folder.exists():
            shutil.copytree(record, folder)
        s = json.loads((folder / "submission.json").read_text()) | dict(val_bpb=bpb, name=name)
        s["evidence"]["val_bytes"] = size or s["evidence"]["val_bytes"]
        (folder / "submission.json").write_text(json.dumps(s))
    (records / "README.md").write_text(
        "# Records\n<!-- generated: leaderboard -->\nold\n<!-- end -->\nrest\n"
    )
    subprocess.run([*TOOLS, "table", "--records", str(records)], check=True, capture_output=True)
    text = (records / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| \*\*(\S+)\*\*.*\((track_\S+)\)", text, re.MULTILINE)
    assert [r[:2] for r in rows][:2] == [("1", "1.5000"), ("2", f"{snapshot_bpb(record):.4f}")]
    assert rows[2][:2] == ("1", "1.0000") and "old" not in text and text.endswith("rest\n")
    assert all((records / r[2]).is_dir() for r in rows)


def test_a_foreign_folder_is_not_ranked(tmp_path):
    Record().write(tmp_path)
    assert table.leaderboard(tmp_path) == table.EMPTY


def snapshot_bpb(record: Path) -> float:
    return json.loads((record / "submission.json").read_text())["val_bpb"]


def test_the_committed_leaderboard_is_current():
    assert (ROOT / "records" / "README.md").read_text() == table.refreshed(ROOT / "records")


@pytest.mark.slow
def test_tools_work_in_any_locale(tmp_path):
    """Finding M17: "'ascii' codec can't decode" in `tools.py table` under the C locale."""
    folder = Record(submission=dict(name="Ünïcode – ±")).write(tmp_path)
    readme_text = "# Récords ±\n<!-- generated: leaderboard -->\nold\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(readme_text, encoding="utf-8")
    env = clean_env(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    for args in (
        ["table", "--records", str(tmp_path)],
        ["check", str(folder)],
        ["report", str(folder)],
        ["unpack", str(folder / "train_gpt.py")],
        ["audit", str(folder)],
    ):
        done = subprocess.run([*TOOLS, *args], env=env, capture_output=True, timeout=120)
        assert b"codec" not in done.stderr and b"Traceback" not in done.stderr, done.stderr
        assert done.returncode == (2 if args[0] == "audit" else 0), (args, done)
    assert "Récords ±" in (tmp_path / "README.md").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags left open, and everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        self.fetched += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_report_is_one_page_that_loads_nothing(record, runs, tmp_path):
    out = tmp_path / "page.html"
    subprocess.run(
        [*TOOLS, "report", str(record), "--out", str(out)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    text, page = out.read_text(), Page()
    page.feed(text)
    assert not page.open and not page.fetched and "<script" not in text and "url(http" not in text
    for run in runs:
        assert f"{official(run)[1]:.4f}" in text
    assert (record / "loss.svg").read_text() in text and "![Loss and score](loss.svg)" in (
        record / "README.md"
    ).read_text()
    assert (
        text.count("<svg") >= 5
        and "16,000,000" in text
        and text == (record / "report.html").read_text()
    )
    one = report.report(runs[0])
    assert "Learning rate" in one and "Loss and score" in one


@pytest.mark.filterwarnings("error")
def test_a_report_of_a_foreign_folder_has_no_empty_picture(tmp_path):
    """Finding R6: plot warnings, an empty plot, legends cut off, a star under the legend."""
    lines = "".join(
        f"{i * 100}/20000 train_loss: {9 - i:.4f} train_time: {i}m\n" for i in range(1, 6)
    )
    for name, runs in dict(
        lines=tuple(replace(r, extra=lines) for r in RUNS),
        assigned=changed(dialect="assigned"),
        silent=(replace(RUNS[0], before=1.1, knobs=dict(seed=1)),),
    ).items():
        folder = Record(runs, name=f"2026-05-02_{name}").write(tmp_path)
        if name == "silent":
            (folder / "train_seed42.log").rename(folder / "run_a.log")
            text = (folder / "run_a.log").read_text().split("\n")
            (folder / "run_a.log").write_text("\n".join(t for t in text if "/20000" not in t))
        page = report.report(folder)
        drawn = page.count("<svg")
        assert drawn == page.count("<h2>") == {"lines": 3, "assigned": 3, "silent": 1}[name], name
        assert "nan" not in page.lower() and "unknown" not in page and "None" not in page
        assert "1.0811" in page or name == "silent"
    import matplotlib.pyplot as plt

    for (
        title
    ) in report.PICTURES:  # in the real renderer: legends lie inside the figure, off the axes
        figure, axes = plt.subplots(figsize=(9, report.PICTURES[title][1]), layout="constrained")
        folder = tmp_path / "track_10min_16mb" / "2026-05-02_lines"
        if report.PICTURES[title][0](axes, report.read_curves(folder)):
            figure.canvas.draw()
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert figure.bbox.fully_containsx(box.x0) and figure.bbox.fully_containsx(box.x1)
                assert box.y0 >= 0 and not box.overlaps(axes.get_window_extent()), title
        plt.close(figure)


@pytest.mark.slow
def test_a_report_of_an_unfinished_run_projects_the_loss(runs, tmp_path):
    """A loss that falls as a + b log(step) is continued exactly."""
    run = tmp_path / "<half>"
    run.mkdir()
    (run / "log.txt").write_text(
        "".join(
            f"step:{s}/100 train_loss:{6 - 0.5 * math.log(s):.4f} train_time:{s * 10}ms "
            f"step_avg:10.00ms tok/s:1 left:{(100 - s) // 100}s\n"
            for s in range(1, 41)
        )
        + "step:40/100 train_loss:4.1556 train_time:400ms "
        "step_avg:10.00ms tok/s:1 left:1s\n"
    )
    curve = report.read_curves(run)[0]
    steps, losses = report.projection(curve)
    assert steps[-1] == pytest.approx(100) and losses[-1] == pytest.approx(
        6 - 0.5 * math.log(100), abs=2e-3
    )
    text = report.report(run)
    assert "Not finished" in text and "<half>" not in text and "&lt;half&gt;" in text


@pytest.mark.slow
def test_what_analyze_left_is_drawn_and_carried_into_the_record(runs, toy, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    titles = ("Loss by position", "Entropy of the levels")
    assert not any(report.picture(title, report.read_curves(run)) for title in titles)
    (run / "analysis.json").write_text(
        json.dumps(
            dict(
                tokens=dict(
                    position=[
                        dict(name="0-1", targets=2, nats=5.0),
                        dict(name="2-3", targets=2, nats=4.0),
                    ]
                ),
                weights=dict(
                    matrices=[dict(name="blocks.0.up.weight", weights=800, bits=3.0, bytes=310)]
                ),
            )
        )
    )
    assert all("<svg" in report.picture(title, report.read_curves(run)) for title in titles)
    folder = snapshot.new(
        [run],
        SCRIPT,
        tmp_path / "records",
        snapshot.Wanted("One", data=toy, left_out="a test", author="A"),
    )
    assert (folder / "analysis_seed1.json").is_file() and "Loss by position" in (
        folder / "report.html"
    ).read_text()
    assert check.check(folder)["findings"] == []
    (folder / "analysis_seed1.json").write_text("{}")
    assert [f["rule"] for f in check.check(folder)["findings"]] == ["E10"]


def test_rounding_noise_is_that_of_real_rounding(tmp_path):
    torch.manual_seed(0)
    weights = {
        f"w{bits}.weight": (bits, torch.randn(64, 256) * torch.rand(64, 1)) for bits in (4, 6)
    }
    cfg = config(clip="quantile", clip_quantile=1.0).quant
    tensors = {
        name: train_gpt.quantiser(bits, 0.0, cfg).fit(w) for name, (bits, w) in weights.items()
    }
    (tmp_path / "model.golf").write_bytes(train_gpt.pack_artifact(tensors, {}, "zlib"))
    for name, noise in report.rounding_noise(tmp_path / "model.golf").items():
        assert noise == pytest.approx(distance(tensors[name].dequant(), weights[name][1]), rel=0.05)


@pytest.mark.slow
def test_bytes_by_role_add_up_to_the_artifact(record):
    path = record / "model_seed1.golf"
    found = report.stored_bytes(path)
    assert sum(found.values()) == pytest.approx(path.stat().st_size) and min(found.values()) >= 0
    assert {"embed", "row scales", "header"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", sorted(ROOT.glob("records/track_*/*/submission.json")), ids=lambda p: p.parent.name
)
def test_committed_records_pass_and_are_current(folder):
    assert check.check(folder.parent)["passed"]
    assert (folder.parent / "README.md").read_text() == readme.refreshed(folder.parent)


# audit: the same folder, executed.
@pytest.mark.slow
def test_audit_confirms_a_record_and_writes_what_it_saw(record, tmp_path, monkeypatch):
    """The folder alone in an empty place, without a network: launch.sh +tiny, then the artifact in
    other processes."""
    folder = tmp_path / record.parent.name / record.name
    shutil.copytree(record, folder)
    monkeypatch.setattr(audit, "PROBE", audit.PROBE.replace("cuts=6", "cuts=2, length=72"))
    found = audit.audit(folder)
    status = {a["id"]: a["status"] for a in found}
    assert set(status.values()) <= {"pass", "unknown"}, audit.as_text(found)
    passed = {k for k, v in status.items() if v == "pass"}
    assert {
        "self_contained",
        "artifact_recount",
        "repeatable",
        "reload",
        "val_text_unused",
        "suffix_swap",
        "target_swap",
        "score_once",
        "state_digest",
    } <= passed
    audit.record_audits(folder, found)
    written = json.loads((folder / "submission.json").read_text())
    assert {a["id"] for a in written["evidence"]["audits"]} == set(status)
    assert written["compliance"]["no_slot"] == {"pass": True}.get(status.get("suffix_swap"))
    assert (folder / "README.md").read_text() == readme.refreshed(folder) and check.check(folder)[
        "findings"
    ] == []


STUB = """import os, pathlib, random, sys, urllib.request
folder, size = pathlib.Path(__file__).parent, pathlib.Path(__file__).stat().st_size
{before}
if os.environ.get("RUN_MODE") != "eval":
    run = folder / "runs" / os.environ["RUN_ID"]
    run.mkdir(parents=True)
    data = pathlib.Path(os.environ.get("DATA_PATH", folder / "smoke"))
    text = (data / "fineweb_val_000000.bin").read_bytes()
    (run / "model.golf").write_bytes({artifact})
    (run / "log.txt").write_text(f"Total submission size: {{size + {logged}}} bytes\\n")
print(f"final:official variant:chunked val_loss:2.5 val_bpb:{{{score}}}")
"""
HONEST = dict(before="", logged="1000", score="1.25", artifact='b"x" * 1000')


def stub_record(folder: Path, artifact: dict, odd: dict):
    """A record whose script only says that it trains and scores."""
    (folder / "smoke").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "smoke" / f"fineweb_{split}_000000.bin").write_bytes(split.encode() * 1000)
    claim = dict(log="train_seed1.log", val_bpb=1.25) | artifact
    (folder / "submission.json").write_text(json.dumps(dict(seed_results={"1": claim})))
    (folder / "launch.sh").write_text('exec "$PYTHON" train_gpt.py\n')
    (folder / "train_gpt.py").write_text(script := STUB.format(**HONEST | odd))
    (folder / "train_seed1.log").write_text(f"Total submission size: {len(script) + 1000} bytes\n")


@pytest.mark.parametrize(
    "odd, failed",
    [
        (dict(), None),
        (dict(before="urllib.request.urlopen('http://192.0.2.1/x', timeout=3)"), "self_contained"),
        (
            dict(before="sys.exit('error: no') if not (folder / 'launch.sh').exists() else 0"),
            "reload",
        ),
        (dict(score="1.25 if (folder / 'launch.sh').exists() else 1.26"), "reload"),
        (dict(score="random.random()"), "repeatable"),
        (dict(score="1.25 if os.environ.get('RUN_MODE') != 'eval' else 1.2502"), "claimed_score"),
        (dict(artifact="text[-1000:]"), "val_text_unused"),
        (
            dict(
                before="data = pathlib.Path(os.environ.get('DATA_PATH', folder / 'smoke'))\n"
                "not list(data.glob('*train*')) and sys.exit('error: no training text')"
            ),
            "reload",
        ),
        (dict(logged="900"), "artifact_recount"),
    ],
)
def test_audit_of_scripts_that_do_not_do_what_they_say(odd, failed, tmp_path, monkeypatch):
    """A network, a file beside it, another score in a second process, an unstable score, validation
    text in the artifact, training text in the evaluation, a wrong size."""
    monkeypatch.setattr(
        audit, "probes", lambda place, run: []
    )  # these scripts have no model to probe
    stub_record(tmp_path, dict(artifact="model_seed1.golf"), odd)
    (tmp_path / "model_seed1.golf").write_bytes(b"x" * 1000)
    found = [(a["id"], a["status"]) for a in audit.audit(tmp_path, data=tmp_path / "smoke")]
    seen = {name for name, status in found if status == "fail"}
    assert failed in seen if failed else not seen and ("claimed_score", "pass") in found
    assert not (tmp_path / "runs").exists(), "an audit works on a copy"


def test_artifacts_that_stay_with_the_runs_are_known_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "probes", lambda place, run: [])
    for name, content in (("mine", b"x" * 1000), ("other", b"y" * 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.golf").write_bytes(content)
    stub_record(
        tmp_path / "record",
        dict(artifact_sha256=sha256_of(tmp_path / "mine" / "model.golf")),
        {},
    )
    runs, data = [tmp_path / "mine", tmp_path / "other"], tmp_path / "record" / "smoke"
    found = [
        (a["id"], a.get("seed"), a["status"]) for a in audit.audit(tmp_path / "record", data, runs)
    ]
    assert {
        ("artifact_recount", "1", "pass"),
        ("claimed_score", "1", "pass"),
        ("artifact_of_the_record", None, "fail"),
    } <= set(found)
    with pytest.raises(ValueError, match="no model.golf"):
        audit.audit(tmp_path / "record", data, [tmp_path])


@pytest.mark.slow
def test_audit_wants_a_whole_record(tmp_path):
    done = subprocess.run(
        [*TOOLS, "audit", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "audit runs folders that `new` made" in done.stderr


def test_sockets_are_refused_where_there_are_no_namespaces(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import socket, urllib.request\n"
        "a, b = socket.socketpair()\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "socket.create_connection(s.getsockname()).close()\n"
        "for work in (lambda: urllib.request.urlopen('http://192.0.2.1/x', timeout=3),\n"
        "             lambda: socket.create_connection(('192.0.2.1', 80), 3),\n"
        "             lambda: socket.getaddrinfo('example.com', 80)):\n"
        "    try:\n        work()\n        print('reached')\n"
        "    except OSError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "records" / "toolkit" / "offline.py"), str(script)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.count("no network") == 3 and "reached" not in done.stdout, done.stderr

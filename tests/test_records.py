"""The comparison tool of records/: what is run, what is compared, and one real comparison."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

sys.path.insert(0, str(ROOT / "records"))
from toolkit import ablate  # noqa: E402

SPEC = dict(
    base=dict(A=1, B=2),
    texts=dict(here={}, there=dict(C="{PLACE}/x")),
    seeds=[1, 2, 3],
    variants=dict(better=dict(A=5), worse=dict(B=7)),
)


def result(text, seed, variant, bpb, step_ms=100.0) -> dict:
    return dict(text=text, seed=seed, variant=variant, bpb=bpb, step_ms=step_ms, parameters=10)


def test_every_combination_is_run_once_and_knows_its_knobs(monkeypatch):
    monkeypatch.setenv("PLACE", "somewhere")
    runs = ablate.wanted(SPEC)
    assert len({ablate.identity(r) for r in runs}) == len(runs) == 3 * 2 * 3
    knobs = {ablate.identity(r): r["knobs"] for r in runs}
    assert knobs["here", 1, "base"] == dict(A=1, B=2) and knobs["there", 3, "base"] == dict(
        A=1, B=2, C="somewhere/x"
    )
    assert knobs["here", 2, "better"] == dict(A=5, B=2) and knobs["here", 2, "worse"] == dict(
        A=1, B=7
    )


def test_differences_are_taken_seed_by_seed():
    base, other = {1: 2.0, 2: 2.5, 3: 3.0}, {1: 1.9, 2: 2.45, 3: 2.8, 4: 0.0}
    rows = [result("here", s, "base", b) for s, b in base.items()]
    rows += [result("here", s, "better", b, 120.0 + s) for s, b in other.items()]
    found = ablate.paired({ablate.identity(r): r for r in rows}, "here", "better")
    gaps = [other[s] - base[s] for s in base]
    assert found["seeds"] == 3 and found["mean"] == pytest.approx(sum(gaps) / 3)
    assert found["sd"] == pytest.approx(statistics.stdev(gaps)) and found["ratio"] == pytest.approx(
        1.22
    )


def test_a_failed_run_is_tried_again_and_the_last_word_counts(tmp_path):
    rows = [
        dict(text="t", seed=1, variant="base", error="no"),
        result("t", 1, "better", 2.0),
        result("t", 1, "better", 1.5),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = ablate.known(tmp_path / "results.jsonl")
    assert list(found) == [("t", 1, "better")] and found["t", 1, "better"]["bpb"] == 1.5


def sweep(verb: str, spec: dict, folder: Path) -> list[dict]:
    """Run a sweep to its end through its command line; returns all its results so far."""
    (folder / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "records" / "tools.py"),
            verb,
            "run",
            str(folder / "spec.json"),
            "--scratch",
            str(folder),
        ],
        capture_output=True,
        text=True,
        env=clean_env(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_real_comparison_ends_in_a_table_and_a_plot(brief, tmp_path):
    base = dict(
        PRESET="baseline+tiny",
        DEVICE="cpu",
        THREADS=1,
        NUMERICS="fp32",
        ATTENTION="sdpa",
        DATA_PATH=str(brief),
    )
    spec = dict(
        base=base,
        texts=dict(toy={}),
        seeds=[1, 2],
        variants=dict(narrow=dict(MLP_MULT=1), broken=dict(NUM_HEADS=3)),
    )
    lines = sweep("ablate", spec, tmp_path)
    assert len(lines) == 6 and sum("error" in r for r in lines) == 2
    assert all("NUM_HEADS=3" in r["error"] for r in lines if "error" in r)
    good = {ablate.identity(r): r["bpb"] for r in lines if "bpb" in r}
    gaps = [good["toy", seed, "narrow"] - good["toy", seed, "base"] for seed in (1, 2)]
    table = (tmp_path / "table.md").read_text()
    gap = f"{statistics.mean(gaps):+.4f} ± {statistics.stdev(gaps):.4f}"
    assert f"| narrow | `MLP_MULT=1` | {gap} (n=2)" in table
    assert "<svg" in (tmp_path / "plot.svg").read_text() and "nan" in table
    assert len(sweep("ablate", spec, tmp_path)) == 8, "only the failed runs are repeated"


def test_every_committed_comparison_is_complete():
    """A committed folder holds its specification, the data of every run it asks for, the table and
    the plot."""
    for path in (ROOT / "records").glob("**/spec.json"):
        spec, results = (
            json.loads(path.read_text()),
            ablate.known(path.with_name("results.jsonl")),
        )
        missing = [
            (t, s, v)
            for t in spec["texts"]
            for s in spec["seeds"]
            for v in ["base", *spec["variants"]]
            if (t, s, v) not in results
        ]
        assert not missing, f"{path.parent.name}: {missing[:5]}"
        assert path.with_name("table.md").read_text() == ablate.table(spec, results)
        assert path.with_name("plot.svg").exists()


@pytest.mark.slow
def test_a_sweep_of_quantisers_measures_what_an_export_would(toy, tmp_path):
    base = dict(
        PRESET="baseline+tiny",
        DEVICE="cpu",
        THREADS=1,
        NUMERICS="fp32",
        ATTENTION="sdpa",
        DATA_PATH=str(toy),
        SCALE_FLOOR=0,
        CLIP="sigma",
        MATRIX_BITS=6,
        ROUNDING="gptq",
        ITERATIONS=20,
    )
    spec = dict(
        base=base,
        seeds=[3],
        reference="GPTQ",
        factors=[1, 3],
        bits=[3, 6],
        variants={"GPTQ": {}, "searched": dict(CLIP="search", ROUNDING="nearest")},
    )
    rows = {(r["variant"], r["x"]): r for r in sweep("quantisers", spec, tmp_path)}
    assert set(rows) == {("GPTQ", 1), ("GPTQ", 3), ("searched", 3), ("searched", 6)}
    assert (
        rows["GPTQ", 3]["bytes"] < rows["GPTQ", 1]["bytes"]
        and rows["GPTQ", 3]["gap"] > rows["GPTQ", 1]["gap"]
    )
    log = next(tmp_path.glob("sweep-*/log.txt")).read_text()
    exported = float(log.split("final:official")[1].split("val_bpb:")[1].split()[0])
    assert rows["GPTQ", 1]["trained"] + rows["GPTQ", 1]["gap"] == pytest.approx(exported, abs=1e-5)
    assert (
        "| GPTQ |" in (tmp_path / "table.md").read_text()
        and "<svg" in (tmp_path / "plot.svg").read_text()
    )
    assert len(sweep("quantisers", spec, tmp_path)) == 4, "nothing is measured twice"


@pytest.mark.slow
def test_gains_are_those_of_the_same_artifact_and_documents(brief, tmp_path):
    base = dict(
        PRESET="baseline+tiny",
        DEVICE="cpu",
        THREADS=1,
        NUMERICS="fp32",
        ATTENTION="sdpa",
        DATA_PATH=str(brief),
    )
    spec = dict(
        base=base,
        seeds=[3, 4],
        variants={
            "chunks": dict(knobs=dict(EVAL="chunked")),
            "doc": dict(knobs=dict(EVAL="doc"), against="chunks"),
            "learning": dict(knobs=dict(EVAL="sliding", TTT="sgd", TTT_LR=0.01), against="chunks"),
        },
    )
    rows = {(r["seed"], r["variant"]): r for r in sweep("gains", spec, tmp_path)}
    assert len(rows) == 6
    for r in rows.values():
        assert sum(r["nats"]) / math.log(2) / sum(r["bytes"]) == pytest.approx(r["bpb"], abs=2e-5)
    log = (tmp_path / "gains-seed3" / "log.txt").read_text()
    assert f"val_bpb:{rows[3, 'chunks']['bpb']:.8f}" in log.split("final:official")[1], (
        "the run's own artifact"
    )
    for name in ("doc", "learning"):
        gains = [rows[seed, "chunks"]["bpb"] - rows[seed, name]["bpb"] for seed in (3, 4)]
        line = next(
            x
            for x in (tmp_path / "table.md").read_text().splitlines()
            if x.startswith(f"| {name} ")
        )
        assert (
            f"| {statistics.mean(gains):+.4f} (" in line
            and " ".join(f"{g:+.4f}" for g in gains) in line
        )
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert len(sweep("gains", spec, tmp_path)) == 6, "nothing is measured twice"


def test_a_specification_that_lacks_something_is_one_line(tmp_path):
    """Not a KeyError: the file and the missing names, exit code 2, nothing run."""
    spec = tmp_path / "spec.json"
    for verb, text, want in (
        ("ablate", '{"base": {}}', "no texts, seeds, variants"),
        ("quantisers", '{"base": {}, "seeds": [1], "variants": {}}', "no reference, factors, bits"),
        ("gains", "[1]", "no object"),
    ):
        spec.write_text(text)
        done = subprocess.run(
            [sys.executable, str(ROOT / "records" / "tools.py"), verb, "run", str(spec)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.startswith(f"error: {spec}: {want}"), done
        assert done.stderr.count("\n") == 1

"""The analysis of a finished run, against numbers worked out here."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, official
from running import train

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))
import tools  # noqa: E402
from toolkit import analyze  # noqa: E402


def test_where_the_loss_lies():
    losses, borders, sizes = (
        np.arange(1.0, 101),
        np.array([0, 10, 100]),
        np.repeat([0, 1, 3, 40], 25),
    )
    found = analyze.tokens(losses, borders, sizes)
    assert found["mean"] == 50.5 and found["median"] == 50.5
    assert found["hardest"] == pytest.approx(
        {"1 %": 100 / 5050, "5 %": 490 / 5050, "10 %": 955 / 5050}
    )
    assert {g["name"]: g["targets"] for g in found["position"]} == {
        "0-1": 4,
        "2-3": 4,
        "4-7": 8,
        "8-15": 10,
        "16-31": 16,
        "32-63": 32,
        "64-127": 26,
    }
    assert found["position"][0]["nats"] == pytest.approx((1 + 2 + 11 + 12) / 4)
    assert {g["name"]: g["targets"] for g in found["bytes"]} == {
        "0": 25,
        "1": 25,
        "3": 25,
        "16+": 25,
    }
    assert sum(g["share"] for g in found["bytes"]) == pytest.approx(1)


def test_entropy_is_shannons():
    assert analyze.entropy_bits(np.array([3, 3, 3, 3], np.int8)) == 0
    assert analyze.entropy_bits(np.arange(-32, 32).astype(np.int8)) == pytest.approx(6)
    assert analyze.entropy_bits(np.array([0, 0, 0, 1], np.int8)) == pytest.approx(
        0.811278, abs=1e-6
    )


@pytest.mark.parametrize("c, a, alpha", [(1.1, 30.0, 0.3), (0.9, 800.0, 0.5)])
def test_a_known_curve_is_found_and_its_projection_covered(c, a, alpha):
    """Losses made of a known law and noise, with a decay at the end that must not be read."""
    rng, per_step, events = np.random.default_rng(0), 1000, []
    for step in range(10, 2001, 10):
        lr = 1.0 if step <= 1500 else 1 - (step - 1500) / 600
        loss = c + a * (step * per_step) ** -alpha + rng.normal(0, 0.004) - (1 - lr)
        events.append(dict(event="train", step=step, loss=loss, lr=lr, batch=1.0))
    found = analyze.scaling(events, per_step, 1.0)
    assert found["source"] == "train" and found["points"] == 135
    assert found["alpha"] == pytest.approx(alpha, rel=0.15) and found["c"] == pytest.approx(
        c, abs=0.1
    )
    for p in found["projection"]:
        assert p["bpb"] == pytest.approx(c + a * p["tokens"] ** -alpha, abs=0.03)
        assert p["interval"][0] <= p["bpb"] + 0.01 and p["interval"][1] >= p["bpb"] - 0.01
    assert found["projection"][3]["tokens"] == 20_000_000
    assert analyze.scaling(events[:4], per_step, 1.0) is None


def test_documents_carry_an_interval(tmp_path):
    rng = np.random.default_rng(0)
    table = np.stack([rng.gamma(5, 100, 400), np.full(400, 300.0)], 1).astype(np.float32)
    np.save(tmp_path / "d.npy", table)
    found = analyze.documents(tmp_path / "d.npy")
    exact = table[:, 0].sum() / np.log(2) / table[:, 1].sum()
    error = 1.96 * table[:, 0].std() / 20 / np.log(2) / 300
    assert found["bpb"] == pytest.approx(exact, rel=1e-6) and found["count"] == 400
    assert found["interval"] == pytest.approx([exact - error, exact + error], rel=0.02)


@pytest.mark.slow
def test_a_real_run_is_analysed(toy, tmp_path, capsys):
    run = train(toy, tmp_path, "run", ITERATIONS=30, MATRIX_BITS=6, CODEC="rans")
    assert run.code == 0, run.err
    found = analyze.analyze(run.folder, dict(DATA_PATH=str(toy)))
    line = official(run.out)
    assert found["tokens"]["mean"] == pytest.approx(
        float(line.split("val_loss:")[1].split()[0]), abs=1e-5
    )
    assert (
        found["documents"]["bpb"] == pytest.approx(found["bpb"], rel=1e-5)
        and found["compliant"] is True
    )
    header = tg.unpack_artifact((run.folder / "model.golf").read_bytes())[0]
    levels = [shape for _, kind, shape, scaled, *_ in header["tensors"] if scaled]
    assert [r["weights"] for r in found["weights"]["matrices"]] == [m * n for m, n in levels]
    assert 0.8 < found["weights"]["paid_over_ideal"] < 1.2, (
        "the coder may know more than frequencies"
    )
    assert all(
        r["bytes"] * 8 > 0.8 * r["weights"] * r["bits"] for r in found["weights"]["matrices"]
    )
    assert found["scaling"]["points"] >= 5
    assert tools.main(["analyze", str(run.folder), f"DATA_PATH={toy}"]) == 0
    assert json.loads(capsys.readouterr().out)["bpb"] == found["bpb"]
    assert tools.main(["analyze", str(tmp_path)]) == 2 and "config.json" in capsys.readouterr().err

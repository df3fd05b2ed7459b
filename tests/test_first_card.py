"""The form of the first-card script (tests/gpu/first_card.py), without a card: what a stage says is
kept however it ends, and every prediction stands beside its measurement."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
import first_card as fc  # noqa: E402
import rank  # noqa: E402

import train_gpt as tg  # noqa: E402

FIGURE = "bf16 product, TFLOP/s"


def child(tmp_path: Path, then: str) -> Path:
    """A stage that says one figure, and then does something."""
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(fc.HERE)!r})\nimport first_card as fc\n"
        f"fc.say({FIGURE!r}, 325.0, 'note')\nprint('chatter')\n{then}\n"
    )
    return script


@pytest.mark.parametrize(
    "then, ending, why",
    (
        ("", "ok", ""),
        ("raise ValueError('broken card')", "failed", "ValueError: broken card"),
        ("import os; os.abort()", "failed", ""),
        ("time.sleep(60)", "timeout", ""),
    ),
)
def test_a_figure_outlives_its_stage(then, ending, why, tmp_path):
    result = fc.run_stage("ceilings", 4, tmp_path, child(tmp_path, then))
    assert result["ending"] == ending and why in result["why"] and result["seconds"] < 15
    assert result["figures"] == [dict(name=FIGURE, value=325.0, predicted=650, note="note")]
    assert "chatter" in (tmp_path / "ceilings.log").read_text()


def test_an_attempt_that_fails_is_a_figure(capsys):
    assert fc.attempt("FA3 forward, ms", lambda: {}["missing"]) is None
    assert '"value": null' in capsys.readouterr().out


def test_the_report_puts_predictions_beside_measurements():
    figures = [
        dict(name=FIGURE, value=325.0, predicted=650, note="a note"),
        dict(name="torch", value="2.11.0", predicted=None, note=""),
        dict(name="FA3 forward, ms", value=None, predicted=0.06, note="ModuleNotFoundError: no"),
    ]
    result = dict(stage="ceilings", ending="ok", why="", seconds=3.0, limit=30, figures=figures)
    text = fc.report([result])
    row = next(line for line in text.splitlines() if FIGURE in line)
    assert row.split()[-5:] == ["325", "650", "0.50", "a", "note"]
    missing = text.splitlines()[-1]
    assert missing.startswith("predicted, not measured: ")
    assert "baseline step, ms" in missing and "FA3 forward, ms" not in missing.split("; ")


def test_its_trainer_takes_a_step():
    """On the CPU, so that a change of the trainer's interface is noticed without a card."""
    words = dict(PRESET="phased_ttt+tiny", DEVICE="cpu", NUMERICS="fp32")
    trainer = rank.make_trainer(words, world=1)
    before = trainer.flat.weights.clone()
    assert float(rank.take_step(trainer)) > 0 and not trainer.flat.weights.equal(before)


def test_what_its_stages_use_is_there():
    """Names of train_gpt.py that the script and the null GPU's files mention."""
    folder = Path(fc.__file__).parent
    named = set()
    for path in folder.rglob("*.py"):
        named |= set(re.findall(r"\btg\.([A-Za-z_]+)", path.read_text(encoding="utf-8")))
    assert len(named) > 10 and not [name for name in named if not hasattr(tg, name)]


def test_the_stages_fit_into_their_time():
    for total, limits in (
        (fc.TOTAL, [s.limit for s in fc.STAGES.values()]),
        (fc.TOTAL_SHORT, [s.short for s in fc.STAGES.values()]),
    ):
        # limits are rarely reached; what comes last is given what is left
        assert sum(limits) <= 1.2 * total
    assert fc.TOTAL < 600 and fc.TOTAL_SHORT < 240
    assert all(callable(getattr(fc, name)) for name in fc.STAGES)

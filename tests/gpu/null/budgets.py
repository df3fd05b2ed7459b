"""What one training step of rank 0 of eight may use, for every preset: test_budgets.py holds the
trainer to it. A change that launches less or needs less memory lowers its row."""

from typing import NamedTuple


class Budget(NamedTuple):
    """Upper limits of a step: launches (kernels, copies and fills) run eagerly, as COMPILE=off, of
    a +tiny run and at full size; launches of the compiled step at full size, where counted; GiB at
    the peak at full size, eager."""

    tiny: int
    eager: int
    compiled: int | None
    peak_gib: float


BUDGETS = {
    "baseline": Budget(800, 1_850, 950, 12.5),
    "mlp3x_seq4096": Budget(1_280, 3_350, None, 11.0),
    "skill_forge": Budget(1_920, 4_200, None, 1.0),
    "depth_recurrent": Budget(1_580, 17_200, None, 7.0),
    "turbo_engram": Budget(1_210, 5_800, None, 16.0),
    "prequant_ttt": Budget(1_260, 6_700, None, 26.0),
    "score_first_ttt": Budget(1_370, 8_000, None, 30.5),
    "phased_ttt": Budget(1_610, 9_500, None, 40.0),
}

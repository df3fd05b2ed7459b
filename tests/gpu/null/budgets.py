"""What one training step of rank 0 of eight may use, for every preset: test_budgets.py holds the
trainer to it. A change that launches less or needs less memory lowers its row."""

from typing import NamedTuple


class Budget(NamedTuple):
    """Upper limits of a step: launches (kernels, copies and fills), and GiB at the peak by
    PyTorch's allocator. Eager is COMPILE=off; the compiled step is counted where somebody took the
    minutes."""

    tiny: int  # launches of the eager step of PRESET=x+tiny
    eager: int  # the rest is at full size
    eager_gib: float
    compiled: int | None = None
    compiled_gib: float = 0.0


BUDGETS = {
    "baseline": Budget(800, 1_850, 12.5, 950, 10.4),
    "mlp3x_seq4096": Budget(1_280, 3_350, 11.0),
    "skill_forge": Budget(1_920, 4_200, 1.0),
    "depth_recurrent": Budget(1_580, 17_200, 7.0),
    "turbo_engram": Budget(1_210, 5_800, 16.0, 2_300, 12.8),
    "prequant_ttt": Budget(1_260, 6_700, 26.0),
    "score_first_ttt": Budget(1_370, 8_000, 30.5),
    "phased_ttt": Budget(1_610, 9_250, 37.0, 2_950, 23.0),
}

"""Imported by tests that mean something on the null GPU alone: skips them elsewhere."""

import os

import pytest
import torch

if "NULL_GPU" not in os.environ:
    reason = "run these as: python tests/gpu/null/run.py -m pytest -n 0 tests/gpu/null"
    if torch.version.cuda is None:
        reason = "this PyTorch has no CUDA"
    pytest.skip(reason, allow_module_level=True)

"""Loaded by every Python that starts under the null GPU: when the program imports torch, answers.py
is applied to it."""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class Answers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch where it is, and lets it be followed by answers.py."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        self.real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.real
        self.real.exec_module(module)
        where = Path(__file__).resolve().parent.parent / "answers.py"
        spec = importlib.util.spec_from_file_location("null_gpu_answers", where)
        sys.modules[spec.name] = answers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(answers)
        answers.install()


sys.meta_path.insert(0, Answers())

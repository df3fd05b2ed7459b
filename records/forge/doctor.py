"""What a machine offers, and whether a script speaks the forge's language."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import devices, patches, sandbox


def package(name: str) -> str:
    """The version of an installed package, or "missing"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def doctor(script: Path) -> dict[str, str]:
    """One line about everything that a campaign may need."""
    gpus = devices.visible()
    text = script.read_text("utf-8", "replace") if script.exists() else ""
    if not text:
        speaks = "missing"
    elif "final:official" in text and "predicted_bytes" in text:
        speaks = "speaks the log format"
    else:
        speaks = "prints no final:official or predicted_bytes line"
    return dict(
        python=platform.python_version(),
        torch=package("torch"),
        optuna=package("optuna"),
        scipy=package("scipy"),
        remote=f"grpcio {package('grpcio')}",
        slurm=f"submitit {package('submitit')}",
        sandbox=sandbox.tier(),
        cores=str(len(os.sched_getaffinity(0))),
        gpus=", ".join(gpus) or "none visible",
        disk=f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free",
        script=speaks,
        protected=f"{len(patches.protected_digest(text))} regions",
    )

"""What a campaign's folder holds besides its ledger: code by content, skills, a print of the
data."""

import contextlib
import json
from pathlib import Path

from . import ForgeError
from .ledger import digest, file_digest, write_atomic


def load_skills(folder: Path) -> dict[str, dict]:
    """{skill: its knobs.json} of a folder of skills. Raises ForgeError naming the file."""
    found = {}
    for path in sorted(folder.glob("*/assets/knobs.json")):
        try:
            found[path.parts[-3]] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ForgeError(f"{path.parts[-3]}/assets/knobs.json: not JSON ({error})") from None
    return found


def data_print(path: str) -> str:
    """A fingerprint of a data folder: names, sizes and first and last bytes of its shards. Empty
    for "auto"."""
    parts = []
    for file in sorted(Path(path).glob("*.bin")) if path != "auto" else ():
        with open(file, "rb") as f:
            head = f.read(4096)
            f.seek(max(0, file.stat().st_size - 4096))
            parts.append([file.name, file.stat().st_size, digest([head.hex(), f.read().hex()])])
    return digest(parts) if parts else ""


def add_code(folder: Path, script: Path, data: Path | None = None) -> str:
    """Keep a script by content in code/<sha>/, read-only; returns its name. `data` is linked beside
    it."""
    sha = file_digest(script)[:12]
    place = folder / "code" / sha
    if not (place / "train_gpt.py").exists():
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / "train_gpt.py", script.read_bytes())
        (place / "train_gpt.py").chmod(0o444)
    if data and data.is_dir() and not (place / "data").exists():
        with contextlib.suppress(FileExistsError):
            (place / "data").symlink_to(data.resolve())
    return sha

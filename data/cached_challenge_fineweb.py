#!/usr/bin/env python3
"""Download the competition's FineWeb shards and tokenizers, verified byte by byte.

    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 80
    MATCHED_FINEWEB_REPO_ID=<owner>/<repo> python data/cached_challenge_fineweb.py --variant sp8192

Arguments, environment and layout are those of the competition's own downloader: shards go to
data/datasets/<dataset>/, tokenizers to data/tokenizers/, the repository's manifest.json to data/.
The validation split always comes whole. Other variables: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (folder
inside the repository), HF_TOKEN, HF_ENDPOINT.

Every file is compared with the sha256 that the hub tells before it gets its name, and shards with
their header. What was downloaded when the connection broke, or the process was killed, is kept and
continued; files that are there already are kept when their content is right. Exit codes: 0 done, 2
not possible, with one line that says why.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import errno
import hashlib
import os
import random
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

try:
    import documents as docs
    import tqdm
    import verify
    from build_sample import SHARD_MAGIC, SHARD_VERSION, sha256_file, sync
    from documents import DataError
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils import logging as hub_logging
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"error: {missing.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent
REPOSITORY, PREFIX = "willdepueoai/parameter-golf", "datasets"
VARIANT = re.compile(r"sp\d+(_[a-z0-9_]+)?")
TRAIN_SHARDS = 80
ATTEMPTS, WAIT, LONGEST_WAIT = (
    6,
    2.0,
    60.0,
)  # tries for one file, seconds before the second (doubled each time), bound
PARALLEL = 4
SPARE = 1 << 28  # bytes that a disk must have beyond what is downloaded
STOP = threading.Event()  # set when the user interrupts: transfers end, pauses too
NETWORK = (OSError, *HfHubHTTPError.__bases__)  # what a try may fail with and the next one succeed


class Stopped(Exception):
    """The user interrupted while a file was on its way."""


class Remote(NamedTuple):
    """A file of the repository at one commit."""

    path: str
    size: int
    sha256: str  # of the content; empty for a small file
    blob_id: str  # git's name for the content


class Hub(NamedTuple):
    """A dataset repository at one commit, so that all files belong together."""

    api: HfApi
    repo: str
    prefix: str
    commit: str

    def full(self, path: str) -> str:
        """A path inside the repository, from one below the prefix. Raises DataError for one that
        leaves it."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(
                f"{self.repo}: its manifest names {path!r}, which is outside of its folder"
            )
        return str(PurePosixPath(self.prefix) / path)

    def local(self, remote: Remote) -> Path:
        """Where a file goes: as in the repository, without the prefix."""
        return ROOT / PurePosixPath(remote.path).relative_to(PurePosixPath(self.prefix))

    def find(self, paths: list[str]) -> list[Remote]:
        """Size and fingerprint of files below the prefix. Raises DataError that names those that
        are missing."""
        full = [self.full(path) for path in paths]
        told = patiently(
            "list of files",
            lambda: self.api.get_paths_info(
                self.repo, full, repo_type="dataset", revision=self.commit
            ),
        )
        found = {
            i.path: Remote(i.path, i.size, i.lfs.sha256 if i.lfs else "", i.blob_id)
            for i in told
            if hasattr(i, "blob_id")
        }
        if missing := [path for path in full if path not in found]:
            raise DataError(
                f"{self.repo}: has no {missing[0]}" + f" ({len(missing)} files are missing)"
            )
        return [found[path] for path in full]


# ---- Trying again ----


def reason(error: BaseException) -> str:
    """Why a try failed, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = f"HTTP {status}" if status else str(error).strip().split("\n")[0]
    return text or type(error).__name__


def final(error: BaseException) -> bool:
    """Whether trying again is useless: the server knows what it says, or the disk is full."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return getattr(error, "errno", None) == errno.ENOSPC or (
        status is not None and 400 <= status < 500 and status not in (408, 429)
    )


def patiently(what: str, work: Callable):
    """What `work` returns, tried several times with growing pauses. Raises DataError with the last
    reason."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except RepositoryNotFoundError:
            raise
        except NETWORK as error:
            if final(error):
                raise DataError(f"{what}: {reason(error)}") from None
            if attempt == ATTEMPTS - 1:
                raise DataError(
                    f"{what}: {reason(error)} ({ATTEMPTS} tries; is there a network?); what has "
                    "arrived is kept, run this again"
                ) from None
            if STOP.wait(min(WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)):
                raise Stopped from None


# ---- One file ----


def wrong_with(path: Path, remote: Remote) -> str:
    """What is wrong with a local file; empty when it is the remote one."""
    size = path.stat().st_size
    if size != remote.size:
        return f"{size:,} bytes, the hub says {remote.size:,}"
    if path.name.endswith(".bin") or remote.path.endswith(".bin"):
        with open(path, "rb") as file:
            magic, version, count = struct.unpack("<3i", file.read(12).ljust(12))
        if (magic, version, 1024 + 2 * count) != (SHARD_MAGIC, SHARD_VERSION, size):
            told = f"magic {magic}, version {version}, {count} tokens"
            return f"its header ({told}) is not that of such a shard"
    if remote.sha256:
        return (
            ""
            if sha256_file(path) == remote.sha256
            else "its sha256 is not the one that the hub tells"
        )
    blob = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
    return "" if blob == remote.blob_id else "its content is not the one that the hub tells"


def bar_for(total: tqdm.tqdm) -> type:
    """A class that stands for a file's own progress bar and moves the common one."""

    class Part:
        """Forwards what arrives."""

        def __init__(self, *args, **options):
            """The common bar is set up already."""

        def update(self, size: int):
            """So many bytes arrived (or, below zero, must come again)."""
            total.update(size)
            if STOP.is_set():
                raise Stopped

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    return Part


def fetch(hub: Hub, remote: Remote, bar: tqdm.tqdm) -> str:
    """Make sure that a file is here; returns "kept" (its content was read and is right) or
    "fetched". Raises DataError."""
    path = hub.local(remote)
    if path.is_file() and not wrong_with(path, remote):
        bar.update(remote.size)
        return "kept"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{(remote.sha256 or remote.blob_id)[:16]}.part")
    url = hf_hub_url(
        hub.repo, remote.path, repo_type="dataset", revision=hub.commit, endpoint=hub.api.endpoint
    )

    def transfer():
        with open(part, "ab") as file:
            if file.tell() > remote.size:
                file.truncate(0)
            arrived = file.seek(0, os.SEEK_END)
            bar.update(arrived - seen[0])
            try:
                http_get(
                    url,
                    file,
                    resume_size=arrived,
                    headers=build_hf_headers(),
                    expected_size=remote.size,
                    displayed_filename=path.name,
                    tqdm_class=bar_for(bar),
                )
                file.flush()
                os.fsync(file.fileno())
            finally:
                file.flush()
                seen[0] = file.seek(0, os.SEEK_END)
        if problem := wrong_with(part, remote):
            part.unlink()
            bar.update(-seen[0])
            seen[0] = 0
            raise OSError(f"what arrived is damaged: {problem}")

    seen = [0]  # bytes of this file that the bar has counted
    patiently(remote.path, transfer)
    os.replace(part, path)
    sync(path.parent)
    return "fetched"


# ---- A dataset ----


def connect() -> Hub:
    """The repository that the environment names, at its newest commit. Raises DataError."""
    if constants.HF_HUB_OFFLINE:
        raise DataError("HF_HUB_OFFLINE=1: the hub is switched off; unset it to download")
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", REPOSITORY)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"))
    try:
        info = patiently(
            f"{repo} at {api.endpoint}",
            lambda: api.repo_info(repo, repo_type="dataset", timeout=30),
        )
    except RepositoryNotFoundError:
        raise DataError(
            f"MATCHED_FINEWEB_REPO_ID={repo}: no such dataset repository at {api.endpoint}, or a "
            "private one (then set HF_TOKEN)"
        ) from None
    except ValueError as error:
        raise DataError(f"MATCHED_FINEWEB_REPO_ID={repo}: {reason(error)}") from None
    return Hub(
        api, repo, os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", PREFIX).strip("/"), info.sha
    )


def get_all(hub: Hub, remotes: list[Remote]) -> None:
    """Fetch files in parallel, those that fail not stopping the others. Raises DataError for the
    first failure, and before anything is fetched when the disk cannot hold all. An interruption
    ends what is on its way and drops what waits."""
    missing = [
        r for r in remotes if not hub.local(r).is_file() or hub.local(r).stat().st_size != r.size
    ]
    need, free = sum(r.size for r in missing), shutil.disk_usage(ROOT).free
    if need and need + SPARE > free:
        raise DataError(
            f"{need / 1e9:.1f} GB are to be downloaded, the disk of {ROOT.name}/ has "
            f"{free / 1e9:.1f} GB free ({SPARE / 1e9:.1f} GB are kept)"
        )
    size = sum(r.size for r in remotes)
    pool = concurrent.futures.ThreadPoolExecutor(PARALLEL)
    failed = []
    with tqdm.tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        try:
            tasks = {pool.submit(fetch, hub, remote, bar): remote for remote in remotes}
            for task in concurrent.futures.as_completed(tasks):
                if error := task.exception():
                    failed.append(error)
                elif task.result() == "fetched":
                    bar.write(f"fetched {tasks[task].path} ({tasks[task].size:,} bytes)")
        except KeyboardInterrupt:
            STOP.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise failed[0]


def entry(manifest: dict, kind: str, name: str, hub: Hub) -> dict:
    """The named entry of the repository's manifest. Raises DataError that lists what there is."""
    found = {e.get("name"): e for e in manifest.get(kind, []) if isinstance(e, dict)}
    if name not in found:
        raise DataError(
            f"{hub.repo}: no {kind[:-1]} {name!r} in its manifest, which has "
            f"{', '.join(sorted(map(str, found))) or 'none'}"
        )
    return found[name]


def download(variant: str, train_shards: int, skip_manifest: bool, with_docs: bool) -> Path:
    """Download a variant; returns the folder of its shards. Raises DataError."""
    hub, name = connect(), f"fineweb10B_{variant}"
    manifest = ROOT / docs.MANIFEST
    if not skip_manifest:
        get_all(hub, hub.find([docs.MANIFEST]))
    elif not manifest.is_file():
        raise DataError("--skip-manifest: there is no data/manifest.json from an earlier download")
    told = docs.read_json(manifest) or {}
    dataset = entry(told, "datasets", name, hub)
    tokenizer = entry(told, "tokenizers", dataset.get("tokenizer_name"), hub)
    try:
        counts = {split: int(dataset["stats"][f"files_{split}"]) for split in ("train", "val")}
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{hub.repo}: its manifest does not say how many shards {name} has"
        ) from None
    if not 0 <= train_shards <= counts["train"]:
        raise DataError(
            f"--train-shards {train_shards}: {name} has {counts['train']} in {hub.repo}"
        )
    files = [
        f"datasets/{name}/fineweb_{split}_{i:06d}.bin"
        for split, n in (
            ("val", counts["val"]),
            ("val_bytes", counts["val"] if "caseops" in name else 0),
            ("train", train_shards),
        )
        for i in range(n)
    ]
    models = [
        str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)
    ]
    if not any(name.endswith(".model") for name in models):
        raise DataError(
            f"{hub.repo}: {name} has no SentencePiece model, without which train_gpt.py cannot "
            "count bytes; --with-docs gives the text with another variant, data/prepare.py "
            "encodes it"
        )
    texts = ["docs_selected.jsonl", "docs_selected.source_manifest.json"] if with_docs else []
    remotes, folder = hub.find(files + models + texts), ROOT / "datasets" / name
    before = (docs.read_json(folder / docs.MANIFEST) or {}).get("files", {})
    get_all(hub, remotes)
    describe(hub, folder, remotes, [ROOT / m for m in models if m.endswith(".model")], before)
    return folder


def describe(
    hub: Hub, folder: Path, remotes: list[Remote], models: list[Path], before: dict
) -> None:
    """Write the manifest of the dataset folder, which training checks and its log quotes."""
    files = {
        PurePosixPath(r.path).name: dict(
            tokens=(r.size - 1024) // 2, sha256=r.sha256 or sha256_file(hub.local(r))
        )
        for r in remotes
        if r.path.endswith(".bin")
    }
    files = {name: e for name, e in before.items() if (folder / name).is_file()} | files
    targets = (
        sum(e["tokens"] for n, e in files.items() if re.fullmatch(r"fineweb_val_\d+\.bin", n)) - 1
    )
    known = verify.known_split(targets, verify.KNOWN_BYTES)
    note = (
        f"Validation split of the competition, {known}."
        if known
        else f"{targets:,} validation targets are not the competition's under a tokenizer that is "
        "known here."
    )
    manifest = dict(
        name=folder.name,
        comparable=bool(known),
        note=note,
        repository=hub.repo,
        commit=hub.commit,
        normalised=True,
        **(
            {"tokenizer": models[0].name, "tokenizer_sha256": sha256_file(models[0])}
            if models
            else {}
        ),
        files=dict(sorted(files.items())),
    )
    if docs.read_json(folder / docs.MANIFEST) != manifest:
        docs.write_json(folder / docs.MANIFEST, manifest)
    print(f"{folder.name}: {len(files)} shards, {note}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "positional", nargs="?", type=int, metavar="N", help="the same as --train-shards N"
    )
    parser.add_argument(
        "--train-shards",
        type=int,
        default=TRAIN_SHARDS,
        metavar="N",
        help="training shards, the first N (default %(default)s)",
    )
    parser.add_argument(
        "--variant",
        default="sp1024",
        help="sp<vocabulary> or a longer name of the "
        "repository, such as sp8192_lossless_caps_caseops_v1_reserved (default %(default)s)",
    )
    parser.add_argument(
        "--skip-manifest", action="store_true", help="use data/manifest.json as it is"
    )
    parser.add_argument(
        "--with-docs",
        action="store_true",
        help="also docs_selected.jsonl, the documents themselves",
    )
    asked = parser.parse_args(argv)
    hub_logging.set_verbosity_error()

    def fetch() -> int:
        if not VARIANT.fullmatch(asked.variant):
            reason = ""
            if asked.variant == "byte260":
                reason = (
                    ": its byte ids have no SentencePiece model, so train_gpt.py cannot use them"
                )
            raise DataError(
                f"--variant {asked.variant}{reason}: want sp<vocabulary> or sp<vocabulary>_<name>"
            )
        shards = asked.train_shards if asked.positional is None else asked.positional
        folder = download(asked.variant, shards, asked.skip_manifest, asked.with_docs)
        print(
            f"ready; what is in it: python data/prepare.py verify data/datasets/{folder.name} "
            "--tokenizer MODEL"
        )
        return 0

    return docs.exit_code(fetch)


if __name__ == "__main__":
    sys.exit(main())

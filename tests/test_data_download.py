"""The downloader against a local server that speaks the hub's protocol, and misbehaves as networks
do."""

import collections
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import build_sample
import cached_challenge_fineweb as tool
import numpy as np
import pytest
import verify
from conftest import ROOT, clean_env

COMMIT = "c0ffee" * 6 + "c0ff"
NAME = "fineweb10B_sp1024"
CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"


def repository() -> dict[str, bytes]:
    """Files of a small copy of the competition's repository."""
    rng = np.random.default_rng(0)
    files = {
        "datasets/tokenizers/fineweb_1024_bpe.model": build_sample.TOKENIZER.read_bytes(),
        "datasets/tokenizers/caseops.model": b"another tokenizer",
    }
    for name, train in ((NAME, 3), (f"fineweb10B_{CASEOPS}", 1)):
        for split, count in (
            ("train", train),
            ("val", 1),
            *([("val_bytes", 1)] if "caseops" in name else []),
        ):
            for i in range(count):
                tokens = rng.integers(4, 1024, 60_000).astype(np.uint16)
                files[f"datasets/datasets/{name}/fineweb_{split}_{i:06d}.bin"] = build_sample.shard(
                    tokens
                )
    manifest = dict(
        datasets=[
            dict(name=NAME, tokenizer_name="sp_bpe_1024", stats=dict(files_train=3, files_val=1)),
            dict(
                name=f"fineweb10B_{CASEOPS}",
                tokenizer_name="caseops",
                stats=dict(files_train=1, files_val=1),
            ),
            dict(
                name="fineweb10B_sp2048",
                tokenizer_name="evil",
                stats=dict(files_train=1, files_val=1),
            ),
            dict(
                name="fineweb10B_sp512",
                tokenizer_name="bytes",
                stats=dict(files_train=1, files_val=1),
            ),
        ],
        tokenizers=[
            dict(name="bytes", path="tokenizers/fineweb_pure_byte.json"),
            dict(name="sp_bpe_1024", model_path="tokenizers/fineweb_1024_bpe.model"),
            dict(name="caseops", model_path="tokenizers/caseops.model"),
            dict(name="evil", model_path="../../outside.model"),
        ],
    )
    return files | {"datasets/manifest.json": json.dumps(manifest).encode()}


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one dataset repository. `faults[what]` is a list of what goes wrong with the next
    requests for it: an HTTP status, "cut" (the connection ends half-way), "corrupt" (a byte is
    wrong), "slow"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults = repository(), collections.defaultdict(list)
        self.ranges, self.served, self.lock = [], collections.Counter(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that left is no news."""

    def fault(self, what: str):
        """The next fault planned for it, if any."""
        with self.lock:
            return self.faults[what].pop(0) if self.faults[what] else None


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers of the hub: repository, file information, resolution with redirect, content with
    ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Silence."""

    def reply(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if path.startswith("/api/datasets/some/repo"):
            if status := self.server.fault("info"):
                return self.reply(status, b"{}")
            return self.reply(
                200, json.dumps(dict(id="some/repo", sha=COMMIT, siblings=[])).encode()
            )
        if path.startswith(f"/datasets/some/repo/resolve/{COMMIT}/"):
            name = path.split("/", 6)[-1]
            return self.reply(302, Location=f"/cdn/{name}", X_Repo_Commit=COMMIT)
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn/"))
        self.reply(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        infos = []
        for path in urllib.parse.parse_qs(form).get("paths", []):
            if raw := self.server.files.get(path):
                oid = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
                lfs = dict(oid=hashlib.sha256(raw).hexdigest(), size=len(raw), pointerSize=130)
                infos.append(
                    dict(type="file", path=path, size=len(raw), oid=oid)
                    | ({} if path.endswith(".json") else dict(lfs=lfs))
                )
        self.reply(200, json.dumps(infos).encode())

    def content(self, name: str):
        """A file from where the client asks, or what is planned to go wrong."""
        raw, fault = self.server.files[name], self.server.fault(name)
        if isinstance(fault, int):
            return self.reply(fault, b"{}", Retry_After=0)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        body = raw[start:]
        with self.server.lock:
            self.server.ranges.append((name, start))
            self.server.served[name] += len(body)
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if fault == "slow":
            for low in range(0, len(body), 4096):
                self.wfile.write(body[low : low + 4096])
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh hub, an empty data folder, and short pauses."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/repo")
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "WAIT", 0.01)
    monkeypatch.setattr(
        tool.constants, "DOWNLOAD_CHUNK_SIZE", 4096
    )  # what arrives is written in these pieces
    monkeypatch.setattr(time, "sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.05)))
    monkeypatch.setattr(tool, "LONGEST_WAIT", 0.05)
    yield server
    server.shutdown()


def complete(hub: Hub, root: Path, name: str = NAME) -> bool:
    """Every downloaded file is the repository's, byte by byte, and nothing else is there."""
    wanted = {n.removeprefix("datasets/"): raw for n, raw in hub.files.items() if name in n}
    have = {str(p.relative_to(root)): p.read_bytes() for p in root.glob(f"datasets/{name}/*.bin")}
    return have == wanted and not list(root.rglob("*.part"))


TRAIN1 = f"datasets/datasets/{NAME}/fineweb_train_000001.bin"


def test_a_download_has_the_competitions_layout_and_a_repetition_fetches_nothing(
    hub, tmp_path, capsys
):
    assert tool.main(["--train-shards", "3"]) == 0
    assert (
        complete(hub, tmp_path) and (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").is_file()
    )
    manifest = json.loads((tmp_path / "datasets" / NAME / "manifest.json").read_text())
    assert (
        manifest["commit"] == COMMIT
        and manifest["comparable"] is False
        and "59,999" in manifest["note"]
    )
    assert {n: e["sha256"] for n, e in manifest["files"].items()} == {
        Path(n).name: hashlib.sha256(raw).hexdigest() for n, raw in hub.files.items() if NAME in n
    }
    served, before = (
        dict(hub.served),
        {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()},
    )
    assert tool.main(["3"]) == 0 and dict(hub.served) == served
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "fetched" not in capsys.readouterr().out.rsplit("ready", 1)[1]


def test_more_shards_are_added_to_fewer(hub, tmp_path):
    assert tool.main(["--train-shards", "1"]) == 0
    first = dict(hub.served)
    assert tool.main(["--train-shards", "3", "--skip-manifest"]) == 0 and complete(hub, tmp_path)
    assert all(hub.served[name] == size for name, size in first.items())


def test_caseops_comes_with_its_sidecar(hub, tmp_path):
    assert tool.main(["--variant", CASEOPS, "--train-shards", "1"]) == 0
    assert complete(hub, tmp_path, f"fineweb10B_{CASEOPS}")
    assert (
        tmp_path / "datasets" / f"fineweb10B_{CASEOPS}" / "fineweb_val_bytes_000000.bin"
    ).is_file()


def test_a_downloaded_dataset_can_be_verified(hub, tmp_path):
    assert tool.main(["--train-shards", "1"]) == 0
    found = verify.verify(
        tmp_path / "datasets" / NAME, tmp_path / "tokenizers" / "fineweb_1024_bpe.model"
    )
    assert {f["check"] for f in found["findings"]} <= {"split", "validation"}, (
        "noise is no text, but intact"
    )


@pytest.mark.parametrize(
    "faults",
    [["cut"], ["cut", "cut", 500], [429, 503], ["corrupt"], [500, "corrupt", "cut"]],
    ids=lambda faults: " ".join(map(str, faults)),
)
def test_a_bad_network_delays_but_does_not_damage(hub, tmp_path, faults):
    hub.faults[TRAIN1] = list(faults)
    assert (
        tool.main(["--train-shards", "3"]) == 0
        and complete(hub, tmp_path)
        and not hub.faults[TRAIN1]
    )
    starts = [start for name, start in hub.ranges if name == TRAIN1]
    if "cut" in faults:
        assert max(starts) > 0, "it goes on where it was cut"


def test_a_hub_that_is_busy_at_first_is_asked_again(hub, tmp_path):
    hub.faults["info"] = [500, 429]
    assert tool.main(["--train-shards", "0"]) == 0


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign"])
def test_a_damaged_file_of_an_earlier_download_is_replaced(hub, tmp_path, damage):
    """Finding 5: one of the right size was kept when the manifest knew its sha256."""
    assert tool.main(["--train-shards", "3"]) == 0
    path = tmp_path / TRAIN1.removeprefix("datasets/")
    raw = path.read_bytes()
    path.write_bytes(
        {"truncated": raw[:-10], "changed": raw[:-1] + b"\xff", "foreign": b"<html>"}[damage]
    )
    if damage == "foreign":
        (path.parent / "manifest.json").unlink()  # as if another program had downloaded it
    assert tool.main(["--train-shards", "3"]) == 0 and complete(hub, tmp_path)


def failing(*arguments, capsys) -> str:
    """The one error line of a download that is not possible."""
    assert tool.main(list(arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


def test_what_is_not_possible_is_said_in_one_line(hub, tmp_path, monkeypatch, capsys):
    assert "has 3 in some/repo" in failing("--train-shards", "4", capsys=capsys)
    assert "no dataset 'fineweb10B_sp4096'" in failing("--variant", "sp4096", capsys=capsys)
    assert "'../../outside.model', which is outside" in failing(
        "--variant", "sp2048", "0", capsys=capsys
    )
    assert "--variant ../x: want" in failing("--variant", "../x", capsys=capsys)
    assert "byte260: its byte ids have no" in failing("--variant", "byte260", capsys=capsys)
    assert "sp512 has no SentencePiece model" in failing("--variant", "sp512", "0", capsys=capsys)
    hub.files.pop(TRAIN1)
    assert "has no datasets/datasets" in failing("--train-shards", "3", capsys=capsys)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no/repo")
    assert "MATCHED_FINEWEB_REPO_ID=no/repo: no such" in failing(capsys=capsys)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no such name")
    assert "MATCHED_FINEWEB_REPO_ID=no such name" in failing(capsys=capsys)


def test_a_file_that_stays_damaged_is_not_kept(hub, tmp_path, capsys):
    hub.faults[TRAIN1] = ["corrupt"] * 99
    assert "damaged: its sha256 is not" in failing("--train-shards", "3", capsys=capsys)
    assert not (tmp_path / TRAIN1.removeprefix("datasets/")).exists()
    assert len(list(tmp_path.glob("datasets/*/*.bin"))) == 3, "the others are"


def test_a_file_that_is_gone_is_named_without_trying_again(hub, capsys):
    hub.faults[TRAIN1] = [404] * 99
    assert "fineweb_train_000001.bin: HTTP 404" in failing("--train-shards", "3", capsys=capsys)
    assert len(hub.faults[TRAIN1]) == 98


def test_a_full_disk_is_noticed_before_the_start(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "SPARE", 1 << 60)
    assert "to be downloaded, the disk" in failing("--train-shards", "3", capsys=capsys)
    assert not hub.served and not list(tmp_path.rglob("*.bin"))


def test_a_hub_that_is_switched_off_is_said_at_once(hub, monkeypatch, capsys):
    """Finding 5: HF_HUB_OFFLINE=1 was tried for a minute."""
    monkeypatch.setattr(tool.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tool.STOP, "wait", lambda seconds: 1 / 0)
    assert "HF_HUB_OFFLINE=1: the hub is switched off" in failing(capsys=capsys)


def test_an_interruption_drops_what_waits_and_ends_what_runs(hub, tmp_path, monkeypatch):
    """Finding 5: 24 queued files of 0.5 s each were waited for (3.0 s)."""
    begun, pauses = [], threading.Event()

    def slow(hub, remote, bar):
        begun.append(remote)
        if len(begun) == 2:
            signal.raise_signal(signal.SIGINT)  # reaches the main thread
        tool.STOP.wait(5)  # a busy machine may be late with the signal
        pauses.wait(0.2)
        return "kept"

    monkeypatch.setattr(tool, "fetch", slow)
    monkeypatch.setattr(tool, "STOP", threading.Event())
    remotes = [tool.Remote(f"datasets/{i}", 0, "", "") for i in range(24)]
    with pytest.raises(KeyboardInterrupt):
        tool.get_all(tool.Hub(None, "", "datasets", ""), remotes)
    assert len(begun) <= 2 * tool.PARALLEL and tool.STOP.is_set()


def test_a_transfer_ends_when_the_user_interrupts(hub, tmp_path, monkeypatch):
    """The same, of a file on its way: it ends with the next bytes and is not tried again."""
    monkeypatch.setattr(tool, "STOP", threading.Event())
    tool.STOP.set()
    hub.faults[TRAIN1] = ["slow"]
    bar = tool.tqdm.tqdm(disable=True)
    real = tool.connect()
    (remote,) = real.find([TRAIN1.removeprefix("datasets/")])
    with pytest.raises(tool.Stopped):
        tool.fetch(real, remote, bar)
    assert len(hub.ranges) == 1


def test_no_network_is_said_in_one_line(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "is there a network?" in failing(capsys=capsys)


@pytest.mark.slow
def test_a_killed_download_goes_on_within_the_file(hub, tmp_path):
    hub.faults[TRAIN1] = ["slow"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'data')!r}); "
        "import cached_challenge_fineweb as t, pathlib; "
        f"t.constants.DOWNLOAD_CHUNK_SIZE = 4096; t.ROOT = pathlib.Path({str(tmp_path)!r}); "
        "sys.exit(t.main(['--train-shards', '3']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=clean_env(), stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    part = []
    while not (
        part
        and part[0].stat().st_size > 20_000
        and len(list(tmp_path.glob("datasets/*/*.bin"))) == 3
    ):
        assert time.monotonic() < end and process.poll() is None
        part = list(tmp_path.glob("datasets/*/.*.part"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    served = dict(hub.served)
    assert not (tmp_path / TRAIN1.removeprefix("datasets/")).exists()
    assert tool.main(["--train-shards", "3"]) == 0 and complete(hub, tmp_path)
    assert hub.ranges[-1][0] == TRAIN1 and hub.ranges[-1][1] > 0, "it goes on where it was killed"
    assert {n for n in hub.served if hub.served[n] != served[n]} == {TRAIN1}

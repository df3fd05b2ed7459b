"""The forge's truth: nothing acknowledged is lost, nothing is run twice, whatever is killed and
whenever."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import forge_lab
import pytest
from conftest import ROOT
from forge import ForgeError
from forge.campaign import Campaign
from forge.ledger import Ledger, canonical, digest, seal, unseal
from forge.state import replay
from hypothesis import given, settings
from hypothesis import strategies as st

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(max_size=6).filter(lambda k: k != "sum"), PLAIN, min_size=1, max_size=4)
)
@settings(max_examples=40, deadline=None)
def test_a_line_gives_back_its_event_and_any_changed_character_is_noticed(event):
    line = seal(event)
    assert unseal(line[:-1]) == json.loads(canonical(event)) and line.count("\n") == 1
    i = len(line) // 2
    broken = line[:i] + ("x" if line[i] != "x" else "y") + line[i + 1 : -1]
    with pytest.raises((ValueError, KeyError)):
        if unseal(broken) is not None:
            raise AssertionError("accepted")


def test_a_cut_at_every_byte_of_the_last_record_costs_that_record_only(tmp_path):
    """Acceptance 8 for events.jsonl."""
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path, durable=False)
    for i in range(4):
        ledger.append("note", text=f"number {i} ünïcode")
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert [e["n"] for e in Ledger(path).read()] == [1, 2, 3]
        assert Ledger(path, durable=False).append("note", text="next")["n"] == 4
        assert [e.get("text") for e in Ledger(path).read()][-1] == "next"


def test_damage_before_the_end_is_named_and_not_repaired(tmp_path):
    path = tmp_path / "events.jsonl"
    for i in range(4):
        Ledger(path, durable=False).append("note", text=str(i))
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"1"', b'"7"')
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ForgeError, match="line 2 of 4 is damaged"):
        Ledger(path).read()
    del lines[1]  # a missing line is damage too
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ForgeError, match="line 2 of 3 is damaged"):
        Ledger(path).read()


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    threads = [
        threading.Thread(
            target=lambda k=k: [
                Ledger(path, durable=False).append("note", k=k, i=i) for i in range(25)
            ]
        )
        for k in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    events = Ledger(path).read()
    assert [e["n"] for e in events] == list(range(1, 101))
    assert {(e["k"], e["i"]) for e in events} == {(k, i) for k in range(4) for i in range(25)}


def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path):
    """Acceptance 17: the file size limit of a process stands in for a full disk."""
    path = tmp_path / "events.jsonl"
    Ledger(path).append("note", text="first")
    size = path.stat().st_size
    code = (
        f"import resource, signal, sys; sys.path.insert(0, {str(ROOT / 'records')!r})\n"
        "from pathlib import Path; from forge.ledger import Ledger; from forge import ForgeError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 20}, {size + 20}))\n"
        f"try: Ledger(Path({str(path)!r})).append('note', text='second' * 50)\n"
        "except ForgeError as e: print(e); sys.exit(2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write events.jsonl" in done.stdout, done.stderr
    assert [e["text"] for e in Ledger(path).read()] == ["first"] and path.stat().st_size == size


def test_state_is_a_pure_replay(tmp_path):
    c = forge_lab.instant(tmp_path, budget=dict(experiments=12))
    forge_lab.finish(c)
    events = json.loads(json.dumps(c.ledger.read()))
    assert replay(events).digest() == c.state.digest()
    assert replay(events[:-1]).digest() != c.state.digest()
    keys = [e["key"] for e in events if e["event"] == "finished"]
    assert len(keys) == len(set(keys)) == len([e for e in events if e["event"] == "wanted"])


def test_an_interrupted_decision_is_taken_again_the_same_way(tmp_path):
    """A campaign that is cut off after any event and goes on ends exactly like one that never
    was."""
    straight = forge_lab.instant(tmp_path, budget=dict(experiments=8))
    forge_lab.finish(straight)
    events = straight.ledger.read()
    rng = random.Random(0)
    for cut in sorted(rng.sample(range(2, len(events)), 8)):
        again = forge_lab.instant(tmp_path, budget=dict(experiments=8))
        again.ledger.events[:] = json.loads(json.dumps(events[:cut]))
        resumed = Campaign(tmp_path, again.runs, again.ledger, forge_lab.plan)
        resumed._space = again._space
        for run in resumed.running():  # what ran when the power went
            resumed.runs.start(resumed.order(run.key))
        forge_lab.finish(resumed)
        assert resumed.state.digest() == straight.state.digest(), f"cut after event {cut}"


@pytest.mark.slow
def test_kill_9_of_anything_at_any_time_loses_and_repeats_nothing(tmp_path, seed=2):
    """Acceptance 7, twelve kills: decider, supervisor, trainer, or all of them at once."""
    c = forge_lab.real(
        tmp_path, dict(pause=0.03), budget=dict(experiments=8), loop=dict(workers=2, ablation=False)
    )
    folder, rng, kills = c.folder, random.Random(seed), 0
    command = [*forge_lab.FORGE, "run", str(folder)]
    end = time.monotonic() + 200
    while time.monotonic() < end:
        decider = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            decider.wait(rng.uniform(0.4, 1.5) if kills < 12 else 100)
            assert decider.returncode == 0, decider.stderr.read().decode()
            break
        except subprocess.TimeoutExpired:
            kills += 1
            what = rng.choice(["decider", "all", "trainer", "supervisor"])
            for path in folder.glob("runs/*/process.json"):
                try:
                    trainer = json.loads(path.read_text("utf-8"))
                except (OSError, json.JSONDecodeError):
                    continue
                if (
                    what in ("trainer", "all") and trainer["attempt"] < 3
                ):  # a third loss would end the run for good
                    kill_group(trainer["pid"])
            if what in ("supervisor", "all"):
                for pid in supervisors_of(folder):
                    if len(list((folder / "runs" / run_of(pid)).glob("a*.out"))) < 3:
                        kill(pid)
            kill(decider.pid)
            decider.wait()
    state = replay(Ledger(folder / "events.jsonl").read())
    assert kills == 12 and state.stopped.startswith("experiments") and len(state.searches()) == 8
    events = Ledger(folder / "events.jsonl").read()
    finished = [e["key"] for e in events if e["event"] == "finished"]
    assert len(finished) == len(set(finished)) == len(state.runs), "every run counted exactly once"
    for key, run in state.runs.items():
        record = json.loads((folder / "runs" / key / "metrics.json").read_text("utf-8"))
        assert record["status"] == run.record["status"] and record["attempt"] <= 3
        logs = [
            p
            for p in (folder / "runs" / key).glob("a*.out")
            if "final:official" in p.read_text("utf-8")
        ]
        assert len(logs) <= 1, "a completed run was repeated"
    verified = forge_lab.forge("verify", folder)
    assert verified.returncode == 0 and state.digest() in verified.stdout, verified.stderr
    assert state.digest() in forge_lab.forge("rebuild", folder).stdout, (
        "rebuilt from the events: the same state"
    )
    assert not supervisors_of(folder)


def run_of(pid: int) -> str:
    """Name of the run folder that a supervisor has; any folder's name when it is gone."""
    try:
        return open(f"/proc/{pid}/cmdline", "rb").read().decode().split("\0")[-2].rpartition("/")[2]
    except (OSError, IndexError):
        return "gone"


def kill(pid: int):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_group(group: int):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def supervisors_of(folder) -> list[int]:
    """Processes whose command line supervises a run of this campaign."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = open(f"/proc/{entry}/cmdline", "rb").read().decode().split("\0")
            except OSError:
                continue
            if "supervise" in line and str(folder) in line[-2]:
                found.append(int(entry))
    return found


def test_a_finished_log_without_a_result_is_taken_in_and_not_run_again(tmp_path):
    """Acceptance 7: what was completed but not reported."""
    c = forge_lab.real(tmp_path, budget=dict(experiments=1))
    c.locked_tick()
    run = c.running()[0]
    folder = c.folder / "runs" / run.key
    while not (folder / "metrics.json").exists():
        time.sleep(0.02)
    c.runs.children[run.key].wait()
    before = (folder / "a1.out").read_bytes()
    first = json.loads((folder / "metrics.json").read_text("utf-8"))
    (folder / "metrics.json").unlink()
    done = forge_lab.forge("supervise", folder)
    assert done.returncode == 0, done.stderr
    second = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert not (folder / "a2.out").exists() and (folder / "a1.out").read_bytes() == before
    assert second["metrics"]["val_bpb"] == first["metrics"]["val_bpb"] and second["status"] == "ok"


def test_a_key_names_environment_code_rung_and_seed(tmp_path):
    c = forge_lab.instant(tmp_path)
    c.record("proposed", id="e1", kind="search", change={}, rung="screen")
    x = c.state.experiments["e1"]
    for change, seed in (({}, 1), ({}, 2), ({"NUM_LAYERS": 10}, 1)):
        c.want(x, change, "screen", seed)
        c.want(x, change, "screen", seed)
    assert len(c.state.runs) == 3
    assert digest({"b": 1, "a": [1.5, None]}) == digest(json.loads('{"a": [1.5, null], "b": 1}'))

"""Which devices and processes a run has: never two runs on one device, never a device idle while a
run waits, nothing that belongs to others is touched (findings F1, F3, F5)."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forge_lab
import pytest
from forge import ForgeError, campaign, devices, processes, run_record, runner, sandbox, verbs_run
from forge.ledger import Ledger
from forge.state import replay

import train_gpt

NAMES = [f"GPU-{os.getpid()}-{i}" for i in range(8)]  # nobody else on this machine has these


@pytest.fixture
def eight(monkeypatch):
    """An outer CUDA_VISIBLE_DEVICES that names eight devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(NAMES))
    return NAMES


class Paper(forge_lab.InstantRuns):
    """Runs on paper that end when the test says so; the decider gives them their devices."""

    owns_devices = True

    def __init__(self):
        super().__init__(lambda order: 1.2, 0.001)
        self.over = set()

    def poll(self, key):
        return super().poll(key) if key in self.over else ("running", None)


def on_paper(tmp_path, workers: int, **rungs):
    """A campaign on paper with some rungs, {name: processes of a run}."""
    table = {n: dict(kill_s=20, env={}, nproc=k) for n, k in (dict(screen=1) | rungs).items()}
    c = forge_lab.instant(tmp_path, rungs=table, loop=dict(workers=workers))
    c.runs = Paper()
    return c


def ask(c, number: int, rung: str = "screen"):
    """Want one more run on a rung."""
    change = dict(INERT_A=round(0.0001 * (number + 1), 6))
    x = c.state.experiments[c.open("search", change, rung, skill="inert", seeds=[1])]
    c.want(x, change, rung, 1)


def check_slots(c):
    """Nobody shares a slot; the first that waits could not have started."""
    taken = [s for r in c.running() for s in r.slots]
    assert len(taken) == len(set(taken)), [(r.rung, r.slots) for r in c.running()]
    waiting = [r for r in c.state.runs.values() if not r.started]
    if waiting and len(c.running()) < c.config["loop"]["workers"]:
        assert c.slots_needed(waiting[0].rung) > len(c.slots()) - len(taken)
    return taken


@pytest.mark.parametrize("rungs", [{}, dict(pair=2), dict(pair=2, triple=3, target=8)])
def test_slots_are_owned_one_by_one(tmp_path, eight, rungs):
    """Finding F1: with every size of run and any order of ends, over restarts of the decider."""
    c = on_paper(tmp_path, 8, **rungs)
    rng = random.Random(len(rungs))
    kinds = ["screen", *rungs]
    for i in range(60):
        ask(c, i, rng.choice(kinds))
    most = 0
    while any(not r.finished for r in c.state.runs.values()):
        c.launch()
        taken = check_slots(c)
        most = max(most, len(taken))
        for run in c.running():
            assert len(run.slots) == c.config["rungs"][run.rung]["nproc"]
            order = c.runs.orders[run.key]
            assert order["devices"] == run.slots and set(run.slots) <= set(eight)
        if rng.random() < 0.2:  # the decider dies; another one reads the ledger
            again = campaign.Campaign(tmp_path, c.runs, c.ledger, forge_lab.plan)
            again._space = c.space
            assert [r.slots for r in again.running()] == [r.slots for r in c.running()]
            c = again
        for run in rng.sample(c.running(), rng.randint(1, len(c.running()))):
            c.runs.over.add(run.key)
        c.ingest()
    assert most == 8, "all devices were in use"
    assert replay(c.ledger.read()).digest() == c.state.digest()


def test_the_lowest_free_slot_is_taken_and_kept(tmp_path, eight):
    """Finding F1, as it was seen: A ends, I starts; I has A's device and nobody moves."""
    c = on_paper(tmp_path, 8)
    for i in range(9):
        ask(c, i)
    c.launch()
    runs = list(c.state.runs.values())
    assert [r.slots for r in runs[:8]] == [[n] for n in eight] and not runs[8].started
    c.runs.over.add(runs[0].key)
    c.ingest()
    c.launch()
    assert [r.slots for r in runs[1:]] == [[n] for n in [*eight[1:], eight[0]]]
    assert c.runs.orders[runs[8].key]["devices"] == [eight[0]]


def test_a_run_on_the_target_rung_is_alone(tmp_path, eight):
    """Finding F1: it waits for all devices, nobody overtakes it, and it has them all to itself."""
    c = on_paper(tmp_path, 8, target=4)
    for i, rung in enumerate(["screen", "target", "screen"]):
        ask(c, i, rung)
    runs = list(c.state.runs.values())
    c.launch()
    assert [r.started for r in runs] == [True, False, False]
    c.runs.over.add(runs[0].key)
    c.ingest()
    c.launch()
    assert [r.started for r in runs] == [True, True, False] and runs[1].slots == eight


def test_too_few_devices_stop_the_campaign_with_the_reason(tmp_path, monkeypatch):
    """Finding F1: a run on eight devices does not start on two."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    c = on_paper(tmp_path, 2, target=8)
    ask(c, 0, "target")
    c.launch()
    assert c.state.stopped == "a run on target needs 8 devices, 2 are visible here"


def test_a_run_whose_device_is_gone_gets_another(tmp_path, monkeypatch):
    """Finding F1: the decider comes back and sees other devices; what nobody works on moves, what
    still runs stays."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    c = on_paper(tmp_path, 2)
    ask(c, 0)
    ask(c, 1)
    c.launch()
    lost, alive = c.running()
    assert (lost.slots, alive.slots) == (["3"], ["5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    c.runs.poll = lambda key: ("lost" if key == lost.key else "running", None)
    c.ingest()
    assert (lost.slots, alive.slots) == (["7"], ["5"])
    assert c.runs.orders[lost.key]["devices"] == ["7"]


@pytest.mark.parametrize(
    "outer, found",
    [("2,GPU-a, 5", ["2", "GPU-a", "5"]), ("", []), ("-1", []), ("0,-1,1", ["0"]), ("1,1", ["1"])],
)
def test_an_outer_choice_of_devices_is_respected(monkeypatch, outer, found):
    """Finding F1: as CUDA reads it: up to the first name that is none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    assert devices.visible() == found


def test_workers_on_a_cpu_are_slots_by_number(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    c = on_paper(tmp_path, 3)
    for i in range(4):
        ask(c, i)
    c.launch()
    assert [r.slots for r in c.running()] == [["0"], ["1"], ["2"]]
    assert c.runs.orders[c.running()[0].key]["devices"] == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    c.state.config["base"] = dict(DEVICE="cpu")
    assert c.slots() == ["0", "1", "2"], "a base on the CPU leaves GPUs alone"


# ---- Real processes ------------------------------------------------------------------------------
def test_eight_slots_with_real_processes_random_ends_and_kills(tmp_path, eight):
    """Finding F1: the runs themselves note whom they meet on their devices, while supervisors, runs
    and the decider are killed: never two on a slot, never a slot idle while a run waits."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    tricks = dict(meeting=str(meeting), pause=[0.005, 0.06])
    c = forge_lab.real(tmp_path, tricks, loop=dict(workers=8))
    rng = random.Random(3)
    for i in range(22):
        ask(c, i)
    kills = 0
    deadline = time.monotonic() + 240  # a watchdog
    while any(not r.finished for r in c.state.runs.values()) and time.monotonic() < deadline:
        c.launch()
        check_slots(c)
        if kills < 6 and len(c.running()) == 8 and rng.random() < 0.3:
            victim = rng.choice(c.running())
            target = c.runs.supervisor(victim.key)
            if kills % 2:
                target = runner.read_json(c.folder / "runs" / victim.key / "process.json").get(
                    "pid"
                )
            if target and processes.identity(target):
                os.kill(target, signal.SIGKILL)
                kills += 1
            if kills == 3:  # and the decider
                c = campaign.Campaign(c.folder)
        time.sleep(0.05)
        c.ingest()
    assert {r.record["status"] for r in c.state.runs.values()} == {"ok"} and kills == 6
    met = [json.loads(line) for p in meeting.glob("*.jsonl") for line in p.open(encoding="utf-8")]
    assert not [m for m in met if m["others"]], "two runs on one device"
    assert {m["device"] for m in met} == set(eight), "every device was used"
    events = Ledger(c.folder / "events.jsonl").read()
    assert all(e["slots"] for e in events if e["event"] == "started")


def test_a_device_is_held_until_the_last_process_of_its_run_ends(tmp_path):
    """Finding F1 beside other campaigns and workers: a killed worker's run goes on holding it."""
    names = [f"{NAMES[0]}-held-{i}" for i in range(3)]
    with devices.held(names, 2) as (found, handles):
        assert found == names[:2] and devices.held_elsewhere(names) == names[:2]
        child = subprocess.Popen(["sleep", "60"], pass_fds=handles)
        with devices.held(names, 1) as (third, _):
            assert third == names[2:]
        with pytest.raises(ForgeError, match="2 of the devices .* are not free"):
            with devices.held(names, 2, wait=0.0):
                pass
    assert devices.held_elsewhere(names) == names[:2], "the child has them"
    child.kill()
    child.wait()
    assert devices.held_elsewhere(names) == []
    with pytest.raises(ForgeError, match="needs 4 devices, 3 are visible"):
        with devices.held(names, 4):
            pass


def test_workers_elsewhere_choose_among_their_own_devices(tmp_path, monkeypatch):
    """Finding F1's brother: what a head calls device 0 is not the worker's; two workers of one
    machine never meet."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(NAMES[:2]))
    seen: list[list[str]] = []
    inside = threading.Barrier(2)

    def one():
        with runner.on_devices(dict(nproc=1, devices=None, wants_gpu=True)) as (names, _):
            seen.append(names)
            inside.wait(20)

    crew = [threading.Thread(target=one) for _ in range(2)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(20)
    assert sorted(seen) == [[NAMES[0]], [NAMES[1]]]
    with runner.on_devices(dict(nproc=1, devices=None, wants_gpu=False)) as (names, _):
        assert names == []
    with runner.on_devices(dict(nproc=1, devices=None, exclusive=True)) as (names, _):
        assert names == NAMES[:2]


# ---- What a killed decider leaves ----------------------------------------------------------------
def test_a_reused_process_number_is_nobodys_orphan(tmp_path):
    """Finding F5: process.json names a number that belongs to another process by now: it lives on;
    the run's own process, known by start time or by its mark, does not."""
    folder = tmp_path / "run"
    folder.mkdir()
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    boot, begun = processes.identity(stranger.pid)
    table = dict(pid=stranger.pid, identity=[boot, begun - 1000], mark="k-none")
    (folder / "process.json").write_text(json.dumps(table), "utf-8")
    runner.clear_orphans(folder)
    assert stranger.poll() is None
    env = dict(os.environ) | {processes.MARK: "k-1"}
    left = subprocess.Popen(["sleep", "60"], start_new_session=True, env=env)
    while not processes.marked("k-1"):  # a fresh process shows its environment a moment later
        time.sleep(0.01)
    (folder / "process.json").write_text(json.dumps(table | dict(mark="k-1")), "utf-8")
    runner.clear_orphans(folder)
    assert left.wait(5) == -signal.SIGTERM and stranger.poll() is None
    # Its supervisor died after starting it and before saying which process it is.
    left = subprocess.Popen(["sleep", "60"], start_new_session=True, env=env)
    while not processes.marked("k-1"):
        time.sleep(0.01)
    (folder / "process.json").unlink()
    (folder / "mark.json").write_text('{"mark": "k-1"}', "utf-8")
    runner.clear_orphans(folder)
    assert left.wait(5) == -signal.SIGTERM and stranger.poll() is None
    table["identity"] = [boot, begun]
    (folder / "process.json").write_text(json.dumps(table), "utf-8")
    runner.clear_orphans(folder)
    assert stranger.wait(5) == -signal.SIGTERM
    for broken in ("", "[1]", '{"pid": 1}', "{"):
        (folder / "process.json").write_text(broken, "utf-8")
        runner.clear_orphans(folder)


def test_an_interrupt_after_a_kill_ends_the_older_supervisors(tmp_path):
    """Finding F5: the first decider is killed with -9 while runs go on; the second is interrupted
    and leaves nothing running."""
    c = forge_lab.real(tmp_path, dict(always="silent"), rungs=dict(screen=dict(kill_s=60, env={})))
    command = [*forge_lab.FORGE, "run", str(c.folder)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def alive() -> list[int]:
        known = [runner.read_json(p) for p in c.folder.glob("runs/*/*.json")]
        return [
            t["pid"] for t in known if "pid" in t and processes.is_same(t["pid"], t["identity"])
        ]

    def until(condition):
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        assert condition()

    first = subprocess.Popen(command, **quiet)
    until(lambda: len(alive()) == 2)  # a supervisor and its run
    first.kill()
    first.wait()
    second = subprocess.Popen(command, **quiet)
    lock = c.folder / "tick.lock"
    until(lambda: (c.folder / "heartbeat.json").exists() or lock.exists() and second.poll() is None)
    time.sleep(2.0)  # it has taken over
    assert len(alive()) == 2
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130
    assert not alive(), "older supervisors and their runs have ended"


# ---- Rungs that fit ------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_preset_passes_its_checks_on_every_rung(device):
    """Finding F3: small rungs score once, in chunks, whatever the preset does at the end."""
    wrong = []
    for preset in train_gpt.PRESETS:
        name = f"{preset}+cpu" if device == "cpu" and preset != "cpu" else preset
        for rung, table in verbs_run.LADDERS[device].items():
            if rung == "target" and preset == "prequant_ttt":
                continue  # the preset itself asks for ALLOW_NONCOMPLIANT or another text
            try:
                v = train_gpt.load(dict(PRESET=name) | table["env"]).values()
            except train_gpt.UserError as error:
                wrong.append(f"{name} on {rung}: {error}")
                continue
            small = rung != "target"
            if small and (v["eval"], v["ttt"]) != ("chunked", "none"):
                wrong.append(f"{name} on {rung}: scores by {v['eval']} and {v['ttt']}")
    assert not wrong, "\n".join(wrong)


def test_rungs_on_a_gpu_fit_their_limits_and_can_be_forecast():
    """Finding F3: training, and then compiling, exporting and scoring at the rates of one H100 or
    of a card a tenth as fast, end before the limit; a line is printed often enough for a forecast,
    with steps of 0.05 to 2 seconds."""
    tokens = 62_021_632  # of the validation text
    for rung, table in verbs_run.LADDERS["cuda"].items():
        seconds = float(table["env"]["MAX_WALLCLOCK_SECONDS"]) or 60.0
        around = 180.0 if rung != "target" else 1200.0  # compiling, calibration, export
        scoring = tokens / 150_000 if rung != "target" else 600.0
        assert seconds + around + scoring < table["kill_s"], rung
        assert table["stall_s"] > scoring
    for rung in ("screen", "local"):
        env = verbs_run.LADDERS["cuda"][rung]["env"]
        seconds, every = float(env["MAX_WALLCLOCK_SECONDS"]), int(env["TRAIN_LOG_EVERY"])
        for step in (0.05, 0.5, 2.0):
            steps = range(every, int(0.55 * seconds / step) + 1, every)
            lines = [
                f"step:{i}/20000 train_loss:4.0 train_time:{i * step * 1e3:.0f}ms" for i in steps
            ]
            assert run_record.partway("\n".join(lines), seconds) == 4.0, (rung, step)


def test_a_cage_keeps_what_the_script_needs(tmp_path):
    """Finding F2: data that is linked from elsewhere stays readable, its neighbours do not."""
    if not (sandbox.works("bwrap") or sandbox.works("unshare")):
        pytest.skip("neither bwrap nor unshare works here")
    script, data = tmp_path / "code" / "train_gpt.py", tmp_path / "far" / "shards"
    script.parent.mkdir()
    data.mkdir(parents=True)
    (data / "x.bin").write_text("tokens", "utf-8")
    (data.parent / "diary.txt").write_text("private", "utf-8")
    (script.parent / "data").symlink_to(data)
    script.write_text(
        "from pathlib import Path\nhere = Path(__file__).parent\n"
        "print((here / 'data' / 'x.bin').read_text(), (here / 'data').resolve().parent.exists(), "
        f"Path({str(data.parent / 'diary.txt')!r}).exists())\n",
        "utf-8",
    )
    cage = sandbox.cage(tmp_path / "w" / "é ü", script)
    done = subprocess.run(
        [*cage, sys.executable, str(script)], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.stdout.split() == ["tokens", "True", "False"], done.stderr
    assert Path(tmp_path / "w" / "é ü").is_dir()

"""A cage for code that a patch wrote: no network, no other processes, one folder to write to, and
of the home folder and the temporary folders only what the script itself needs to run.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from . import ForgeError

# Where people keep what a stranger's code must not read; sockets of agents lie in the last.
PRIVATE = ("~", "/root", "/home", "/tmp", "/var/tmp", "/run/user")
UNSHARE = ["unshare", "--map-root-user", "--net", "--mount", "--ipc", "--pid", "--fork"]
UNSHARE += ["--mount-proc", "--kill-child"]
# torchrun speaks to its own workers through the loopback device, which a new network has switched
# off: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
LOOPBACK = (
    "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, "
    "struct.pack('16sh22x', b'lo', 0x41))"
)


def outermost(paths: Sequence[Path]) -> list[Path]:
    """Existing folders among these, without those that lie inside another."""
    found = sorted({Path(p).expanduser().resolve() for p in paths if Path(p).expanduser().is_dir()})
    return [p for p in found if not any(q in p.parents for q in found)]


def hidden() -> list[Path]:
    """Folders that patched code must not see."""
    return outermost([Path(p) for p in PRIVATE])


def needed(script: Path, env: dict[str, str] | None = None) -> list[Path]:
    """Folders that a script reads: Python and its packages, its own, the data beside it (links are
    followed), and those that the knobs DATA_PATH and TOKENIZER_PATH name."""
    python = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    python += [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    found = [Path(p) for p in python] + [Path(sys.executable).resolve().parent, script.parent]
    data = script.parent / "data"
    found += [data, *data.glob("*"), *data.glob("*/*")]
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        value = (env or {}).get(name, "auto")
        if value != "auto":
            found += [Path(value), Path(value).resolve().parent]
    return outermost(found)


def bwrap(writable: Path, read: Sequence[Path]) -> list[str]:
    """The cage by bubblewrap."""
    command = ["bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
    for folder in hidden():
        command += ["--tmpfs", str(folder)]
    for folder in inside(read):
        command += ["--ro-bind", str(folder), str(folder)]
    command += ["--bind", str(writable), str(writable), "--chdir", str(writable)]
    return [*command, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent"]


def inside(folders: Sequence[Path]) -> list[Path]:
    """Those folders that lie in a hidden one and must be shown there again."""
    return [f for f in folders if any(h == f or h in f.parents for h in hidden())]


def unshare(writable: Path, read: Sequence[Path]) -> list[str]:
    """The same cage by namespaces of one's own: a new tree for every hidden folder is built beside
    the writable one, then put in place; the root turns read-only."""
    stage = writable / ".cage"
    q = shlex.quote
    lines = ["set -e", "mount --make-rprivate /"]
    lines += [f"mkdir -p {q(str(stage))}", f"mount -t tmpfs none {q(str(stage))}"]
    shown = {f: "mount -o remount,bind,ro" for f in inside(read)}
    shown |= {f: ":" for f in inside([writable])}
    for number, folder in enumerate(hidden()):
        tree = stage / str(number)
        lines.append(f"mkdir -p {q(str(tree))}")
        for path, protect in sorted(shown.items()):
            if path == folder or folder in path.parents:
                at = q(str(tree / path.relative_to(folder)))
                lines += [f"mkdir -p {at}", f"mount --bind {q(str(path))} {at}", f"{protect} {at}"]
        lines.append(f"mount --rbind {q(str(tree))} {q(str(folder))}")
    if writable not in shown:
        lines.append(f"mount --bind {q(str(writable))} {q(str(writable))}")
    lines.append("mount -o remount,bind,ro /")
    lines.append(f"{q(sys.executable)} -c {q(LOOPBACK)} 2>/dev/null || true")
    lines += [f"cd {q(str(writable))}", 'exec "$@"']
    return [*UNSHARE, "sh", "-c", "\n".join(lines), "cage"]


@functools.cache
def works(kind: str) -> bool:
    """Whether a cage of this kind can be made here: the command `true` runs in one."""
    if not shutil.which(kind):
        return False
    probe = Path(os.path.abspath("runs")) / ".cage-probe"
    probe.mkdir(parents=True, exist_ok=True)
    try:
        command = (bwrap if kind == "bwrap" else unshare)(probe, needed(probe / "none"))
        done = subprocess.run([*command, "true"], capture_output=True, timeout=20)
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def require(allow_none: bool = False):
    """Raise ForgeError when this machine can make no cage, unless the campaign allows that."""
    if not (allow_none or works("bwrap") or works("unshare")):
        raise ForgeError(
            "patches need a sandbox: install bwrap from the distribution, or set [agent] "
            "allow_unsandboxed = true"
        )


def cage(
    writable: Path, script: Path, env: dict[str, str] | None = None, allow_none: bool = False
) -> list[str]:
    """The command in front of one that runs patched code: only `writable` can be written to.
    Raises ForgeError when this machine can make no cage, unless the campaign allows that."""
    writable = Path(writable).resolve()
    writable.mkdir(parents=True, exist_ok=True)
    read = needed(Path(script).resolve(), env)
    if works("bwrap"):
        return bwrap(writable, read)
    if works("unshare"):
        return unshare(writable, read)
    require(allow_none)
    return []


def tier() -> str:
    """What protects this machine from patched code, in words."""
    kind = next((k for k in ("bwrap", "unshare") if works(k)), "")
    if not kind:
        return "0: knobs only; patches are refused"
    return f"1: {kind}: no network, no home folder, one writable folder"

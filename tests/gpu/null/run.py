#!/usr/bin/env python3
"""Run a program on the null GPU, a CUDA device that computes nothing (see README.md beside this):

python tests/gpu/null/run.py train_gpt.py            a script, with its arguments
python tests/gpu/null/run.py -m pytest tests/gpu/null   a module

Needs PyTorch's CUDA build, gcc and nm. NULL_GPU_GIB is the size of its memory, 79 by default;
NULL_GPU_CACHE the folder of what is compiled."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = Path(sysconfig.get_paths()["purelib"])
CALLERS = ("libtorch_cuda", "libtorch_cuda_linalg", "libtorch_python", "libc10_cuda")
# Functions of the CUDA libraries that are left to the real ones: they need no device.
REAL = re.compile(
    r"cuda(GetError|RuntimeGetVersion)|cu(dnn|blasLt)Get(Version|Property|Cudart|\w*Error)"
)
# Those that a program must not believe in: CUDA graphs, memory pools, memory of other processes.
REFUSED = re.compile(r"cuda(Graph|Ipc|MemPool|Library|MallocAsync|StreamBegin|StreamEnd)")
# Those of the libraries that compute; each call is one launch.
WORK = re.compile(
    r"cublas(?!Lt)[A-Z]\w*(gemm|gemv|trsm|dot|Dot|gels|geqrf|getr[fs])|cusolverDn\w+(?<!Size)$"
    r"|cudnn(BackendExecute|Convolution(For|Back)|RNN(For|Back)|CTCLoss|Pooling|BatchNorm)"
)
SETUP = re.compile(r"cusolverDn\w*(Create|Destroy|Set)")


def symbols(path: Path, kind: str) -> set[str]:
    """Names of functions that a library defines ("defined") or calls ("undefined")."""
    command = ["nm", f"--{kind}-only", *(["-D"] if path.suffix != ".o" else []), str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.strip()}


def stub(name: str) -> str:
    """C of a function that device.c does not care about."""
    if REFUSED.match(name):
        return f"int {name}(void) {{ return 801; }}\n"
    if WORK.match(name) and not SETUP.match(name):
        return f'int {name}(void) {{ null_gpu_note("{name}", 1, 0, 0); return 0; }}\n'
    return f"int {name}(void) {{ return 0; }}\n"


def build() -> Path:
    """The folder of the compiled null GPU, made when source or PyTorch are new."""
    source, torch_lib = HERE / "device.c", SITE / "torch" / "lib"
    libraries = [path for name in CALLERS if (path := torch_lib / f"{name}.so").exists()]
    if len(libraries) < len(CALLERS):
        raise SystemExit("error: the null GPU needs PyTorch's CUDA build (torch.version.cuda)")
    stamp = source.read_bytes() + Path(__file__).read_bytes()
    stamp += "".join(f"{path}{path.stat().st_size}" for path in libraries).encode()
    cache = Path(os.environ.get("NULL_GPU_CACHE", Path.home() / ".cache" / "null_gpu"))
    folder = cache / hashlib.sha256(stamp).hexdigest()[:16]
    if folder.exists():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True)
    headers = next(SITE.glob("nvidia/*/include/driver_types.h")).parent
    inner = SITE / "triton/backends/nvidia/include"  # has what those headers include in turn
    gcc = ["gcc", "-O1", "-w", "-fPIC", f"-I{headers}", f"-I{inner}"]
    # kept out of other libraries' way: what calls inside the file stays inside
    subprocess.run([*gcc, "-c", str(source), "-o", str(work / "device.o")], check=True)
    wanted = set().union(*(symbols(path, "undefined") for path in libraries))
    wanted = {
        name for name in wanted if re.match(r"(__cuda|cuda|cublas|cusolver|cudnn)[A-Z]", name)
    }
    rest = sorted(
        name for name in wanted - symbols(work / "device.o", "defined") if not REAL.match(name)
    )
    declared = "void null_gpu_note(const char *, long, double, double);\n"
    (work / "rest.c").write_text(declared + "".join(map(stub, rest)))
    runtime = [str(work / "device.o"), str(work / "rest.c"), "-o", str(work / "libnull_gpu.so")]
    subprocess.run([*gcc, "-shared", "-pthread", *runtime], check=True)
    driver = ["-DDRIVER", str(source), "-Wl,-soname,libcuda.so.1", "-o", str(work / "libcuda.so.1")]
    subprocess.run([*gcc, "-shared", *driver], check=True)
    try:
        work.rename(folder)
    except OSError:  # somebody else was faster
        if not folder.exists():
            raise
    return folder


def environment() -> dict[str, str]:
    """The environment in which Python sees the null GPU; child processes inherit it."""
    folder, env = build(), dict(os.environ)
    env["LD_PRELOAD"] = str(folder / "libnull_gpu.so")
    env["TRITON_LIBCUDA_PATH"] = str(folder)
    for name, value in (("LD_LIBRARY_PATH", folder), ("PYTHONPATH", HERE / "site")):
        env[name] = os.pathsep.join(filter(None, (str(value), env.get(name))))
    return env | {"NULL_GPU": str(folder)}


def ensure():
    """For scripts that need the null GPU: start this process again with it, unless it is there."""
    if "NULL_GPU" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(__doc__)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())

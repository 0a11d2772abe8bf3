"""The C++ kernels of kernels/cpu, compiled for this machine the first time that they are wanted, then kept."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("cpu")
NAME = "cpu-kernels.so"
# no trap or errno of an operation is ever asked for, which lets the compiler use vectors
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

CpuFunction = Callable[..., None]


@cache
def cpu_function(name: str, dtype: torch.dtype, signature: str) -> CpuFunction | None:
    """Function `name`_`dtype` of the library, or None where there is none for this machine or dtype.

    signature: a letter for each argument: p a tensor's data_ptr() (0 for none), i an integer, f a float.
    """
    library = _library() if dtype in _SUFFIXES else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{_SUFFIXES[dtype]}")
    function.argtypes = [_TYPES[letter] for letter in signature]
    function.restype = None
    found: CpuFunction = function
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning, where it can't be had: everything then runs through torch."""
    try:
        # GOMP_parallel and its like are those of the OpenMP that torch has loaded: one pool of threads serves both
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        warnings.warn(f"no C++ kernels for this CPU, slower ones of torch are used ({reason})", stacklevel=2)
        return None


def _compiled() -> Path:
    from platformdirs import user_cache_path

    compiler = next((path for name in (os.environ.get("CXX"), "g++") if name and (path := shutil.which(name))), None)
    if sys.platform != "linux" or compiler is None:
        raise OSError("they need Linux and g++")
    sources = sorted(SOURCES.glob("*.cpp"))
    content = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([repr((compiler, _FLAGS, _cpu())).encode(), *content])).hexdigest()[:16]
    folder = user_cache_path("porter", ensure_exists=True)
    library = folder / f"{key}-{NAME}"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _build(compiler, sources, Path(scratch))
            Path(scratch, NAME).replace(library)
    return library


def _build(compiler: str, sources: list[Path], folder: Path) -> None:
    """Compile the sources side by side and link them into `folder`; raises CalledProcessError with the diagnostics."""

    def run(*arguments: str) -> None:
        subprocess.run([compiler, *arguments], cwd=folder, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: run(*_FLAGS, "-c", str(source)), sources))
    # not linked with -fopenmp, which could name another copy of the OpenMP library than torch's
    run("-shared", "-o", NAME, *(f"{source.stem}.o" for source in sources))


def _cpu() -> str:
    """What decides the instructions that -march=native may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")

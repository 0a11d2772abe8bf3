"""The C++ kernels for the CPU: how they are compiled, and what happens where they can't be."""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.kernels import cpu_library
from porter.kernels.cpu_library import cpu_function
from porter.kernels.panel_linear import CASES, can_pack_panels, pack_panels, panel_linear, panel_linear_reference

can_compile = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and a C++ compiler"
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_library(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has not looked for its library yet."""
    for function in (cpu_library._library, cpu_function):
        monkeypatch.setattr(cpu_library, function.__name__, function.__wrapped__)
    return empty_cache


@can_compile
def test_the_library_is_compiled_once_and_leaves_nothing_else(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = cpu_library._compiled()
    assert list((empty_cache / "porter").iterdir()) == [built]
    monkeypatch.setattr(cpu_library, "_build", lambda *_: pytest.fail("compiled again"))
    assert cpu_library._compiled() == built
    assert hasattr(ctypes.CDLL(str(built)), "linear_float32")


@can_compile
def test_one_openmp_serves_torch_and_the_library() -> None:
    assert cpu_function("linear", torch.float32, "pipppiii") is not None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_without_a_compiler_one_line_says_so(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"slower ones of torch are used \(they need Linux and g\+\+\)"):
        assert cpu_library.cpu_function("linear", torch.float32, "pipppiii") is None
    assert not list(no_library.rglob("*.so"))


@can_compile
def test_a_failed_compilation_leaves_nothing(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_FLAGS", ("-fno-such-flag",))
    with pytest.warns(UserWarning, match="no-such-flag"):
        assert cpu_library._library() is None
    assert not os.listdir(no_library / "porter")


@can_compile
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panel_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    weight = torch.randn(case["out_features"], case["in_features"]).to(dtype)
    bias = torch.randn(case["out_features"]).to(dtype) if case["bias"] else None
    wide = torch.randn(case["num_tokens"], case["in_features"] + 5).to(dtype)
    x = wide[:, : case["in_features"]]
    assert can_pack_panels(weight)
    found = panel_linear(x, pack_panels(weight), case["out_features"], bias)
    expected = panel_linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    scale = case["in_features"] ** 0.5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


@can_compile
def test_panel_linear_takes_any_leading_dimensions_and_one_dtype() -> None:
    weight = torch.randn(10, 6)
    panels, x = pack_panels(weight), torch.randn(2, 6, 3).transpose(1, 2)
    torch.testing.assert_close(panel_linear(x, panels, 10), x @ weight.T)
    with pytest.raises(TypeError, match="bfloat16"):
        panel_linear(x.bfloat16(), panels, 10)


def test_float16_is_left_to_torch() -> None:
    assert not can_pack_panels(torch.zeros(4, 4, dtype=torch.float16))

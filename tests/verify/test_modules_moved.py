"""Work that another release does in another module is no error if all that follows is right."""

import pytest
import torch

from porter.verify.checks.modules import moved_elsewhere
from porter.verify.compare import ModuleError


def errors(*found: float) -> tuple[ModuleError, ...]:
    return tuple(ModuleError(f"m{i}", "Linear", 0, torch.tensor([e]), e, (0, 0)) for i, e in enumerate(found))


@pytest.mark.parametrize(
    ("found", "moved"),
    [
        ((0.9, 1e-6, 1e-6), ["m0"]),  # a factor that the module above applies
        ((0.9, 1e-6, 0.9, 1e-6), ["m0", "m2"]),
        ((0.9, 0.9, 1e-6), []),  # the next module is wrong as well
        ((1e-6, 1e-6, 0.9), []),  # nothing follows that could be right
        ((float("nan"), float("nan"), 1e-6), []),
        ((1e-6, 1e-6), []),
    ],
)
def test_a_module_is_let_off_only_if_what_follows_is_right(found: tuple[float, ...], moved: list[str]) -> None:
    assert [e.module for e in moved_elsewhere(errors(*found), 1e-4)] == moved

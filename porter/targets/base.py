"""What a target's pass is: a rewrite of a whole port, from the runtime's layers to those of another engine."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import libcst as cst

from porter.passes.base import Example, Pass, Unchanged
from porter.spec import ModelSpec


class TargetPass(ABC):
    """One rewrite. What it reads is the runtime's own vocabulary, which porter wrote, and the spec; never facts."""

    reason: ClassVar[str]
    SPEC: ClassVar[ModelSpec] = ModelSpec(architecture="OakForCausalLM")  # that of the examples
    EXAMPLES: ClassVar[tuple[Example, ...]] = ()
    UNCHANGED: ClassVar[tuple[Unchanged, ...]] = ()

    @property
    def name(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def apply(self, tree: cst.Module, spec: ModelSpec) -> cst.Module:
        """The rewritten port.

        Raises:
            Refusal: the target has no layer that computes this.
        """


def stage_of(each: Pass | TargetPass) -> str:
    """The name of the stage that a pass runs in; those of a target come after all others."""
    return each.stage.name if isinstance(each, Pass) else "TARGET"


def passes_of(target: str, names: Sequence[str]) -> list[TargetPass]:
    """The passes of `target`, in the order of their names in target.toml; each is a module of the target's package."""
    return [_pass(importlib.import_module(f"porter.targets.{target}.{name}")) for name in names]


def _pass(module: object) -> TargetPass:
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, TargetPass) and v.__module__ == getattr(module, "__name__", "")
    ]
    each: TargetPass = found[0]()
    return each

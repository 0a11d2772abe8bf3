"""What a pass is: a rewrite of a whole modeling file, driven by what symbolic execution saw."""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import libcst as cst

from porter.analyze.facts import Facts


class Stage(IntEnum):
    """The order of conversion. Each stage runs to a fixed point, followed by the STRIP passes that clean up."""

    STRIP = 1
    ATTEND = 2
    FLATTEN = 3
    PACK = 4
    SHARD = 5
    FUSE = 6


@dataclass(frozen=True)
class Example:
    """A source before and after a pass."""

    before: str
    after: str


@dataclass(frozen=True)
class Unchanged:
    """A source that a pass must leave alone, and why."""

    source: str
    reason: str


class Pass(ABC):
    """One rewrite. `reason` goes into the report of every edit it makes."""

    stage: ClassVar[Stage]
    reason: ClassVar[str]
    first: ClassVar[bool] = False  # whether it goes before the others of its stage, to leave them less
    last: ClassVar[bool] = False  # whether it goes after the others of its stage, to see what they left
    flat: ClassVar[bool] = False  # whether it works on flat tokens, after FLATTEN
    EXAMPLES: ClassVar[tuple[Example, ...]] = ()
    UNCHANGED: ClassVar[tuple[Unchanged, ...]] = ()

    @property
    def name(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def apply(self, facts: Facts) -> cst.Module:
        """The rewritten file; the same tree if there is nothing to do.

        Raises:
            Refusal: a construct that this pass must rewrite is not understood.
        """


def discover() -> list[Pass]:
    """Every pass of this package, ordered by stage and name."""
    import porter.passes as package

    found: list[Pass] = []
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        found += [
            v()
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, Pass) and v is not Pass and v.__module__ == module.__name__
        ]
    return sorted(found, key=lambda p: (p.stage, not p.first, p.last, p.name))

"""What a port needs of a checkpoint, by name and shape, and a memory of it.

To know it the port has to be built, on the meta device, which takes seconds of imports; so it is kept in the user's
cache folder, for just that port, config and porter.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from porter.atomic import write_files
from porter.errors import explained_config
from porter.runtime.layers.sharding import Part
from porter.runtime.resolution import ParameterIndex, ParameterInfo, WeightRules

_PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Needs:
    """The parameters that a checkpoint has to fill, the rules by which its names are read, and whether the config ties
    the head to the embedding."""

    index: ParameterIndex
    rules: WeightRules
    ties: bool

    def to_json(self) -> dict[str, Any]:
        parameters = {name: _info_to_json(info) for name, info in self.index.parameters.items()}
        modules = sorted(self.index.modules)
        return {"parameters": parameters, "modules": modules, "rules": asdict(self.rules), "ties": self.ties}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Needs":
        """What `to_json` gave."""
        parameters = {name: _info_from_json(info) for name, info in found["parameters"].items()}
        index = ParameterIndex(parameters, frozenset(found["modules"]))
        rules = {name: _tuples(value) for name, value in found["rules"].items()}
        return cls(index, WeightRules(**rules), found["ties"])


def needs_of(port: Any, config: Any) -> Needs:
    """Of a port class with `config`; raises ConfigError for a config that it is not for."""
    import torch

    from porter.runtime.loader import build_port

    with explained_config(), torch.device("meta"):
        model = build_port(port, config)
    return Needs(ParameterIndex.from_model(model), port.weight_rules, getattr(config, "tie_word_embeddings", True))


def remembered(made_from: Iterable[bytes], make: Callable[[], Needs]) -> Needs:
    """make(), or what it gave before for the same bytes and the same porter."""
    from platformdirs import user_cache_path

    key = hashlib.sha256(b"\0".join([*_porter(), *(hashlib.sha256(each).digest() for each in made_from)])).hexdigest()
    file = user_cache_path("porter") / "needs" / f"{key[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or cut short: it is made again
        return Needs.from_json(json.loads(file.read_text(encoding="utf-8")))
    needs = make()
    with suppress(OSError):  # a folder that can't be written costs time only
        write_files(file.parent, {file.name: json.dumps(needs.to_json())})
    return needs


def _porter() -> Iterator[bytes]:
    """What stands for the code that makes ports and layers: releases, and every file of this package."""
    yield repr([(name, version(name)) for name in _PACKAGES]).encode()
    for folder, _, names in sorted(os.walk(Path(__file__).parent, followlinks=True)):
        files = [(name, Path(folder, name).stat()) for name in sorted(names) if name.endswith((".py", ".toml"))]
        yield repr([(folder, name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode()


def _info_to_json(info: ParameterInfo) -> list[Any]:
    return [info.shape, info.num_kv_heads, [[shard_id, asdict(part)] for shard_id, part in info.parts.items()]]


def _info_from_json(found: list[Any]) -> ParameterInfo:
    shape, num_kv_heads, parts = found
    return ParameterInfo(tuple(shape), {_tuples(key): _part(part) for key, part in parts}, num_kv_heads)


def _part(found: dict[str, Any]) -> Part:
    return Part(**{**found, "shape": tuple(found["shape"])})


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

"""Checkpoint tensors into a port's parameters: each parameter exactly once, anything left over an error."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from porter.runtime.errors import ConfigError, EngineError, WeightError
from porter.runtime.layers.linear import LinearMethod
from porter.runtime.layers.sharding import Part
from porter.runtime.resolution import (
    Filled,
    Misshaped,
    ParameterIndex,
    Skip,
    Target,
    Unknown,
    named_tensors,
    resolve,
    split,
)
from porter.runtime.resolution import WeightRules as WeightRules

_SHOWN = 5


def load_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], rules: WeightRules) -> set[str]:
    """Fill every parameter and persistent buffer of `model` from (name, tensor) pairs; the names filled.

    Raises WeightError naming tensors that are missing, unexpected, doubled or mis-shaped.
    """
    index = ParameterIndex.from_model(model)
    tensors = dict(named_tensors(model))
    filled = Filled(index)
    unknown = []
    for name, tensor in weights:
        outcome = resolve(name, tensor.shape, rules, index)
        match outcome:
            case Target():
                if not filled.add(name, outcome):
                    continue
                _check_dtype(name, tensor, tensors[outcome.parameter])
                for part, piece in split(tensor, outcome, index.parameters[outcome.parameter]):
                    _load_part(model, outcome.parameter, part, piece)
            case Misshaped(parameter, expected, found):
                raise WeightError(
                    f"checkpoint tensor {name!r} has shape {list(found)}, but {parameter!r} needs {list(expected)}",
                    "is this the checkpoint that belongs to the config?",
                )
            case Unknown():
                unknown.append(name)
            case Skip():
                pass
    if unknown:
        raise WeightError(
            f"the port has no place for checkpoint tensor {_list(unknown)}",
            "add a rename or a skip to its weight_rules, or use the port that belongs to the checkpoint",
        )
    missing = tie_weights(model, rules, filled.missing())
    if missing:
        raise WeightError(f"the checkpoint lacks {_list(missing)}", "use a complete checkpoint of this architecture")
    finish_loading(model)
    return set(index.parameters)


def build_port(port: Any, config: Any, linear_method: LinearMethod | None = None) -> Any:
    """An instance of a port class, its weights not loaded.

    Raises ConfigError for a config that the port is not for: its `requires` say what it takes for granted, and it may
    raise ValueError itself.
    """
    for name, value in getattr(port, "requires", {}).items():
        found = getattr(config, name, value)
        if found != value and bool(found) != value:
            raise ConfigError(
                f"{port.__name__} is for configs with {name} = {value!r}, this one has {found!r}",
                "use a checkpoint that fits, or another port",
            )
    try:
        return port(config, linear_method)
    except EngineError:
        raise
    except ValueError as error:
        raise ConfigError(f"{port.__name__} refuses this config: {error}", "use a checkpoint that it is for") from error
    except AttributeError as error:
        if error.obj is config:
            raise _lacking(port, str(error.name)) from error
        raise


def _lacking(port: Any, name: str) -> ConfigError:
    return ConfigError(
        f"{port.__name__} reads {name}, which this config does not have", "add it to the checkpoint's config.json"
    )


def finish_loading(model: nn.Module) -> None:
    """Let every layer's linear method prepare the weights that were just loaded."""
    for module in model.modules():
        method = getattr(module, "linear_method", None)
        if isinstance(method, LinearMethod):
            method.process_weights_after_loading(module)


def tie_weights(model: nn.Module, rules: WeightRules, missing: Iterable[str]) -> list[str]:
    """Share the parameters that rules.tied names, where config and checkpoint allow; what is still missing.

    A pair is tied when the config ties (the default) and the checkpoint has one of the two, or both and equal.
    """
    missing = list(missing)
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", True):
        return missing
    names = {name for name, _ in named_tensors(model)}
    for target, source in rules.tied.items():
        if not {target, source} <= names or {target, source} <= set(missing):
            continue
        if source in missing:
            _share(model, source, target)
            missing.remove(source)
        elif target in missing or _equal(model, target, source):
            _share(model, target, source)
            missing = [name for name in missing if name != target]
    return missing


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _equal(model: nn.Module, target: str, source: str) -> bool:
    a, b = (getattr(*_owner(model, name)) for name in (target, source))
    return a is not b and a.shape == b.shape and torch.equal(a, b)


def _share(model: nn.Module, target: str, source: str) -> None:
    """Make `target` the parameter `source`, with what was derived from it."""
    target_module, leaf = _owner(model, target)
    source_module, source_leaf = _owner(model, source)
    for name, parameter in list(source_module.named_parameters(recurse=False)):
        if name == source_leaf:
            setattr(target_module, leaf, parameter)
        elif getattr(parameter, "derived", False):
            setattr(target_module, name, parameter)


def _load_part(model: nn.Module, parameter: str, part: Part, tensor: torch.Tensor) -> None:
    module, leaf = _owner(model, parameter)
    method = getattr(module, "linear_method", None)
    with torch.no_grad():
        if isinstance(method, LinearMethod) and leaf != "bias":
            method.load_part(module, leaf, part, tensor)
        else:
            part.place(getattr(module, leaf)).copy_(part.take(tensor))


def _check_dtype(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    quantized = getattr(parameter, "dtype", None) == torch.int8
    # numbers of 8 bits mean nothing without their scales
    floats = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if (parameter.is_floating_point() or quantized) and not floats:
        raise WeightError(
            f"checkpoint tensor {name!r} holds {tensor.dtype}, not floats", "use the checkpoint's unquantized form"
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more

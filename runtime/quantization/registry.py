"""Finding a linear method by the name that a config or the command line gives it."""

import re
from importlib import import_module
from importlib.util import find_spec

from porter.runtime.errors import ConfigError
from porter.runtime.layers.linear import LinearMethod


def get_linear_method(name: str) -> LinearMethod:
    """The method in porter/runtime/quantization/<name>.py (its METHOD). Raises ConfigError for an unknown name."""
    module = f"porter.runtime.quantization.{name}"
    if not re.fullmatch(r"\w+", name) or name == "registry" or find_spec(module) is None:
        raise ConfigError(f"unknown quantization {name!r}", "use 'int8', 'fp8', or none")
    method: LinearMethod = import_module(module).METHOD
    return method

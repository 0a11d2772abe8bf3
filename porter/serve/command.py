"""`porter serve`: what the options mean, and which model and port they name."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from porter import registry
from porter.errors import RegistryError, UsageError
from porter.manifest import is_port, read_port
from porter.serve.options import ServeOptions

_KEY_VARIABLE = "PORTER_API_KEY"
_INSTALL = 'pip install "porter-lm[serve]"'


def run(options: ServeOptions) -> int:
    """Serve; returns the exit code."""
    try:
        from porter.serve.server import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"porter serve needs {error.name}, which is not installed", _INSTALL) from None
    return serve(_complete(options))


def _complete(options: ServeOptions) -> ServeOptions:
    """Options with the checkpoint and its port found, the key of the environment, and the models of this process."""
    keys = options.api_keys or tuple(key for key in (os.environ.get(_KEY_VARIABLE),) if key)
    if not all(keys):
        raise UsageError("an API key is empty", "give a key, or leave --api-key out")
    if options.generation_config not in ("auto", "none"):
        raise UsageError(f"generation config {options.generation_config!r} is unknown", "use auto or none")
    names = options.served_model_names or (str(options.engine["model"]),)
    engine = {**options.engine, **_model(str(options.engine["model"]))}
    return replace(options, api_keys=keys, served_model_names=names, engine=engine, registered=_registered())


def _model(model: str) -> dict[str, object]:
    """The checkpoint and the port that `model` names: a port stands for the checkpoint that it was verified with."""
    folder = Path(model).expanduser()
    if is_port(folder):
        port = read_port(folder)
    elif folder.exists() or not model.isidentifier():
        return {"model": model}
    else:
        try:
            port = registry.find(model).port
        except RegistryError:
            return {"model": model}
    checkpoint = str((port.manifest.get("verified") or {}).get("checkpoint") or "")
    if not port.verified or not Path(checkpoint).is_dir():
        raise UsageError(
            f"{model} is a port, and no checkpoint is known that it was verified with",
            "give a checkpoint folder; its architecture finds the port",
        )
    return {"model": checkpoint, "port": str(port.folder)}


def _registered() -> dict[str, str]:
    """What a file of the user's registered in this process before it came here."""
    module = sys.modules.get("porter.runtime.model_registry")
    found: dict[str, str] = {} if module is None else module.ModelRegistry.registered()
    return found

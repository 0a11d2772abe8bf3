"""Finds the port class of an architecture: registered in this process, in the local store, or by an entry point."""

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from torch import nn

from porter.runtime.errors import PortError

ENTRY_POINT_GROUP = "porter.models"
# What the script that was started is called, here and in processes that multiprocessing spawned
_SCRIPTS = ("__main__", "__mp_main__")


class _ModelRegistry:
    """Architecture name -> port class. The order is: registered here, the local store, entry points."""

    def __init__(self) -> None:
        self._registered: dict[str, type[nn.Module] | str] = {}

    def register_model(self, architecture: str, port: type[nn.Module] | str) -> None:
        """Serve `architecture` with a class, or with "module:Class", which is imported when first needed."""
        if isinstance(port, str):
            if not all(part.strip() for part in port.split(":")) or port.count(":") != 1:
                raise PortError(f"{port!r} does not name a port", "write module:Class")
        elif not _is_port(port):
            raise PortError(f"{port!r} is not a port class", "it needs compute_logits, sample and load_weights")
        self._registered[architecture] = port

    def unregister_model(self, architecture: str) -> None:
        """Forget what `register_model` said of `architecture`."""
        self._registered.pop(architecture, None)

    def registered(self) -> dict[str, str]:
        """What was registered in this process, each as a reference that another process can register."""
        return {
            architecture: port if isinstance(port, str) else port_reference(port)
            for architecture, port in self._registered.items()
        }

    def resolve(self, architectures: Iterable[str] | None) -> type[nn.Module]:
        """The port class for the first of `architectures` that has one; PortError if none has."""
        names = list(architectures or [])
        for name in names:
            port = self._registered.get(name)
            if port is not None:
                return load_port(port) if isinstance(port, str) else port
            stored = stored_port(name)
            if stored is not None:
                return load_port(stored)
            for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
                return load_port(entry.value)
        if not names:
            raise PortError("the config names no architecture", "pass port=FILE, or add architectures to config.json")
        raise PortError(
            f"no port for {', '.join(names)}", "make one with porter convert and porter register, or pass port=FILE"
        )


ModelRegistry = _ModelRegistry()


def store_root() -> Path:
    """The local store: $PORTER_HOME, else the user's data folder."""
    home = os.environ.get("PORTER_HOME")
    if home:
        return Path(home)
    from platformdirs import user_data_dir

    return Path(user_data_dir("porter"))


def stored_port(architecture: str) -> Path | None:
    """The folder of the current registered port of `architecture`, None if there is none."""
    folder = store_root() / "ports" / architecture
    try:
        current = (folder / "current").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if not (folder / current / "port.json").is_file():
        raise PortError(f"the registered port {current} of {architecture} is incomplete", "register it again")
    return folder / current


def load_port(port: str | Path | type[nn.Module]) -> type[nn.Module]:
    """The port class in a file, in a folder with port.json, or named "module:Class" or "file.py:Class".

    In a file, the class is the one that the port.json beside it names, else the last one with compute_logits.
    """
    if isinstance(port, type):
        return port
    text = str(port)
    path = Path(text).expanduser()
    if path.exists():
        return _class_in_file(_port_file(path), None)
    module_name, _, class_name = text.rpartition(":")
    if module_name.endswith(".py"):
        return _class_in_file(Path(module_name).expanduser(), class_name)
    if not module_name or "/" in text or text.endswith(".py"):
        raise PortError(f"there is no port file {text}", "check the path, or name module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise PortError(f"module {module_name} of port {text} can't be imported ({error})") from error
    return _named_class(module, class_name, text)


def port_reference(port: type[nn.Module]) -> str:
    """What another process can pass to `load_port` to get the same class."""
    module = sys.modules.get(port.__module__)
    file = getattr(module, "__file__", None)
    importable = port.__module__ not in _SCRIPTS and not port.__module__.startswith(_PACKAGE)
    if importable and importlib.util.find_spec(port.__module__) is not None:
        return f"{port.__module__}:{port.__qualname__}"
    if file is None or "<locals>" in port.__qualname__:
        raise PortError(f"{port.__qualname__} can't be imported by a worker", "define it at the top of a module file")
    return f"{Path(file).resolve()}:{port.__qualname__}"


_PACKAGE = "_porter_ports_"


def _port_file(path: Path) -> Path:
    if path.is_file():
        return path
    manifest = _manifest(path)
    file = path / str(manifest.get("module", ""))
    if not file.is_file():
        raise PortError(f"{path} holds no port", "it needs a port.json that names its module")
    return file


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "port.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PortError(f"{path} is not JSON ({error})", "convert the model again") from None
    if not isinstance(manifest, dict):
        raise PortError(f"{path} is not a port manifest", "convert the model again")
    return manifest


def _class_in_file(file: Path, class_name: str | None) -> type[nn.Module]:
    if not file.is_file():
        raise PortError(f"there is no port file {file}", "check the path")
    module = _import_file(file.resolve())
    if class_name is None:
        manifest = _manifest(file.parent)
        if manifest.get("module") == file.name:
            class_name = manifest.get("architecture")
    if class_name is not None:
        return _named_class(module, class_name, str(file))
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes = [value for value in own if _is_port(value)]
    if not classes:
        raise PortError(f"{file} has no class with compute_logits", "give a port written by porter convert")
    return classes[-1]


def _named_class(module: ModuleType, name: str, port: str) -> type[nn.Module]:
    found = getattr(module, name, None)
    if not _is_port(found):
        raise PortError(f"{port} has no port class {name}", "check the name; a port class has compute_logits")
    return found


def _is_port(value: object) -> TypeGuard[type[nn.Module]]:
    return isinstance(value, type) and issubclass(value, nn.Module) and hasattr(value, "compute_logits")


def _import_file(file: Path) -> ModuleType:
    # The folder becomes a package of its own name, so that `from .configuration_x import` works; the file's content
    # is in the name, so that an edited file is read again.
    digest = hashlib.sha256(str(file.parent).encode() + file.read_bytes()).hexdigest()[:16]
    package_name = f"{_PACKAGE}{digest}"
    if package_name not in sys.modules:
        spec = ModuleSpec(package_name, None, is_package=True)
        spec.submodule_search_locations = [str(file.parent)]
        sys.modules[package_name] = importlib.util.module_from_spec(spec)
    name = f"{package_name}.{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec_of_file = importlib.util.spec_from_file_location(name, file)
    if spec_of_file is None or spec_of_file.loader is None:
        raise PortError(f"{file} is not a Python file", "give a .py file")
    module = importlib.util.module_from_spec(spec_of_file)
    sys.modules[name] = module
    try:
        spec_of_file.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PortError(f"port {file} can't be imported ({type(error).__name__}: {error})") from error
    return module

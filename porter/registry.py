"""The local store of ports: folders and JSON, safe against a crash in a write and against two writers.

    <home>/ports/<Architecture>/<id>/{<module>.py, port.json}
    <home>/ports/<Architecture>/current      the id that is used, replaced last

A port that `current` doesn't name yet is not seen, so a write that is cut off leaves the old one in use.
"""

import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from porter.atomic import locked, write_files
from porter.errors import EditedError, PortError, RegistryError
from porter.manifest import MANIFEST, Port, read_port, write_port

_CURRENT = "current"


def home() -> Path:
    """The store: $PORTER_HOME, else the user's data folder; the runtime's `store_root`, without its torch."""
    chosen = os.environ.get("PORTER_HOME")
    if chosen:
        return Path(chosen)
    try:
        from platformdirs import user_data_dir
    except ModuleNotFoundError:
        return Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "porter"
    return Path(user_data_dir("porter"))


@dataclass(frozen=True)
class Entry:
    """One registered port; `replaced` is the id that was in use before, if another."""

    architecture: str
    id: str
    port: Port
    replaced: str | None = None


def register(port: Port, *, force: bool = False) -> Entry:
    """Copy `port` into the store and use it for its architecture.

    PortError for a partial port; EditedError if the stored copy was changed by a person and `force` is off.
    """
    if port.partial:
        raise PortError(f"{port.path} is a partial port", "finish it: convert without --partial")
    if port.target != "native":
        raise PortError(
            f"{port.path} is for {port.target}", "the store keeps ports of porter's own runtime; pip install it"
        )
    with _store_lock():
        shelf = _ports() / port.architecture
        replaced, identity = _current(shelf), port.sha256[:12]
        stored = _store(port, shelf / identity, force)
        write_files(shelf, {_CURRENT: identity + "\n"})
    return Entry(port.architecture, identity, stored, replaced if replaced != identity else None)


def entries() -> list[Entry]:
    """The port in use of every architecture, by name."""
    shelves = sorted(_ports().iterdir()) if _ports().is_dir() else []
    return [_entry(shelf) for shelf in shelves if _current(shelf)]


def find(architecture: str) -> Entry:
    """The port in use for `architecture`; RegistryError if there is none."""
    shelf = _ports() / architecture
    if not architecture.isidentifier() or not _current(shelf):
        raise RegistryError(f"no port of {architecture} is registered", "see `porter list`, or `porter register PORT`")
    return _entry(shelf)


def unregister(architecture: str) -> Entry:
    """Remove every stored port of `architecture`; returns the one that was in use."""
    with _store_lock():
        entry = find(architecture)
        bin_folder = Path(tempfile.mkdtemp(prefix=".removed-", dir=home()))
        os.replace(_ports() / architecture, bin_folder / architecture)  # gone for readers at once
        shutil.rmtree(bin_folder)
    return entry


def _store(port: Port, folder: Path, force: bool) -> Port:
    code = port.path.read_text(encoding="utf-8")
    if folder.is_dir() and (folder / MANIFEST).is_file() and (folder / port.path.name).is_file():
        _refuse_edited(folder, force)
    return write_port(folder, code, port.manifest, force=True)


def _refuse_edited(folder: Path, force: bool) -> None:
    stored = read_port(folder)
    if not force and stored.sha256[:12] != folder.name:
        raise EditedError(stored.path)


def _entry(shelf: Path) -> Entry:
    identity = _current(shelf)
    return Entry(shelf.name, identity, read_port(shelf / identity))


def _current(shelf: Path) -> str:
    file = shelf / _CURRENT
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _ports() -> Path:
    return home() / "ports"


def _store_lock() -> AbstractContextManager[None]:
    root = home()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(
            f"can't use {root}: {error.strerror}", "set PORTER_HOME to a folder you may write"
        ) from error
    return locked(root / ".lock")

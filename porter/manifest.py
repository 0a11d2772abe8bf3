"""A port on disk: one module, and the port.json that says where it came from and what proved it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.atomic import write_files
from porter.errors import EditedError, PortError

Json = dict[str, Any]
MANIFEST = "port.json"
_REQUIRED = ("architecture", "module", "module_sha256")


@dataclass(frozen=True)
class Port:
    """A module and its manifest, read from `folder`."""

    folder: Path
    manifest: Json

    @property
    def target(self) -> str:
        """The emit target; ports written before there were others say nothing."""
        return str(self.manifest.get("target") or "native")

    @property
    def architecture(self) -> str:
        return str(self.manifest["architecture"])

    @property
    def path(self) -> Path:
        return self.folder / str(self.manifest["module"])

    @property
    def sha256(self) -> str:
        return file_sha256(self.path)

    @property
    def partial(self) -> bool:
        return bool(self.manifest.get("partial"))

    @property
    def edited(self) -> bool:
        """Whether a person changed the module after porter wrote it."""
        return self.sha256 != str(self.manifest["module_sha256"])

    @property
    def verified(self) -> bool:
        """Whether the module, as it is now, passed `porter verify`."""
        record = self.manifest.get("verified")
        return isinstance(record, dict) and record.get("port_sha256") == self.sha256

    @property
    def state(self) -> str:
        """One line for a person: what is known about this port."""
        return self.state_for({})

    def state_for(self, hashes: Mapping[str, str]) -> str:
        """The same, seen from a checkpoint with these hashes: what was proved on another one is no proof for it."""
        record = self.manifest.get("verified") or {}
        weights = "random" if record.get("checkpoint") == "tiny random" else "real"
        known = record.get("hashes") or {}
        if weights == "real" and any(known.get(name) != value for name, value in hashes.items()):
            weights = "other"
        proof = f"verified on {weights} weights" if self.verified else "not verified"
        marks = [name for name, holds in (("partial", self.partial), ("edited", self.edited)) if holds]
        return ", ".join([proof, *marks])


def text_sha256(text: str) -> str:
    """Hex digest of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_port(path: Path) -> bool:
    """Whether `path` is a port's folder or its module (a port.json lies in it or beside it)."""
    return (path / MANIFEST).is_file() or (path.suffix == ".py" and _owner(path) is not None)


def read_port(path: Path) -> Port:
    """The port at `path`, a folder or a module; PortError if its manifest is missing or damaged."""
    folder = path if path.is_dir() else _owner(path) or path.parent
    file = folder / MANIFEST
    if not path.exists():
        raise PortError(f"no port at {path}", "give the folder that `porter convert` wrote")
    if not file.is_file():
        raise PortError(f"no {MANIFEST} in {folder}", "make the port with `porter convert`, which writes one")
    port = Port(folder, _checked(file, _parsed(file)))
    if not port.path.is_file():
        raise PortError(f"{port.path} is missing", "run `porter convert` again")
    return port


def write_port(
    folder: Path, code: str, manifest: Json, *, others: Mapping[str, str] | None = None, force: bool = False
) -> Port:
    """Write a port whole or not at all, with `others` around its module (path -> text).

    Raises EditedError if a person changed one of the files that lie there.
    """
    files = {str(manifest["module"]): code, **(others or {})}
    for name, text in files.items():
        if (folder / name).exists() and not force and not _overwritable(folder, name, text):
            raise EditedError(folder / name)
    write_files(folder, {**files, MANIFEST: dumps(manifest)})
    return Port(folder, manifest)


def record_verification(port: Port, record: Json) -> Port:
    """Write `record` (with the module's hash as it is now) as the manifest's `verified`."""
    manifest = {**port.manifest, "verified": {**record, "port_sha256": port.sha256}}
    write_files(port.folder, {MANIFEST: dumps(manifest)})
    return Port(port.folder, manifest)


def dumps(manifest: Json) -> str:
    """The manifest's text, the same for the same content."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _overwritable(folder: Path, name: str, text: str) -> bool:
    """Whether a file is as porter wrote it, or as it is to be written."""
    found = file_sha256(folder / name)
    if found == text_sha256(text):
        return True
    file = folder / MANIFEST
    manifest = _parsed(file) if file.is_file() else {}
    known = {manifest.get("module"): manifest.get("module_sha256"), **manifest.get("files", {})}
    return known.get(name) == found


def _owner(module: Path) -> Path | None:
    """The folder of the port that `module` is of: its own, or the one above its package."""
    for folder in module.parents[:2]:
        file = folder / MANIFEST
        if file.is_file() and _parsed(file).get("module") == str(module.relative_to(folder)):
            return folder
    return None


def _parsed(file: Path) -> Json:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PortError(f"{file} is not valid JSON ({error})", "run `porter convert --force` again") from error
    if not isinstance(manifest, dict):
        raise PortError(f"{file} is not a port manifest", "run `porter convert --force` again")
    return manifest


def _checked(file: Path, manifest: Json) -> Json:
    missing = [key for key in _REQUIRED if not isinstance(manifest.get(key), str)]
    if missing:
        raise PortError(f"{file} lacks {', '.join(missing)}", "run `porter convert --force` again")
    module = manifest["module"]
    inside = not Path(module).is_absolute() and ".." not in Path(module).parts and len(Path(module).parts) <= 2
    if not manifest["architecture"].isidentifier() or not inside or not module.endswith(".py"):
        raise PortError(f"{file} names no valid architecture and module", "run `porter convert --force` again")
    return manifest

"""Writes that are whole or absent, and a lock between processes."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from porter.errors import UsageError


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write `files` (name or path below -> text) into `folder`; on any failure the folder is as it was before."""
    targets = {folder / name: text for name, text in files.items()}
    places = sorted({folder, *(target.parent for target in targets)})
    created = [place for place in places if not place.exists()]
    temporary: dict[Path, Path] = {}
    try:
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        for target, text in targets.items():
            temporary[target] = target.parent / f".{target.name}.{os.getpid()}.tmp"
            _write_through(temporary[target], text)
        for target, source in temporary.items():
            os.replace(source, target)
        _sync_folder(folder)
    except BaseException as error:
        _undo(created, temporary)
        if isinstance(error, OSError):
            raise UsageError(f"can't write {folder}: {error.strerror}", "choose a folder you may write to") from error
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; a second process waits. A process that dies lets go."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _undo(created: Sequence[Path], temporary: Mapping[Path, Path]) -> None:
    for source in temporary.values():
        with suppress(OSError):
            source.unlink(missing_ok=True)
    for place in reversed(created):
        with suppress(OSError):
            place.rmdir()


def _write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

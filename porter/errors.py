"""Every error that a person can cause, each one line with its remedy.

PorterError                 exit 2: the input or the call is wrong
├── SourceError             no modeling file or config there, or it can't be read
├── ConversionError         the source was read but can't become a port
│   └── Refusal             one construct is not understood: file, line, what, why
├── PortError               a port file or its manifest is unusable
├── CheckpointError         weights or config of a checkpoint are missing, damaged or don't fit
│   └── OriginalError       the original can't be built or run, so there is nothing to compare with
├── RegistryError           nothing registered by that name, or the store is unusable
├── EditedError             a file that a person changed would be overwritten
├── UsageError              options that don't go together or a value out of range
└── CheckFailed             exit 1: the tool worked and found a problem
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PorterError(Exception):
    """What is wrong (`message`) and what to do about it (`remedy`), shown as one line."""

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.message}; {self.remedy}" if self.remedy else self.message
        return " ".join(line.split())


class SourceError(PorterError):
    """The source can't be found, read or parsed."""


class ConversionError(PorterError):
    """The source was read but no port can be made of it."""


class Refusal(ConversionError):
    """A construct that porter doesn't understand; nothing is guessed.

    `file` and `line` (1-based) say where, `what` is the construct, `why` the reason it matters; `code` is its
    kind, which `porter explain` tells more about (`porter/refusals.py`).
    """

    def __init__(self, file: str | Path, line: int, what: str, why: str, remedy: str, code: str = "P100") -> None:
        super().__init__(f"{file}:{line}: {code} {what}: {why}", remedy)
        self.args = (str(file), line, what, why, remedy, code)  # so that it survives pickling between processes
        self.code = code
        self.file = str(file)
        self.line = line
        self.what = what
        self.why = why


class PortError(PorterError):
    """A port file or its manifest is missing, damaged or partial."""


class CheckpointError(PorterError):
    """A checkpoint's weights or config are missing, damaged or don't fit the port."""


class OriginalError(CheckpointError):
    """The original can't be built or run with a config, so there is nothing to compare a port with."""


class RegistryError(PorterError):
    """The local store has no such port, or can't be used."""


class EditedError(PorterError):
    """A file that a person changed since it was generated would be overwritten."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(f"{path} was changed since porter wrote it", "keep a copy, then pass --force to overwrite it")
        self.args = (str(path),)


class UsageError(PorterError):
    """Options that don't go together, or a value out of range."""


class CheckFailed(PorterError):
    """The tool did its work and found a problem: exit code 1."""

    exit_code = 1


@contextmanager
def explained_config() -> Iterator[None]:
    """A port that asks its config for a field that it lacks raises CheckpointError instead of AttributeError."""
    try:
        yield
    except AttributeError as error:
        if not hasattr(error.obj, "model_type"):
            raise
        kind = getattr(error.obj, "model_type", "") or "model"
        raise CheckpointError(
            f"the port reads config.{error.name}, which this {kind} config lacks",
            "use the checkpoint that the port is for",
        ) from error

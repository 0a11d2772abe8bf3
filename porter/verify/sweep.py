"""`porter sweep`: convert and verify many sources side by side, and keep the scoreboard."""

import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from porter.errors import OriginalError, PorterError, Refusal
from porter.runtime.errors import EngineError
from porter.source import causal_lm_types, load
from porter.verify.scoreboard import Row, compared, proved

LIMIT_SECONDS = 600


class _TooLong(Exception):
    """A source took longer than the limit."""


def sources(given: list[str]) -> dict[str, str]:
    """Name of the row -> what `porter convert` takes; by default each causal LM of the installed transformers.

    A folder without a config stands for the modeling files below it, named by their path in it.
    """
    if not given:
        return {name: name for name in causal_lm_types()}
    found: dict[str, str] = {}
    for each in given:
        name, _, spec = each.rpartition("=")
        folder = Path(spec)
        if not name and folder.is_dir() and not (folder / "config.json").is_file():
            found.update(_below(folder))
        else:
            found[name or spec] = spec
    return found


def _below(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("modeling_*.py"))
    return {_row_name(file.relative_to(folder)): str(file) for file in files}


def _row_name(file: Path) -> str:
    return str(file.parent) if len(file.parts) > 1 else file.stem.removeprefix("modeling_")


def sweep(listed: Mapping[str, str], jobs: int) -> Iterator[Row]:
    """A row for each source, in the order in which they are done.

    Each source has a process of its own, forked from one that has imported what all need: what torch and libcst keep
    in memory goes with the process, and one that dies takes nothing else along.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["porter.convert", "porter.verify.run", "transformers.models.auto.modeling_auto"])
    todo = iter(listed.items())
    running: dict[Connection, _Job] = {}
    try:
        while True:
            while len(running) < jobs and (following := next(todo, None)):
                job = _Job.start(context, *following)
                running[job.answer] = job
            if not running:
                return
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                yield running.pop(ready).row()
    finally:
        for job in running.values():
            job.process.terminate()


@dataclass(frozen=True)
class _Job:
    """A source that is being scored in its own process."""

    name: str
    source: str
    process: BaseProcess
    answer: Connection

    @classmethod
    def start(cls, context: ForkServerContext, name: str, source: str) -> "_Job":
        answer, given = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(given, name, source))
        process.start()
        given.close()
        return cls(name, source, process, answer)

    def row(self) -> Row:
        """What the process found; its death is a row too."""
        try:
            row: Row = self.answer.recv()
        except EOFError:
            row = Row(self.name, self.source, "crashed", reason="its process died (out of memory?)")
        self.answer.close()
        self.process.join()
        return row


def _answer(given: Connection, name: str, source: str) -> None:
    given.send(score(name, source))


def score(name: str, source: str) -> Row:
    """Convert and verify one source; whatever goes wrong becomes the row's result and reason."""
    started = time.monotonic()
    try:
        with _limit(LIMIT_SECONDS), tempfile.TemporaryDirectory(prefix="porter-sweep-") as folder:
            row = _scored(Row(name, source, "crashed"), Path(folder))
    except _TooLong:
        row = Row(name, source, "crashed", reason=f"it took more than {LIMIT_SECONDS} seconds")
    except Exception as error:  # a sweep reports porter's own mistakes and goes on
        row = Row(name, source, "crashed", reason=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return replace(row, seconds=round(time.monotonic() - started, 1))


def _scored(row: Row, folder: Path) -> Row:
    from porter.convert import convert
    from porter.manifest import write_port

    started = time.process_time()
    try:
        source = load(row.source)
        row = replace(row, source_sha256=source.sha256)
        conversion = convert(source)
    except PorterError as error:
        return replace(row, result="refused", reason=str(error), code=error.code if isinstance(error, Refusal) else "")
    port = write_port(folder, conversion.code, conversion.manifest)
    row = replace(row, architecture=port.architecture, edits=len(port.manifest["edits"]))
    row = replace(row, convert_seconds=round(time.process_time() - started, 1))
    return _verified(compared(row, source.text, conversion.code), port.path)


def _verified(row: Row, port: Path) -> Row:
    from porter.verify.request import Request
    from porter.verify.run import verify

    try:
        return proved(row, verify(Request(port=port, random=True)))
    except OriginalError as error:
        return replace(row, result="unproved", reason=str(error))
    except (PorterError, EngineError) as error:
        return replace(row, result="wrong", reason=f"not verified: {error}")


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise _TooLong in the main thread after so many seconds."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

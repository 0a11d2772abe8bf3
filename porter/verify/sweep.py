"""`porter sweep`: convert and verify many sources side by side, and keep the scoreboard."""

import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

from porter.errors import OriginalError, PorterError, Refusal
from porter.runtime.errors import EngineError
from porter.source import causal_lm_types, load
from porter.verify.scoreboard import Row, compared, proved

LIMIT_SECONDS = 600
_TASKS_PER_PROCESS = 12  # what torch and libcst keep in memory goes with the process


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
    """A row for each source, in the order in which they are done; each has a process for as long as it takes."""
    todo = dict(listed)
    while todo:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=_TASKS_PER_PROCESS) as pool:
            running = {pool.submit(score, name, source): name for name, source in todo.items()}
            try:
                for done in as_completed(running):
                    row = done.result()
                    del todo[running[done]]
                    yield row
            except BrokenProcessPool:
                lost = next(name for future, name in running.items() if name in todo and future.done())
                yield Row(lost, todo.pop(lost), "crashed", reason="its process died (out of memory?)")


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

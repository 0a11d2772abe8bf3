"""The weight ledger: where each tensor of a checkpoint goes, from safetensors headers and the port's rules alone."""

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from porter.errors import CheckpointError
from porter.needs import Needs, needs_of, remembered
from porter.runtime.checkpoint import load_config, read_config, resolve_model, weight_files
from porter.runtime.errors import WeightError
from porter.runtime.resolution import Filled, Misshaped, Outcome, Skip, Target, resolve
from porter.source import load
from porter.verify.request import Request
from porter.verify.select import Selected, converted, find_port

Status = Literal["used", "excused", "unexpected", "mis-shaped", "doubled"]
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class Header:
    """One tensor as its file's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """What becomes of one checkpoint tensor: the parameter (and shard) it fills, or the rule that excuses it."""

    tensor: str
    shape: tuple[int, ...]
    status: Status
    target: str = ""
    why: str = ""


@dataclass(frozen=True)
class Ledger:
    """Every tensor once; `unfilled` are the port's parameters that none fills, `tie` says how the head is decided."""

    lines: tuple[Line, ...]
    unfilled: tuple[str, ...]
    tie: str

    @property
    def problems(self) -> tuple[str, ...]:
        """One line each; empty if all fits."""
        bad = [
            f"{line.tensor} {line.status}: {line.why}" for line in self.lines if line.status not in ("used", "excused")
        ]
        return (*bad, *(f"{name} is filled by no tensor" for name in self.unfilled))

    @property
    def complete(self) -> bool:
        return not self.problems

    @property
    def summary(self) -> str:
        """Counts by status, and the tie."""
        counts = {status: sum(line.status == status for line in self.lines) for status in Status.__args__}  # type: ignore[attr-defined]
        told = [f"{count} {status}" for status, count in counts.items() if count]
        return ", ".join([*told, f"{len(self.unfilled)} unfilled", self.tie])

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: tensor, shape, where it goes, why."""
        lines = [
            (line.tensor, "x".join(map(str, line.shape)), line.target or line.status, line.why) for line in self.lines
        ]
        return lines + [("-", "", name, "filled by no tensor") for name in self.unfilled]

    def to_json(self) -> dict[str, Any]:
        return {"complete": self.complete, "problems": list(self.problems), **asdict(self)}


@dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights: a folder with its config, and its tensors as their files' headers name them."""

    folder: Path
    headers: tuple[Header, ...]


def outline(model: str) -> Outline:
    """Of a checkpoint folder, or of a hub repository, from which only headers and JSON files are fetched.

    A repository that can't be reached is taken from the local cache. CheckpointError if it isn't there either.
    """
    if Path(model).expanduser().is_dir():
        folder = resolve_model(model)
        return Outline(folder, tuple(read_headers(folder)))
    from huggingface_hub import get_safetensors_metadata, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(model).files_metadata.values()
        folder = Path(snapshot_download(model, allow_patterns="*.json"))
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{model} has no safetensors files", "convert its weights to safetensors") from error
    except Exception:  # whatever the network gives: what is in the local cache decides, or the error of not having it
        folder = resolve_model(model)
        return Outline(folder, tuple(read_headers(folder)))
    tensors = [(name, info) for file in files for name, info in sorted(file.tensors.items())]
    return Outline(folder, tuple(Header(name, info.dtype, tuple(info.shape)) for name, info in tensors))


def checkpoint_ledger(checkpoint: Outline, port: Path | None = None) -> tuple[str, Ledger]:
    """Which port was taken (as verification takes one), and the ledger of that port and the checkpoint.

    The first time that a port meets a config takes seconds, since it has to be built, later ones do not.
    """
    folder = checkpoint.folder
    selected = find_port(Request(model=str(folder), port=port))
    texts = [selected.port.path.read_bytes()] if selected else list(_sources(folder))
    needs = remembered([json.dumps(read_config(folder)).encode(), *texts], lambda: _built(folder, selected))
    note = selected.note if selected else f"no port given or registered: that of {folder} as it is converted"
    return note, ledger_of(needs, checkpoint.headers)


def _sources(folder: Path) -> Iterator[bytes]:
    """What a port of the checkpoint would be converted from."""
    source = load(str(folder))
    yield f"{source.text}\0{source.config_text}".encode()
    for file in sorted(folder.glob("*.py")):
        yield file.read_bytes()


def _built(folder: Path, selected: Selected | None) -> Needs:
    from porter.runtime.model_registry import load_port

    config = load_config(folder)
    if selected:
        return needs_of(load_port(selected.port.path), config)
    with tempfile.TemporaryDirectory(prefix="porter-") as place:
        return needs_of(load_port(converted(str(folder), Path(place), "native").port.path), config)


def make_ledger(port: Any, config: Any, folder: Path, headers: Iterable[Header] | None = None) -> Ledger:
    """The ledger of a port class, built on the meta device with `config`, and the checkpoint in `folder`.

    `headers` are its tensors, read from the files there if not given.
    """
    return ledger_of(needs_of(port, config), headers or read_headers(folder))


def ledger_of(needs: Needs, headers: Iterable[Header]) -> Ledger:
    """What becomes of the tensors in `headers` in a port with these needs."""
    filled, lines = Filled(needs.index), []
    for header in headers:
        outcome = resolve(header.name, header.shape, needs.rules, needs.index)
        line = _line(header, outcome)
        if isinstance(outcome, Target):
            try:
                filled.add(header.name, outcome)
            except WeightError as error:
                line = Line(header.name, header.shape, "doubled", line.target, error.message)
        lines.append(line)
    lines = [_given_way(line, filled.gave_way) for line in lines]
    missing, tie = _decide_tie(filled.missing(), needs)
    return Ledger(tuple(lines), tuple(missing), tie)


def read_headers(folder: Path) -> Iterator[Header]:
    """Every tensor named in the headers of a checkpoint's safetensors files; CheckpointError for a damaged file."""
    for file in weight_files(folder):
        for name, entry in sorted(_read_header(file).items()):
            if name != "__metadata__":
                yield Header(name, str(entry["dtype"]), tuple(entry["shape"]))


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """sha256 of a checkpoint's config, and of its weight files' headers and sizes, which take no reading of weights."""
    weights = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            weights.update(opened.read(length) + str(file.stat().st_size).encode())
    config = hashlib.sha256((folder / "config.json").read_bytes())
    return {"config": config.hexdigest(), "checkpoint headers": weights.hexdigest()}


def _read_header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header: dict[str, Any] = json.loads(opened.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes, its header describes {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error})", "download it again") from error
    return header


def _line(header: Header, outcome: Outcome) -> Line:
    match outcome:
        case Target(parameter, shard_id, transposed, layout):
            place = parameter if shard_id is None else f"{parameter}[{shard_id}]"
            notes = ["transposed"] * transposed + ([f"{layout} parts"] if layout else [])
            return Line(header.name, header.shape, "used", place, ", ".join(notes))
        case Skip(rule):
            return Line(header.name, header.shape, "excused", "", f"skipped by {rule!r}")
        case Misshaped(parameter, expected, found):
            why = f"{parameter} needs {list(expected)}, the checkpoint has {list(found)}"
            return Line(header.name, header.shape, "mis-shaped", "", why)
    return Line(header.name, header.shape, "unexpected", "", "no rule and no parameter of the port claims it")


def _given_way(line: Line, gave_way: Mapping[str, str]) -> Line:
    if line.tensor not in gave_way:
        return line
    return replace(line, status="excused", target="", why=f"a second name of {gave_way[line.tensor]}, which is there")


def _decide_tie(missing: list[str], needs: Needs) -> tuple[list[str], str]:
    if not needs.rules.tied:
        return missing, "no tied weights"
    if not needs.ties:
        return missing, "not tied: the config says so"
    tied = needs.rules.tied.items()
    pairs = {target: source for target, source in tied if (target in missing) != (source in missing)}
    shared = {name for pair in pairs.items() for name in pair}
    left = [name for name in missing if name not in shared]
    absent = sorted(shared & set(missing))
    return (
        left,
        f"tied: {', '.join(absent)} not in the checkpoint" if absent else "both in the checkpoint: tied if equal",
    )

"""Finds the port that a request is about; without one it converts on the fly."""

import ast
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from porter import registry
from porter.errors import PortError, RegistryError
from porter.manifest import Port, file_sha256, is_port, read_port, write_port
from porter.runtime.checkpoint import read_config, resolve_model
from porter.verify.request import Request


@dataclass(frozen=True)
class Selected:
    """A port, how it was found (one line), and whether it was converted for this run only."""

    port: Port
    note: str
    converted: bool = False
    recorded: bool = True


@contextmanager
def select_port(request: Request) -> Iterator[Selected]:
    """The port given, the one registered for the model, or one converted into a temporary folder."""
    given = find_port(request)
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="porter-") as folder:
        yield converted(str(request.subject or request.model), Path(folder), request.target)


def find_port(request: Request) -> Selected | None:
    """The port given or registered; None if there is none yet."""
    return _given(request) or _registered(request)


def _given(request: Request) -> Selected | None:
    path = request.port or (Path(request.subject) if request.subject and is_port(Path(request.subject)) else None)
    if path is None:
        return None
    if path.is_file() and not is_port(path):
        return Selected(_bare_port(path), f"{path}, which has no port.json", recorded=False)
    port = read_port(path)
    if port.partial:
        raise PortError(f"{port.path} is a partial port", "finish it: convert without --partial")
    if port.target != request.target:
        remedy = f"convert with --target {request.target}" if request.target != "native" else "pass --engine vllm"
        raise PortError(f"{port.path} is a port for {port.target}, not {request.target}", remedy)
    return Selected(port, f"{port.path} ({_state(port, request)})")


def _registered(request: Request) -> Selected | None:
    if request.subject or not request.model or request.target != "native":
        return None
    for architecture in read_config(resolve_model(request.model)).get("architectures") or []:
        try:
            entry = registry.find(architecture)
        except RegistryError:
            continue
        return Selected(entry.port, f"the registered port {entry.id} of {architecture} ({_state(entry.port, request)})")
    return None


def _state(port: Port, request: Request) -> str:
    """What is known of the port, and whether of the weights that it is now taken for."""
    from porter.weights import checkpoint_hashes

    return port.state_for(checkpoint_hashes(resolve_model(request.model)) if request.model else {})


def converted(source: str, folder: Path, target: str) -> Selected:
    """A port of `source`, written into `folder`."""
    from porter.convert import convert
    from porter.source import load

    conversion = convert(load(source), target)
    port = write_port(folder, conversion.code, conversion.manifest, others=conversion.others)
    return Selected(port, f"no port given or registered: {source} was converted for this run only", converted=True)


def _bare_port(path: Path) -> Port:
    """A port that somebody wrote by hand: its architecture is the last class that has compute_logits."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PortError(f"{path} is not Python ({error})", "give a port written by `porter convert`") from error
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and "compute_logits" in ast.dump(node)]
    if not names:
        raise PortError(f"{path} has no class with compute_logits", "give a port written by `porter convert`")
    return Port(path.parent, {"architecture": names[-1], "module": path.name, "module_sha256": file_sha256(path)})

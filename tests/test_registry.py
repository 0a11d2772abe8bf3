"""The store of ports: a crash or a second writer never leaves it half-written; what is unproved is said."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter import registry
from porter.cli import app
from porter.errors import EditedError, PortError, RegistryError
from porter.manifest import MANIFEST, Port, read_port, record_verification, text_sha256, write_port
from porter.runtime.model_registry import store_root, stored_port

MakePort = Callable[..., Port]


def make_port_in(folder: Path, code: str = "x = 1\n", architecture: str = "AcornForCausalLM", **more: object) -> Port:
    manifest = {"architecture": architecture, "module": "acorn.py", "module_sha256": text_sha256(code), **more}
    return write_port(folder, code, manifest, force=True)


@pytest.fixture
def make_port(tmp_path: Path) -> MakePort:
    def make(code: str = "x = 1\n", name: str = "port", **more: object) -> Port:
        return make_port_in(tmp_path / name, code, **more)  # type: ignore[arg-type]

    return make


def test_the_runtime_finds_what_was_registered(make_port: MakePort) -> None:
    entry = registry.register(make_port())
    assert store_root() == registry.home()
    assert stored_port("AcornForCausalLM") == entry.port.folder


@pytest.mark.parametrize("name", ["PORTER_HOME", "XDG_DATA_HOME"])
def test_tool_and_runtime_agree_on_the_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTER_HOME")
    monkeypatch.setenv(name, str(tmp_path))
    assert registry.home() == store_root()


def test_the_latest_port_is_in_use_and_the_old_one_is_named(make_port: MakePort) -> None:
    first = registry.register(make_port("x = 1\n"))
    second = registry.register(make_port("x = 2\n"))
    assert (second.replaced, registry.find("AcornForCausalLM").id) == (first.id, second.id)
    assert [entry.id for entry in registry.entries()] == [second.id]


def test_unregister_forgets_every_port_of_the_architecture(make_port: MakePort) -> None:
    registry.register(make_port())
    registry.unregister("AcornForCausalLM")
    assert registry.entries() == []
    with pytest.raises(RegistryError):
        registry.find("AcornForCausalLM")
    assert [path.name for path in registry.home().iterdir()] == [".lock", "ports"]


def test_a_partial_port_is_refused(make_port: MakePort) -> None:
    with pytest.raises(PortError, match="partial"):
        registry.register(make_port(partial=True))


def test_a_stored_copy_that_a_person_changed_is_kept(make_port: MakePort) -> None:
    port = make_port()
    stored = registry.register(port).port
    stored.path.write_text("# mine\n")
    with pytest.raises(EditedError):
        registry.register(port)
    assert stored.path.read_text() == "# mine\n"
    registry.register(port, force=True)
    assert stored.path.read_text() == "x = 1\n"


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_in_a_write_leaves_the_old_port_in_use(
    make_port: MakePort, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    old = registry.register(make_port("x = 1\n"))
    new = make_port("x = 2\n")
    replaced: list[object] = []
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == crash_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        registry.register(new)
    monkeypatch.setattr(os, "replace", replace)
    assert registry.find("AcornForCausalLM").port.path.read_text() == "x = 1\n"
    assert registry.find("AcornForCausalLM").id == old.id
    assert registry.register(new).port.path.read_text() == "x = 2\n"


def _register_often(home: str, folder: str, value: int) -> None:
    os.environ["PORTER_HOME"] = home
    for round_number in range(10):
        registry.register(make_port_in(Path(folder), f"x = {value * 100 + round_number}\n"))


def test_two_writers_at_once_leave_a_whole_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = [(str(registry.home()), str(tmp_path / str(value)), value) for value in (1, 2)]
    writers = [context.Process(target=_register_often, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    shelf = registry.home() / "ports/AcornForCausalLM"
    folders = [path for path in shelf.iterdir() if path.is_dir()]
    assert len(folders) == 20
    assert all(read_port(folder).sha256.startswith(folder.name) for folder in folders)
    assert registry.find("AcornForCausalLM").id in {folder.name for folder in folders}
    assert [path.name for path in shelf.rglob("*.tmp")] == []


def test_verified_holds_only_for_the_bytes_that_were_verified(make_port: MakePort) -> None:
    port = record_verification(make_port(), {"dtype": "float32"})
    assert (port.verified, port.edited, port.state) == (True, False, "verified on real weights")
    port.path.write_text("x = 9\n")
    assert (port.verified, port.edited, port.state) == (False, True, "not verified, edited")


def test_a_proof_on_one_checkpoint_is_none_for_another(make_port: MakePort) -> None:
    proved = {"config": "a", "checkpoint headers": "b"}
    port = record_verification(make_port(), {"checkpoint": "here", "hashes": {"port": "p", **proved}})
    assert port.state_for(proved) == "verified on real weights"
    assert port.state_for({**proved, "checkpoint headers": "c"}) == "verified on other weights"
    assert port.state_for({**proved, "config": "c"}) == "verified on other weights"
    random = record_verification(make_port(), {"checkpoint": "tiny random", "hashes": proved})
    assert random.state_for({"config": "c"}) == "verified on random weights"


def test_register_says_what_is_not_verified_or_edited(make_port: MakePort) -> None:
    port = make_port()
    port.path.write_text("x = 9\n")
    result = CliRunner().invoke(app, ["register", str(port.folder)])
    assert result.exit_code == 0
    assert result.stderr.count("warning:") == 2
    assert "not verified" in result.stderr
    assert "edited" in result.stderr


def test_register_is_silent_about_a_verified_port(make_port: MakePort) -> None:
    port = record_verification(make_port(), {"dtype": "float32"})
    result = CliRunner().invoke(app, ["register", str(port.path)])
    assert (result.exit_code, result.stderr) == (0, "")


def test_list_and_show(make_port: MakePort) -> None:
    entry = registry.register(make_port(source={"name": "modeling_acorn.py"}))
    rows = CliRunner().invoke(app, ["list"]).stdout.splitlines()
    assert max(map(len, rows)) <= 80
    assert rows[-1].split() == ["AcornForCausalLM", entry.id, "modeling_acorn.py", "not", "verified"]
    shown = json.loads(CliRunner().invoke(app, ["show", "AcornForCausalLM", "--json"]).stdout)
    assert (shown["port"], shown["manifest"]["module"]) == (entry.id, "acorn.py")
    assert "modeling_acorn.py" in CliRunner().invoke(app, ["show", "AcornForCausalLM"]).stdout


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"architecture": "A", "module": "../a.py", "module_sha256": ""}',
        '{"architecture": "../A", "module": "acorn.py", "module_sha256": ""}',
        '{"architecture": "A", "module": "gone.py", "module_sha256": ""}',
    ],
)
def test_a_damaged_manifest_is_one_line(make_port: MakePort, text: str) -> None:
    port = make_port()
    (port.folder / MANIFEST).write_text(text)
    with pytest.raises(PortError):
        read_port(port.folder)


def test_a_store_that_can_not_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTER_HOME", str(tmp_path / "file"))
    with pytest.raises(RegistryError, match="PORTER_HOME"):
        registry.register(make_port_in(tmp_path / "port"))

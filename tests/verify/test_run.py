"""`porter verify` from end to end on a port that is right: exit codes, the report, the record in the manifest."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter import registry
from porter.cli import app
from porter.manifest import Port, file_sha256, read_port, write_port
from porter.runtime.errors import MachineError
from porter.verify.request import Request
from porter.verify.run import verify
from porter.verify.tiny import tiny_config, write_checkpoint

HANDWRITTEN = Path(__file__).parents[1] / "models" / "handwritten_llama.py"


@pytest.fixture
def port(tmp_path: Path) -> Port:
    code = HANDWRITTEN.read_text()
    manifest = {"architecture": "LlamaForCausalLM", "module": "llama.py", "module_sha256": file_sha256(HANDWRITTEN)}
    return write_port(tmp_path / "port", code, manifest)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(tiny_config("llama"), folder)
    return folder


@pytest.mark.slow
def test_a_right_port_passes_every_check_of_every_variant(port: Port) -> None:
    result = verify(Request(subject=str(port.folder), random=True))
    assert [(case.name, case.failure) for case in result.cases if case.failure] == []
    assert {case.name for case in result.cases} >= {"default", "num_key_value_heads=1", "head_dim=24", "rope-yarn"}
    names = [check.name for check in result.cases[0].checks]
    assert names == ["ledger", "modules", "logits", "matrix", "greedy", "tp 2", "tp 4", "int8", "tp 2 processes"]
    assert all(check.status == "PASS" for case in result.cases for check in case.checks)
    assert read_port(port.folder).verified


def test_a_checkpoint_on_disk_is_verified_and_recorded(port: Port, checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(port.path), "--model", str(checkpoint), "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"], found["converted"]) == (0, True, False)
    record = read_port(port.folder).manifest["verified"]
    assert (record["port_sha256"], record["checkpoint"]) == (port.sha256, str(checkpoint))
    assert record["figures"]["greedy"].startswith("100%")


def test_the_table_fits_80_columns_and_says_what_was_not_tested(port: Port, checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(port.path), "--model", str(checkpoint)])
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "not tested: half precision" in result.stderr


def test_a_wrong_port_exits_1_names_the_module_and_is_not_recorded(port: Port, checkpoint: Path) -> None:
    port.path.write_text(port.path.read_text().replace("head_dim**-0.5", "1.0"))
    result = CliRunner().invoke(app, ["verify", str(port.path), "--model", str(checkpoint)])
    assert result.exit_code == 1
    assert "model.layers.0.self_attn (LlamaAttention)" in result.stderr
    assert "verified" not in read_port(port.folder).manifest


def test_the_registered_port_is_used_for_its_architecture(port: Port, checkpoint: Path) -> None:
    entry = registry.register(port)
    result = verify(Request(model=str(checkpoint)))
    assert entry.id in result.port
    assert registry.find("LlamaForCausalLM").port.verified


def test_a_partial_port_can_not_be_verified(port: Port) -> None:
    write_port(port.folder, port.path.read_text(), {**port.manifest, "partial": True})
    result = CliRunner().invoke(app, ["verify", str(port.folder), "--random"])
    assert (result.exit_code, "partial" in result.stderr) == (2, True)


def test_a_port_that_raises_fails_the_check_it_raises_in(port: Port, checkpoint: Path) -> None:
    port.path.write_text(
        port.path.read_text().replace("return self.norm(hidden_states)", "return self.nrm(hidden_states)")
    )
    result = CliRunner().invoke(app, ["verify", str(port.path), "--model", str(checkpoint)])
    assert result.exit_code == 1
    assert "modules failed: the port raised AttributeError" in result.stderr


def test_a_port_that_is_not_python_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text("class (")
    result = CliRunner().invoke(app, ["verify", "--port", str(tmp_path / "port.py"), "--random"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_half_precision_is_measured_against_the_originals_own_rounding(port: Port, checkpoint: Path) -> None:
    result = verify(Request(subject=str(port.path), model=str(checkpoint), dtype="bfloat16"))
    assert result.passed


def test_an_unproved_check_exits_2_and_says_so(port: Port, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise MachineError("tensor-parallel rank 1 was killed", "is there enough memory?")

    monkeypatch.setattr("porter.verify.checks.parallel.check_processes", killed)
    result = CliRunner().invoke(app, ["verify", str(port.path), "--model", str(checkpoint)])
    said = " ".join(result.stderr.split())  # however the line was wrapped
    assert (result.exit_code, "tp 2 processes is unproved" in said) == (2, True), said


def test_a_port_proved_on_one_checkpoint_is_said_to_be_unproved_on_another(
    port: Port, checkpoint: Path, tmp_path: Path
) -> None:
    verify(Request(subject=str(port.folder), model=str(checkpoint), tp=(2,)))
    again = CliRunner().invoke(app, ["ledger", "--model", str(checkpoint), "--port", str(port.path)])
    assert "verified on real weights" in again.stderr
    write_checkpoint(tiny_config("llama"), tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    other = CliRunner().invoke(app, ["ledger", "--model", str(tmp_path / "other"), "--port", str(port.path)])
    assert "verified on other weights" in other.stderr

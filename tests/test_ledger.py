"""The weight ledger: what fits, what is excused and what is wrong is told from file headers alone."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from porter.cli import app
from porter.errors import CheckpointError
from porter.runtime.checkpoint import load_config
from porter.runtime.model_registry import load_port
from porter.verify.tiny import shrink, tiny_config, write_checkpoint
from porter.weights import Ledger, checkpoint_hashes, make_ledger, outline, read_headers

PORT = Path(__file__).parent / "models" / "handwritten_llama.py"
Weights = dict[str, torch.Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(tiny_config("llama"), folder)
    return folder


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Weights], None]], Path]:
    """The checkpoint with its tensors changed by a function."""

    def change(edit: Callable[[Weights], None]) -> Path:
        weights = load_file(checkpoint / "model.safetensors")
        edit(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
        return tmp_path

    return change


def ledger_of(folder: Path) -> Ledger:
    return make_ledger(load_port(PORT), load_config(folder), folder)


def test_a_whole_checkpoint_leaves_nothing_over(checkpoint: Path) -> None:
    ledger = ledger_of(checkpoint)
    assert ledger.problems == ()
    assert {line.status for line in ledger.lines} == {"used"}
    assert ledger.tie == "not tied: the config says so"
    target = {line.tensor: line.target for line in ledger.lines}[Q_PROJ]
    assert target == "model.layers.0.self_attn.qkv_proj.weight[q]"


def test_a_tied_head_needs_no_tensor(tmp_path: Path) -> None:
    write_checkpoint(shrink(tiny_config("llama"), tie_word_embeddings=True), tmp_path)
    ledger = ledger_of(tmp_path)
    assert (ledger.problems, ledger.tie) == ((), "tied: lm_head.weight not in the checkpoint")


Changed = Callable[[Callable[[Weights], None]], Path]


def test_a_missing_tensor_is_named(changed: Changed) -> None:
    folder = changed(lambda weights: weights.__delitem__(Q_PROJ))
    assert ledger_of(folder).problems == ("model.layers.0.self_attn.qkv_proj.weight[q] is filled by no tensor",)


def test_an_extra_tensor_is_named(changed: Changed) -> None:
    folder = changed(lambda weights: weights.update(stray=torch.zeros(3)))
    assert ledger_of(folder).problems == ("stray unexpected: no rule and no parameter of the port claims it",)


def test_a_misshapen_tensor_is_named_with_both_shapes(changed: Changed) -> None:
    folder = changed(lambda weights: weights.update({Q_PROJ: torch.zeros(3, 4)}))
    assert any("[64, 64], the checkpoint has [3, 4]" in problem for problem in ledger_of(folder).problems)


def test_a_tensor_that_comes_twice_is_named(changed: Changed) -> None:
    folder = changed(lambda weights: weights.update({Q_PROJ.removeprefix("model."): torch.zeros(64, 64)}))
    assert any("doubled" in problem for problem in ledger_of(folder).problems)


def test_a_second_name_is_excused_where_the_first_is_there(changed: Changed) -> None:
    folder = changed(lambda weights: weights.update({"old_head.weight": weights["lm_head.weight"].clone()}))
    port = type("Port", (load_port(PORT),), {})
    port.weight_rules = replace(port.weight_rules, renames={"old_head": "lm_head"})  # type: ignore[attr-defined]
    ledger = make_ledger(port, load_config(folder), folder)
    line = next(line for line in ledger.lines if line.tensor == "old_head.weight")
    assert (line.status, ledger.problems) == ("excused", ())
    assert line.why == "a second name of lm_head.weight, which is there"


def test_a_skipped_tensor_is_excused_by_its_rule(changed: Changed) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    ledger = ledger_of(changed(lambda weights: weights.update({name: torch.zeros(8)})))
    line = next(line for line in ledger.lines if line.tensor == name)
    assert (line.status, line.why, ledger.problems) == ("excused", "skipped by 'rotary_emb.inv_freq'", ())


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", struct.pack("<Q", 10**12) + b"{}", struct.pack("<Q", 4) + b"what", struct.pack("<Q", 2) + b"[]"],
    ids=["empty", "cut off", "huge header", "not json", "not a header"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        list(read_headers(tmp_path))


def test_a_file_cut_off_in_its_data_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="download it again"):
        list(read_headers(tmp_path))


def test_no_tensor_is_read(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    data = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(data[: 8 + length] + b"\xff" * (len(data) - 8 - length))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert ledger_of(tmp_path).problems == ()


def test_the_command_exits_1_when_something_is_left_over(checkpoint: Path, changed: Changed) -> None:
    run = CliRunner().invoke
    assert run(app, ["ledger", "--model", str(checkpoint), "--port", str(PORT)]).exit_code == 0
    folder = changed(lambda weights: weights.update(stray=torch.zeros(3)))
    result = run(app, ["ledger", "--model", str(folder), "--port", str(PORT), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["complete"]) == (1, False)


def test_the_table_fits_80_columns(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["ledger", "--model", str(checkpoint), "--port", str(PORT)])
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_config_that_lacks_a_field_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    port.write_text(PORT.read_text().replace("config.mlp_bias", "config.no_such_field"))
    result = CliRunner().invoke(app, ["ledger", "--model", str(checkpoint), "--port", str(port)])
    assert result.exit_code == 2
    assert "reads no_such_field, which this config does not have" in result.stderr


def test_a_hub_repository_needs_no_more_than_its_headers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot(name: str, allow_patterns: object) -> str:
        asked[name] = allow_patterns
        return str(checkpoint)

    tensors = {h.name: SimpleNamespace(dtype=h.dtype, shape=list(h.shape)) for h in read_headers(checkpoint)}
    files = {"model.safetensors": SimpleNamespace(tensors=tensors)}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: SimpleNamespace(files_metadata=files))
    found = outline("org/model")
    assert found.headers == tuple(read_headers(checkpoint))
    assert (found.folder, asked) == (checkpoint, {"org/model": "*.json"})


def test_hashes_tell_checkpoints_apart_without_reading_weights(changed: Changed, checkpoint: Path) -> None:
    before = checkpoint_hashes(checkpoint)
    after = checkpoint_hashes(changed(lambda weights: weights.update(stray=torch.zeros(3))))
    assert before["config"] == after["config"]
    assert before["checkpoint headers"] != after["checkpoint headers"]


def test_a_port_refuses_a_config_that_it_is_not_for(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    text = PORT.read_text()
    assert "    weight_rules = " in text
    port.write_text(text.replace("    weight_rules = ", "    requires = {'mlp_bias': True}\n    weight_rules = "))
    result = CliRunner().invoke(app, ["ledger", "--model", str(checkpoint), "--port", str(port)])
    assert (result.exit_code, result.stderr.count("error:")) == (2, 1)
    assert "is for configs with mlp_bias = True, this one has False" in result.stderr


def test_a_check_of_the_ports_own_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    port = tmp_path / "port.py"
    text = PORT.read_text()
    place = "        self.config = config\n"
    assert place in text
    guard = "        if config.hidden_size:\n            raise ValueError('no hidden size will do')\n"
    port.write_text(text.replace(place, place + guard))
    result = CliRunner().invoke(app, ["ledger", "--model", str(checkpoint), "--port", str(port)])
    assert result.exit_code == 2
    assert "refuses this config: no hidden size will do" in result.stderr

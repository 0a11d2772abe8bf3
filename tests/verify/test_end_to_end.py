"""Convert, then verify: installed files, code that lives with its checkpoint, and seeded mistakes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from porter.cli import app
from porter.manifest import read_port
from porter.verify.tiny import randomise, tiny_config, write_checkpoint

MODELS = Path(__file__).parents[1] / "models"
# Transformers 5 can't run a model that lists its tied weights as older ones do.
_TIED = (
    '_tied_weights_keys = ["lm_head.weight"]',
    '_tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}',
)


def porter(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of the installed modeling_qwen3.py."""
    folder = tmp_path_factory.mktemp("qwen3") / "port"
    assert porter("convert", "qwen3", "-o", folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(tiny_config("qwen3"), folder)
    return folder


def test_an_installed_modeling_file_becomes_a_verified_port(converted: Path, checkpoint: Path) -> None:
    result = porter("verify", converted, "--model", checkpoint, "--json")
    found = json.loads(result.stdout)
    checks = {check["name"]: check["status"] for case in found["cases"] for check in case["checks"]}
    assert set(checks) == {"ledger", "modules", "logits", "matrix", "greedy", "tp 2", "int8", "tp 2 processes"}
    assert (result.exit_code, set(checks.values())) == (0, {"PASS"})
    assert read_port(converted).verified


@pytest.mark.parametrize(
    ("before", "after", "module", "cause"),
    [
        ("self.head_dim**-0.5", "1.0", "model.layers.0.self_attn", "scale"),
        ('"gate_proj": 0, "up_proj": 1', '"gate_proj": 1, "up_proj": 0', "model.layers.0.mlp.gate_up_proj", "halves"),
        ("query_states = self.q_norm(", "query_states = (", "model.layers.0.self_attn", "q/k norms"),
    ],
    ids=["lost scale", "swapped gate and up", "lost norm of q"],
)
def test_a_mistake_in_a_port_is_found_where_it_is(
    converted: Path, checkpoint: Path, tmp_path: Path, before: str, after: str, module: str, cause: str
) -> None:
    port = tmp_path / "qwen3.py"
    text = read_port(converted).path.read_text()
    assert before in text
    port.write_text(text.replace(before, after))
    result = porter("verify", "--port", port, "--model", checkpoint)
    failure = result.stderr.splitlines()[-1]
    assert result.exit_code == 1
    assert failure.startswith("error: real weights: modules failed: first divergence at model.layers.0.")
    assert f"{module} (" in failure
    assert cause in failure.partition("look at: ")[2]


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where transformers copies code of checkpoints to; it takes one place in a process's life."""
    return str(tmp_path_factory.mktemp("modules"))


@pytest.fixture
def _remote_code(modules_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of the test's own for code that transformers copies, and names that older files ask for."""
    from transformers import dynamic_module_utils
    from transformers.utils import import_utils

    monkeypatch.setenv("HF_MODULES_CACHE", modules_cache)  # for tensor-parallel processes
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules_cache)
    monkeypatch.setattr(import_utils, "is_torch_fx_available", lambda: False, raising=False)
    file_utils = ModuleType("transformers.file_utils")
    vars(file_utils).update(add_start_docstrings=_undecorated, replace_return_docstrings=_undecorated)
    monkeypatch.setitem(sys.modules, file_utils.__name__, file_utils)


def _undecorated(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda decorated: decorated


def checkpoint_with_code(name: str, folder: Path) -> Path:
    """A random checkpoint of one of tests/models that brings its own modeling file, as on the hub."""
    folder.mkdir()
    for kind in ("configuration", "modeling"):
        text = (MODELS / name / f"{kind}_{name}.py").read_text()
        (folder / f"{kind}_{name}.py").write_text(text.replace(*_TIED))
    title = name.capitalize()
    auto_map = {
        "AutoConfig": f"configuration_{name}.{title}Config",
        "AutoModelForCausalLM": f"modeling_{name}.{title}ForCausalLM",
    }
    only_here = {"hidden_act": "silu", "qkv_bias": True, "pretraining_tp": 1} if name == "juniper" else {}
    (folder / "config.json").write_text(json.dumps({"model_type": name, "auto_map": auto_map, **only_here}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.architectures = [f"{title}ForCausalLM"]
    load: Callable[..., Any] = AutoModelForCausalLM.from_config
    model = load(config, trust_remote_code=True, attn_implementation="eager").float().eval()
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("_remote_code")
@pytest.mark.parametrize("name", ["acorn", "hazel", "juniper"])
def test_code_that_lives_with_its_checkpoint_ports(name: str, tmp_path: Path) -> None:
    folder = checkpoint_with_code(name, tmp_path / name)
    result = porter("verify", "--model", folder, "--trust-remote-code", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    statuses = {check["status"] for case in found["cases"] for check in case["checks"]}
    assert (result.exit_code, found["converted"], statuses) == (0, True, {"PASS"})

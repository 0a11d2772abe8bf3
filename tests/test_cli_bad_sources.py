"""What `porter convert` is given but can't port: one clear line, exit 2, nothing written."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter.cli import app

MODEL = Path(__file__).parent / "models" / "acorn" / "modeling_acorn.py"
ENCODER = """
from torch import nn
from transformers import PreTrainedModel


class AcornForMaskedLM(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(4, 4)

    def forward(self, input_ids):
        return self.head(input_ids)
"""
SOURCES = {
    "not Python": "this is not Python\n",
    "not text": b"\xff\xfe\x00\x01",
    "empty": "",
    "truncated": MODEL.read_text()[: len(MODEL.read_text()) // 2].rpartition("(")[0] + "(",
    "no causal language model": "import torch\n\n\nclass Layer(torch.nn.Module):\n    pass\n",
    "an encoder": ENCODER,
}


def assert_refused(tmp_path: Path, source: str) -> None:
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["convert", source, "-o", str(tmp_path / "out")])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert "; " in result.stderr  # what to do about it
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", SOURCES.values(), ids=SOURCES.keys())
def test_a_file_that_is_no_causal_language_model(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "modeling_acorn.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tmp_path, str(file))


@pytest.mark.parametrize("name", ["no_such_model_type", "vit", "no/such/file.py", "./no-such-folder"])
def test_a_name_that_leads_to_no_causal_language_model(tmp_path: Path, name: str) -> None:
    assert_refused(tmp_path, name)


@pytest.mark.parametrize(
    "config",
    [None, "{", {}, {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}],
    ids=["no config", "broken config", "empty config", "unknown architecture"],
)
def test_a_checkpoint_folder_that_leads_to_no_source(tmp_path: Path, config: object) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert_refused(tmp_path, str(folder))

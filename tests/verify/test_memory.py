"""What verification holds at a time: recorded outputs on disk, never more than the original and one port."""

from pathlib import Path

import pytest
import torch

from porter.manifest import Port, file_sha256, read_port, write_port
from porter.runtime.errors import MachineError
from porter.verify import memory
from porter.verify.checks import parallel
from porter.verify.memory import Spool
from porter.verify.request import Request
from porter.verify.run import default_checks, run_case, verify
from porter.verify.subject import Subject
from porter.verify.tiny import tiny_config, write_checkpoint

HANDWRITTEN = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
WHOLE_MODELS = {"reference", "model"}
TRACES = {"reference_run", "rounded_run", "port_run"}


@pytest.fixture
def port(tmp_path: Path) -> Port:
    manifest = {"architecture": "LlamaForCausalLM", "module": "llama.py", "module_sha256": file_sha256(HANDWRITTEN)}
    return write_port(tmp_path / "port", HANDWRITTEN.read_text(), manifest)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(tiny_config("llama"), folder)
    return folder


@pytest.mark.parametrize("chunk", [256, 2**30])
def test_a_spool_keeps_values_over_many_files(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", chunk)
    monkeypatch.setattr(memory, "_LOOSE", 300)
    keep = Spool()
    given = [torch.randn(i, 7).to(dtype) for i in (0, 1, 9, 40) for dtype in (torch.float32, torch.bfloat16)]
    given += [torch.arange(12).view(3, 4).T]
    kept = [keep(tensor) for tensor in given]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, given, strict=True))
    assert kept[-1].dtype == torch.int64


def test_what_a_spool_keeps_is_a_copy() -> None:
    tensor = torch.ones(3)
    kept = Spool()(tensor)
    tensor.zero_()
    assert kept.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_on_disk_is_verified_with_one_model_at_a_time_where_one_is_enough(
    dtype: str, port: Port, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, set[str]] = {}
    subjects: list[Subject] = []

    def spying(name: str, overrides: object, subject: Subject, told: object) -> object:
        subjects.append(subject)
        return run_case(name, {}, subject, lambda step: held.update({step: set(subject._made)}), default_checks)

    monkeypatch.setattr("porter.verify.run.run_case", spying)
    assert verify(Request(subject=str(port.path), model=str(checkpoint), dtype=dtype, tp=(2,))).passed
    at = {step.removeprefix("real weights: "): names for step, names in held.items()}
    assert not at["matrix"] & TRACES
    assert at["greedy"] & WHOLE_MODELS <= {"reference"}
    assert not (at["tp 2"] | at["int8"]) & WHOLE_MODELS


def test_a_machine_that_starts_no_process_does_not_make_a_port_wrong(
    port: Port, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(*args: object) -> None:
        raise MachineError("tensor-parallel rank 1 did not start in 300 s", "try again")

    monkeypatch.setattr(parallel, "check_processes", too_slow)
    result = verify(Request(subject=str(port.path), model=str(checkpoint)))
    assert (result.passed, result.failure) == (False, None)
    assert result.unproved is not None
    assert "did not start" in result.unproved[1].detail
    assert "verified" not in read_port(port.folder).manifest

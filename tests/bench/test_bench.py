"""porter bench: workloads are the same for all, figures are medians of alternating runs, bad input is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from porter.bench.compare import compare, latency, throughput
from porter.bench.plot import bar_chart
from porter.bench.profile import own_times
from porter.bench.workload import Workload, parse_range
from porter.cli import app
from porter.errors import UsageError

WORK = Workload(3, (4, 9), (2, 5), 0.0, 7)


class FakeSide:
    """Takes so many seconds for each output token, and 1 for each run."""

    start: dict[str, Any] = {"start_seconds": 1.0, "kv_tokens": None}  # noqa: RUF012

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, iter(seconds), log

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        self.log.append(self.name)
        return {"seconds": 1.0 + next(self.seconds) * sum(order["outputs"]), "side": self.name}


def test_lengths_are_drawn_from_the_ranges_and_repeat() -> None:
    lengths = Workload(200, (4, 9), (2, 5), 0.0, 7).lengths()
    assert {n for n, _ in lengths} == set(range(4, 10))
    assert {n for _, n in lengths} == set(range(2, 6))
    assert lengths[:3] == WORK.lengths()
    assert Workload(3, (4, 9), (2, 5), 0.0, 8).lengths() != WORK.lengths()


@pytest.mark.parametrize(("text", "expected"), [("5", (5, 5)), ("100:1024", (100, 1024))])
def test_ranges(text: str, expected: tuple[int, int]) -> None:
    assert parse_range(text, "--input-len") == expected


@pytest.mark.parametrize("text", ["", "0", "9:4", "a", "-1", "1:2:3"])
def test_bad_ranges_are_told(text: str) -> None:
    with pytest.raises(UsageError, match="--input-len"):
        parse_range(text, "--input-len")


def test_sides_alternate_and_are_compared_by_their_medians() -> None:
    log: list[str] = []
    sides: Any = [FakeSide("porter", [9, 1, 2, 3], log), FakeSide("hf", [9, 5, 4, 4], log)]
    rows = compare(sides, throughput(WORK), 3, lambda step: None)
    assert log == ["porter", "hf"] * 4
    num_out = sum(n for _, n in WORK.lengths())
    seconds = rows[0]["figures"]["seconds"]
    assert seconds["values"] == [1 + n * num_out for n in (1, 2, 3)]
    assert seconds["spread"] == pytest.approx(2 * num_out / (1 + 2 * num_out))
    assert rows[0]["figures"]["output_tokens_per_s"]["median"] == num_out / (1 + 2 * num_out)
    assert rows[1]["ratio_of_first"]["output_tokens_per_s"] == (1 + 4 * num_out) / (1 + 2 * num_out)


def test_latency_tells_the_first_token_from_the_others() -> None:
    side: Any = FakeSide("porter", [0.5] * 4, [])
    (row,) = compare([side], latency(Workload(1, (8, 8), (5, 5), 0.0, 0)), 1, lambda step: None)
    assert row["figures"]["first_token_ms"]["median"] == 1500
    assert row["figures"]["ms_per_token"]["median"] == 500


def test_a_kernel_that_waits_for_another_is_not_charged_for_it() -> None:
    spans = [("a", 0.0, 4.0), ("b", 1.0, 6.0), ("a", 6.0, 7.0), ("c", 9.0, 10.0)]
    assert own_times(spans) == {"a": 5.0, "b": 2.0, "c": 1.0}


def test_a_chart_has_a_bar_for_each_engine() -> None:
    rows = [
        {"side": name, "figures": {"x": {"median": n, "values": [n, n + 1]}}} for name, n in (("a&b", 3), ("hf", 6))
    ]
    chart = bar_chart("m", rows, "x")
    assert chart.count("<rect") == 2
    assert "a&amp;b" in chart


def test_throughput_against_transformers(tmp_path: Path, tiny_llama_folder: Callable[[], Path]) -> None:
    output, plot = tmp_path / "r.json", tmp_path / "r.svg"
    port = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
    options = ["--num-prompts", "3", "--input-len", "3:5", "--output-len", "2:4", "--repeats", "1", "--device", "cpu"]
    arguments = ["bench", "throughput", str(tiny_llama_folder()), "--port", str(port), "--against", "hf", *options]
    result = CliRunner().invoke(app, [*arguments, "--load-format", "dummy", "-o", str(output), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert [row["side"] for row in report["sides"]] == ["porter", "hf"]
    tokens = report["sides"][0]["kv_tokens"]
    assert tokens > 0
    assert f"its KV cache holds {tokens:,} tokens" in " ".join(result.output.split())
    assert all(
        f"{row['side']}: at most {row['peak_host_bytes'] / 1e9:.1f} GB on the host" in result.output
        for row in report["sides"]
    )
    assert report["sides"][1]["ratio_of_first"]["output_tokens_per_s"] > 0
    assert plot.read_text().startswith("<svg")


def test_the_profile_of_a_decode_step(tmp_path: Path, tiny_llama_folder: Callable[[], Path]) -> None:
    output = tmp_path / "p.json"
    port = Path(__file__).parents[1] / "models" / "handwritten_llama.py"
    arguments = ["bench", "profile", str(tiny_llama_folder()), "--port", str(port), "--device", "cpu"]
    result = CliRunner().invoke(
        app, [*arguments, "--batch", "2", "--context", "9", "--dtype", "float16", "-o", str(output)]
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(output.read_text())["sides"]
    # 2 layers of q, k, v, o, gate, up and down, and a head of 96 rows, in float16; keys and values of 2 heads of 8
    weights = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 96 * 32
    # (norms add a little)
    assert row["floors"]["bytes_read"] == pytest.approx(2 * weights + 2 * 9 * 2 * 2 * 2 * 8 * 2, rel=0.02)
    assert row["floors"]["flops"] == pytest.approx(2 * 2 * weights, rel=0.02)
    assert row["step_ms"] > row["floor_ms"] > 0
    assert row["kernels"]


@pytest.mark.parametrize(
    "options",
    [["--against", "nothing"], ["--load-format", "x"], ["--port", "/nowhere"], ["--output-len", "1"]],
    ids=str,
)
def test_bad_options_are_one_line_and_exit_code_2(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "latency", "model", *options])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1

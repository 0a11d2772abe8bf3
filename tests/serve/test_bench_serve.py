"""The load generator, against a real server and on made-up times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porter.bench.serve import Call, Load, arrivals, prompts, summary


def command(server: Any, *options: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "porter", "bench", "serve", "--base-url", server.url, *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_it_measures_a_server(server: Any, tmp_path: Path) -> None:
    load = ("--num-prompts", "6", "--request-rate", "50", "--input-len", "5", "--prefix-len", "20", "--output-len", "9")
    done = command(server, *load, "--api-key", "a-secret", "--output", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["completed"] == 6
    assert found["output_tokens"] == 54
    assert found["output_tokens_per_s"] == pytest.approx(54 / found["seconds"], rel=0.01)
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"]
    assert "a-secret" not in json.dumps(found)


def test_a_server_that_refuses_is_told(server: Any) -> None:
    assert command(server, "--num-prompts", "1").returncode == 2
    failed = command(server, "--num-prompts", "1", "--api-key", "a-secret", "--output-len", "9000", "--json")
    assert failed.returncode == 1
    assert "context length" in json.loads(failed.stdout)["errors"][0]


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff(arrivals(Load("", num_prompts=4000, request_rate=20.0)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)
    assert arrivals(Load("", num_prompts=2)) == [0.0, 0.0]


def test_prompts_share_their_start_and_nothing_else() -> None:
    texts = prompts(Load("", num_prompts=3, prefix_len=10, input_len=10))
    words = [text.split() for text in texts]
    assert words[0][:10] == words[1][:10] == words[2][:10]
    assert words[0][10:] != words[1][10:]


def test_good_requests_meet_both_limits() -> None:
    quick = Call(0.0, [0.1, 0.2, 0.3], 5, 3)
    late = Call(0.0, [2.0, 2.1, 2.2], 5, 3)
    slow = Call(0.0, [0.1, 1.1, 2.1], 5, 3)
    lost = Call(0.0, [0.1], 5, 1, "gone")
    found = summary(Load("", goodput_ttft=1000, goodput_tpot=200), [quick, late, slow, lost], 2.0)
    assert found["goodput_requests_per_s"] == 0.5
    assert found["failed"] == 1
    assert found["tpot_ms"]["p50"] == 100
    assert found["inter_token_ms"]["mean"] == pytest.approx((4 * 100 + 2 * 1000) / 6, abs=0.01)

"""A server under its users: too many of them, those that leave, those that do not read; and a server that is killed."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import psutil  # type: ignore[import-untyped]
import pytest

from porter.runtime.engine import LLM, SamplingParams

# More tokens than the test waits for, so that what is open stays open
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 3900, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def small(launch: Callable[..., Any]) -> Any:
    """Two samples run, two may wait; small bodies; few blocks."""
    return launch(
        *("--max-num-seqs", "2", "--max-queued-requests", "2", "--max-body-bytes", "20000"),
        *("--num-gpu-blocks-override", "300", "--no-enable-prefix-caching"),
    )


def is_idle(metrics: dict[str, float]) -> bool:
    return metrics["num_requests_running"] == metrics["num_requests_waiting"] == metrics["kv_cache_usage_perc"] == 0


def test_a_full_queue_is_429_and_those_who_leave_make_room(small: Any) -> None:
    with small.openai() as client:
        streams = [client.completions.create(stream=True, **LONG) for _ in range(4)]
        busy = small.eventually(lambda metrics: metrics["num_requests_running"] == 2)
        assert busy["num_requests_waiting"] == 2
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**LONG)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True)
        for stream in streams:
            stream.close()
        small.eventually(is_idle)
        assert small.metrics()["request_aborted_total"] >= 4
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].text


def test_more_than_the_server_ever_holds_is_400(small: Any) -> None:
    with small.openai() as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", n=5)


def test_who_leaves_before_the_answer_frees_its_blocks(small: Any) -> None:
    with small.http() as http, pytest.raises(httpx2.TimeoutException):
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4000, "ignore_eos": True}, timeout=0.5)
    small.eventually(is_idle)


def test_a_slow_reader_holds_up_nobody(small: Any) -> None:
    address = urlsplit(small.url)
    body = json.dumps({"prompt": "a", "max_tokens": 3900, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-secret\r\nContent-Length: {len(body)}"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((address.hostname, address.port))
        slow.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
        with small.openai() as client:
            for _ in range(5):
                assert client.completions.create(model="tiny", prompt="a", max_tokens=5).choices
            # The engine finishes the long answer though nobody reads it
            small.eventually(is_idle, timeout=60)
    small.eventually(is_idle)


@pytest.mark.slow
def test_no_token_is_lost_or_doubled_when_blocks_run_out(launch: Callable[..., Any], offline: LLM) -> None:
    tight = launch("--max-model-len", "512", "--num-gpu-blocks-override", "40", "--max-num-seqs", "16")

    def streamed(seed: int) -> str:
        with tight.openai() as client:
            options: Any = {"max_tokens": 200, "seed": seed, "extra_body": {"ignore_eos": True}}
            stream = client.completions.create(model="tiny", prompt="Once upon", stream=True, **options)
            return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(streamed, range(12)))
    params = [SamplingParams(max_tokens=200, seed=seed, ignore_eos=True) for seed in range(12)]
    expected = offline.generate(["Once upon"] * 12, params, use_tqdm=False)
    assert found == [output.outputs[0].text for output in expected]
    assert tight.metrics()["num_preemptions_total"] > 0
    tight.eventually(is_idle)
    assert tight.stop() == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_413(small: Any, declared: bool) -> None:
    content = b'{"prompt": "' + b"a" * 30000 + b'"}'
    pieces = content if declared else iter([content[:15000], content[15000:]])
    with small.http() as http:
        found = http.post("/v1/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert found.status_code == 413
    assert found.json()["error"]["code"] == "body_too_large"


def test_a_dead_engine_is_told_to_all_and_comes_back(small: Any, offline: LLM) -> None:
    with small.openai() as client, small.http() as http:
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(client.completions.create, **LONG)
            small.eventually(lambda metrics: metrics["num_requests_running"] == 2)
            small.engine().kill()
            with pytest.raises(openai.APIError, match="engine failed"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="engine failed"):
                whole.result()
        assert http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as early:
            client.completions.create(model="tiny", prompt="a")
        assert early.value.status_code == 503
        assert "Retry-After" in early.value.response.headers
        small.eventually(lambda _: http.get("/health").status_code == 200, timeout=60)
        again = client.completions.create(model="tiny", prompt="Once", max_tokens=10, temperature=0)
        params = SamplingParams(temperature=0.0, max_tokens=10)
        assert again.choices[0].text == offline.generate("Once", params, use_tqdm=False)[0].outputs[0].text
        assert is_idle(small.metrics())


@pytest.mark.slow
def test_sigterm_lets_open_requests_finish(launch: Callable[..., Any]) -> None:
    server = launch()
    engine = server.engine()
    with server.openai() as client, server.http() as http:
        http.get("/health")
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        engine.send_signal(signal.SIGTERM)  # as to a whole group
        deadline = time.monotonic() + 10
        while http.get("/health").status_code == 200:
            assert time.monotonic() < deadline
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model="tiny", prompt="a")
        assert list(stream)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
    assert not engine.is_running()


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_told(launch: Callable[..., Any]) -> None:
    server = launch("--shutdown-timeout", "0.2")
    with server.openai() as client:
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert server.process.wait(30) == 0


@pytest.mark.slow
def test_an_engine_that_keeps_dying_ends_the_server(launch: Callable[..., Any]) -> None:
    server = launch("--max-restarts", "0")
    server.engine().kill()
    assert server.process.wait(30) == 1


@pytest.mark.slow
def test_the_engine_goes_with_its_server(launch: Callable[..., Any]) -> None:
    server = launch()
    engine = server.engine()
    server.process.kill()
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running()


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_engine_along_and_both_come_back(launch: Callable[..., Any]) -> None:
    server = launch("--tensor-parallel-size", "2")
    [rank] = [child for child in server.engine().children() if any("spawn_main" in word for word in child.cmdline())]
    with server.openai() as client, server.http() as http:
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        rank.kill()
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)
        server.eventually(lambda _: http.get("/health").status_code == 200, timeout=90)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=3).choices
    assert server.stop() == 0


@pytest.mark.slow
def test_a_start_that_can_not_succeed_is_one_line(launch: Callable[..., Any], small: Any, tmp_path: Path) -> None:
    taken = launch(port=urlsplit(small.url).port, wait=False)
    assert taken.process.wait(60) == 2
    assert "can't listen" in taken.log.read_text()
    nothing = launch(model=str(tmp_path), wait=False)
    assert nothing.process.wait(60) == 2
    assert "config.json" in nothing.log.read_text()
    too_long = launch("--max-model-len", "9999", wait=False)
    assert too_long.process.wait(60) == 2
    for server in (taken, nothing, too_long):
        assert "Traceback" not in server.log.read_text()
        assert len(server.log.read_text().splitlines()) == 1


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from porter.cli import app; assert not {'torch', 'fastapi', 'zmq'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

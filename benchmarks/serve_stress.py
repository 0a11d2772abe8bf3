"""A server under what users do to it: many streams at once, its engine killed under them, requests that are none.

    python benchmarks/serve_stress.py TOKENIZER_FOLDER PORT [--streams 512] [--kills 3]

The model is that of serve_soak.py. Every stream has to end in full; of the requests that are open when the engine is
killed, each has to end in an error of the API or in full, and the same request has to get the same answer afterwards;
no request that makes no sense may get an answer of 500 and above. Exit code 1 if anything is lost.
"""

import argparse
import asyncio
import json
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from serve_soak import RESULTS, make_checkpoint, metrics, start

from porter import __version__

TOKENS = 48
BODIES: tuple[Any, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 20_000,
    {},
    {"prompt": None},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [-1]},
    {"prompt": [10**12]},
    {"prompt": {"a": 1}},
    {"prompt": "x" * 100_000},
    *({"prompt": "a", "max_tokens": value} for value in (-1, 0.5, "many", 10**9, None, True)),
    *({"prompt": "a", "temperature": value} for value in (-1, "hot", 1e400, [1])),
    *({"prompt": "a", "n": value} for value in (0, -3, 10**6)),
    *({"prompt": "a", "stop": value} for value in ([""], 3, ["a"] * 1000)),
    *({"prompt": "a", "logprobs": value} for value in (-2, 10**6, "all")),
    {"prompt": "a", "top_p": 2},
    {"prompt": "a", "top_k": -7},
    {"prompt": "a", "best_of": 4},
    {"prompt": "a", "seed": "s"},
    {"prompt": "a", "stream": "perhaps"},
    {"prompt": "a", "stream_options": {"include_usage": True}},
    {"prompt": "a", "model": "../../etc/passwd"},
    {"prompt": "a", "suffix": "b"},
    {"messages": [{"role": "user", "content": "a"}]},
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("port", type=Path, help="a port of Llama")
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_stress.json")
    return parser.parse_args()


async def stream(session: aiohttp.ClientSession, url: str, seed: int) -> tuple[str, str]:
    """How a stream ended ("whole", "error" or "cut") and its text."""
    body = {"prompt": f"one of {seed}", "max_tokens": TOKENS, "seed": seed, "stream": True, "ignore_eos": True}
    text, end = "", "cut"
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return "error", ""
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    end = "error" if "error" in piece else end
                    text += "" if "error" in piece else piece["choices"][0]["text"]
                elif line.startswith(b"data: [DONE]"):
                    end = "whole" if end == "cut" else end
    except aiohttp.ClientError:
        return "cut", text
    return end, text


async def many_streams(session: aiohttp.ClientSession, url: str, number: int) -> dict[str, Any]:
    """All at once, all read to their ends."""
    began = time.perf_counter()
    opened = [asyncio.create_task(stream(session, url, seed)) for seed in range(number)]
    held = 0.0
    while not all(task.done() for task in opened):
        now = await metrics(url)
        held = max(held, now["num_requests_running"] + now["num_requests_waiting"])
        await asyncio.sleep(0.2)
    ends = Counter(task.result()[0] for task in opened)
    return {"opened": number, "held_at_once": int(held), **ends, "seconds": round(time.perf_counter() - began, 1)}


async def kills(session: aiohttp.ClientSession, url: str, server: psutil.Process, number: int) -> list[dict[str, Any]]:
    """Kill the engine under 32 open streams, so many times."""
    _, before = await stream(session, url, 0)
    return [await kill(session, url, server, before) for _ in range(number)]


async def kill(session: aiohttp.ClientSession, url: str, server: psutil.Process, before: str) -> dict[str, Any]:
    opened = [asyncio.create_task(stream(session, url, seed)) for seed in range(32)]
    while (await metrics(url))["num_requests_running"] < 16:
        await asyncio.sleep(0.01)
    engine = next(child for child in server.children() if any("spawn_main" in word for word in child.cmdline()))
    engine.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    ends = Counter([(await task)[0] for task in opened])
    while (await stream(session, url, 0)) != ("whole", before):
        if time.perf_counter() - began > 60:
            return {**ends, "same_answer_after_s": None}
        await asyncio.sleep(0.1)
    return {**ends, "same_answer_after_s": round(time.perf_counter() - began, 1)}


async def nonsense(session: aiohttp.ClientSession, url: str) -> dict[str, int]:
    """Statuses of requests that make no sense, at two endpoints."""
    statuses: Counter[str] = Counter()
    for path in ("completions", "chat/completions"):
        for body in BODIES:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{url}/v1/{path}", data=data, headers=headers) as answer:
                statuses[str(answer.status)] += 1
                await answer.read()
    return dict(sorted(statuses.items()))


async def stress(url: str, server: psutil.Process, args: argparse.Namespace) -> dict[str, Any]:
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(300)}
    async with aiohttp.ClientSession(**limits) as session:
        streams = await many_streams(session, url, args.streams)
        killed = await kills(session, url, server, args.kills)
        statuses = await nonsense(session, url)
        _, after = await stream(session, url, 0)
        counts = await metrics(url)
    left = [counts[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
    lost = args.streams - streams.get("whole", 0) + sum(each.get("cut", 0) for each in killed)
    wrong = sum(each["same_answer_after_s"] is None for each in killed) + any(s >= "500" for s in statuses)
    return {
        "streams": streams,
        "kills": killed,
        "nonsense_statuses": statuses,
        "running_waiting_and_blocks_left": left,
        "passed": not lost and not wrong and not any(left) and bool(after),
    }


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(args.tokenizer, folder)
        server, url = start(folder, args.port, folder / "log")
        try:
            found = asyncio.run(stress(url, psutil.Process(server.pid), args))
        finally:
            server.terminate()
            server.wait(60)
    versions = {"porter": __version__, "torch": torch.__version__, "python": platform.python_version()}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"benchmark": "serve_stress", "command": " ".join(["python", *sys.argv]), "date": date}
    result = {**head, **found, "versions": versions}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()

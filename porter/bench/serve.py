"""`porter bench serve`: many streamed requests to any OpenAI server, and how long their tokens took."""

import asyncio
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from porter import console
from porter.errors import UsageError

# Most tokenizers read each of these, with the space before it, as one token
_WORDS = (
    "the of and to in is that it was for on are as with his they at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many"
)
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is sent: `input_len` and `prefix_len` are words, `output_len` tokens, goodput limits milliseconds."""

    base_url: str
    model: str | None = None
    api_key: str = ""
    num_prompts: int = 200
    request_rate: float = math.inf
    max_concurrency: int | None = None
    input_len: int = 128
    prefix_len: int = 0
    output_len: int = 64
    goodput_ttft: float = 1000.0
    goodput_tpot: float = 100.0
    seed: int = 0


@dataclass
class Call:
    """One request: `times` of its pieces of text in seconds of a clock that all share."""

    start: float
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / max(self.output_tokens - 1, 1)


def run(load: Load, save: Path | None, as_json: bool) -> int:
    """Send the load, print and save what was measured; returns the exit code."""
    try:
        import aiohttp  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("porter bench serve needs aiohttp", 'pip install "porter-lm[serve]"') from None
    with console.working(f"loading {load.base_url}"):
        calls, seconds = asyncio.run(_send_all(load))
    result = summary(load, calls, seconds)
    if save is not None:
        save.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(result)
    else:
        console.table("", ("what", "value"), [(name, _shown(value)) for name, value in result.items()])
    return int(result["failed"] > 0)


def prompts(load: Load) -> list[str]:
    """The texts to send: a shared start, then words of their own."""
    chance, words = random.Random(load.seed), _WORDS.split()
    prefix = [chance.choice(words) for _ in range(load.prefix_len)]
    own = [[chance.choice(words) for _ in range(load.input_len)] for _ in range(load.num_prompts)]
    return [" ".join([*prefix, *each]) for each in own]


def arrivals(load: Load) -> list[float]:
    """Seconds after the start at which each request is sent: exponential gaps, or all at 0."""
    if math.isinf(load.request_rate):
        return [0.0] * load.num_prompts
    gaps = np.random.default_rng(load.seed).exponential(1 / load.request_rate, load.num_prompts)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def summary(load: Load, calls: list[Call], seconds: float) -> dict[str, Any]:
    """The figures: rates a second, times in milliseconds; a good request meets both goodput limits."""
    done = [call for call in calls if call.error is None and call.times]
    gaps = [1e3 * gap for call in done for gap in np.diff(call.times).tolist()]
    good = sum(1e3 * call.ttft <= load.goodput_ttft and 1e3 * call.tpot <= load.goodput_tpot for call in done)
    errors = sorted({call.error for call in calls if call.error is not None})
    return {
        **{name: value for name, value in asdict(load).items() if name != "api_key" and value != math.inf},
        "completed": len(done),
        "failed": len(calls) - len(done),
        "errors": errors[:5],
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(call.prompt_tokens for call in done),
        "output_tokens": sum(call.output_tokens for call in done),
        "requests_per_s": round(len(done) / seconds, 3),
        "output_tokens_per_s": round(sum(call.output_tokens for call in done) / seconds, 2),
        "goodput_requests_per_s": round(good / seconds, 3),
        "ttft_ms": _percentiles([1e3 * call.ttft for call in done]),
        "tpot_ms": _percentiles([1e3 * call.tpot for call in done]),
        "inter_token_ms": _percentiles(gaps),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {f"p{q}": round(float(np.percentile(values, q)), 2) for q in _PERCENTILES}
    return {"mean": round(float(np.mean(values)), 2), **found}


async def _send_all(load: Load) -> tuple[list[Call], float]:
    import aiohttp

    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        model = load.model or await _first_model(session, load.base_url)
        gate = asyncio.Semaphore(load.max_concurrency or load.num_prompts)
        start = time.perf_counter()

        async def send(prompt: str, at: float) -> Call:
            await asyncio.sleep(start + at - time.perf_counter())
            async with gate:
                return await _send(session, load, model, prompt)

        calls = await asyncio.gather(*map(send, prompts(load), arrivals(load)))
        return calls, time.perf_counter() - start


async def _first_model(session: Any, base_url: str) -> str:
    import aiohttp

    try:
        async with session.get(f"{base_url}/v1/models") as answer:
            return str((await answer.json())["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{base_url} does not list its models ({reason})", "check --base-url and --api-key") from None


async def _send(session: Any, load: Load, model: str, prompt: str) -> Call:
    import aiohttp

    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    call = Call(time.perf_counter())
    try:
        async with session.post(f"{load.base_url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                call.error = f"status {answer.status}: {(await answer.text())[:200]}"
                return call
            async for line in answer.content:
                _take(call, line.strip())
    except (aiohttp.ClientError, TimeoutError) as error:
        call.error = f"{type(error).__name__}: {error}"
    if call.error is None and call.output_tokens != load.output_len:
        call.error = f"{call.output_tokens} tokens came, {load.output_len} were asked for"
    return call


def _take(call: Call, line: bytes) -> None:
    """Note what one line of the stream says."""
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return
    data = json.loads(line[6:])
    if "error" in data:
        call.error = str(data["error"])
    if data.get("choices") and data["choices"][0].get("text"):
        call.times.append(time.perf_counter())
    if data.get("usage"):
        call.prompt_tokens = data["usage"]["prompt_tokens"]
        call.output_tokens = data["usage"]["completion_tokens"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {number}" for name, number in value.items())
    return str(value)

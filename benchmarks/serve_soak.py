"""Many short requests to a server, some cut off by their client: nothing may grow, leak, get lost or differ.

    python benchmarks/serve_soak.py TOKENIZER_FOLDER PORT [--requests 10000] [--concurrency 64]

A random Llama of two layers with that tokenizer is served by PORT. Every finished answer is compared with what the
same engine answers offline for the same prompt and seed. Float32 rounds otherwise in batches of another size, so a
draw that falls on the edge between two tokens may take the other one: an answer that differs is explained if its first
differing token was drawn within 1e-5 of such an edge, and nothing may differ unexplained. Resident memory is read after
every hundredth of the requests; the first tenth warms up (buffers of the largest batch, the tokenizer's cache), and
nothing read later may be more than 3 % above what is resident then. The result goes to
benchmarks/results/serve_soak.json; exit code 1 if anything is wrong.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from porter import __version__
from porter.kernels.draw_tokens import draw_tokens
from porter.runtime import sampling
from porter.runtime.engine import LLM, SamplingParams

RESULTS = Path(__file__).parent / "results"
MOST_GROWTH = 0.03
READINGS = 100
TEMPERATURE = 1.0
TIE = 1e-5  # of probability; a few units of rounding of a float32 logit
WORDS = "the of and to in is that it was for on are as with his they at be this have from or one had by"


@dataclass
class Ask:
    """One request; `leaves_after` is seconds or pieces after which its client goes away, None for never."""

    prompt: str
    max_tokens: int
    seed: int
    stream: bool
    leaves_after: float | None
    text: str | None = None
    error: str | None = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("port", type=Path, help="a port of Llama")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_soak.json")
    return parser.parse_args()


def make_checkpoint(tokenizer_folder: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)


def asks(number: int) -> list[Ask]:
    chance = random.Random(0)
    made = []
    for seed in range(number):
        prompt = " ".join(chance.choice(WORDS.split()) for _ in range(chance.randint(1, 40)))
        stream = chance.random() < 0.4
        leaves = (chance.randint(0, 3) if stream else chance.random() * 0.2) if chance.random() < 0.2 else None
        made.append(Ask(prompt, chance.randint(1, 24), seed, stream, leaves))
    return made


async def send(session: aiohttp.ClientSession, url: str, ask: Ask) -> None:
    body = {"prompt": ask.prompt, "max_tokens": ask.max_tokens, "seed": ask.seed, "stream": ask.stream}
    body["temperature"] = TEMPERATURE
    limit = ask.leaves_after if ask.leaves_after is not None and not ask.stream else None
    try:
        async with asyncio.timeout(limit), session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                ask.error = f"status {answer.status}"
            elif ask.stream:
                ask.text = await read_stream(answer, ask)
            else:
                ask.text = (await answer.json())["choices"][0]["text"]
    except TimeoutError:
        return


async def read_stream(answer: aiohttp.ClientResponse, ask: Ask) -> str | None:
    text, pieces = "", 0
    async for line in answer.content:
        if line.startswith(b"data: {"):
            data = json.loads(line[6:])
            if "error" in data:
                ask.error = str(data["error"])
            text += data["choices"][0]["text"]
            pieces += 1
        if ask.leaves_after is not None and pieces > ask.leaves_after:
            answer.close()
            return None
    return text


async def soak(url: str, every: list[Ask], concurrency: int, processes: list[psutil.Process]) -> list[list[int]]:
    """Send all; returns the resident bytes of each process, READINGS times."""
    memory: list[list[int]] = []
    done = 0
    waiting = iter(every)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def work() -> None:
            nonlocal done
            for ask in waiting:
                await send(session, url, ask)
                done += 1
                if done % max(len(every) // READINGS, 1) == 0:
                    memory.append([process.memory_info().rss for process in processes])

        await asyncio.gather(*(work() for _ in range(concurrency)))
        await asyncio.sleep(1)
    return memory


async def metrics(url: str) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
    return {name.removeprefix("porter_"): float(value) for name, value in pairs}


def start(folder: Path, port: Path, log: Path) -> tuple["subprocess.Popen[bytes]", str]:
    script = folder / "serve_port.py"
    script.write_text(
        "import runpy\nfrom porter.runtime.model_registry import ModelRegistry, load_port\n"
        f"ModelRegistry.register_model('LlamaForCausalLM', load_port({str(port.resolve())!r}))\n"
        "runpy.run_module('porter.serve', run_name='__main__')\n"
    )
    options = ["--port", "0", "--num-gpu-blocks-override", "300", "--max-num-seqs", "48", "--device", "cpu"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, str(script), str(folder), *options], stderr=stderr)
    while not (found := re.search(r" at (http://\S+)/v1", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return process, found.group(1)


def differing(folder: Path, port: Path, every: list[Ask]) -> tuple[int, int]:
    """How many finished answers are not the offline one, and how many of them no tie explains."""
    llm = LLM(folder, port=port, device="cpu", max_num_seqs=48)
    finished = [ask for ask in every if ask.text is not None]
    outputs = llm.generate([ask.prompt for ask in finished], [params(ask) for ask in finished], use_tqdm=False)
    pairs = zip(finished, (output.outputs[0] for output in outputs), strict=True)
    different = [(ask, answer.text, answer.token_ids) for ask, answer in pairs if answer.text != ask.text]
    return len(different), sum(not tied(llm, *each) for each in different)


def params(ask: Ask) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, max_tokens=ask.max_tokens, seed=ask.seed)


def tied(llm: LLM, ask: Ask, text: str, token_ids: Sequence[int]) -> bool:
    """Whether the first token by which served and offline text differ was drawn on an edge, when asked for alone."""
    assert ask.text is not None
    same = next(
        (i for i, (a, b) in enumerate(zip(ask.text, text, strict=False)) if a != b), min(len(ask.text), len(text))
    )
    tokenizer = llm.llm_engine.tokenizer
    assert tokenizer is not None
    first = max(i for i in range(len(token_ids)) if len(tokenizer.decode(list(token_ids[:i]))) <= same)
    with recorded_margins() as margins:
        alone = llm.generate(ask.prompt, params(ask), use_tqdm=False)[0].outputs[0].token_ids
    return list(alone[:first]) == list(token_ids[:first]) and first < len(margins) and margins[first] < TIE


@contextmanager
def recorded_margins() -> Iterator[list[float]]:
    """How far each draw of a single sequence was from the next edge between two tokens, as probability."""
    margins: list[float] = []

    def recording(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        token = draw_tokens(logits, temperature, uniform)
        edges = (logits[0].double() / temperature[0].double()).softmax(-1).cumsum(-1)
        near = edges[max(int(token[0]) - 1, 0) : int(token[0]) + 1]
        margins.append(float((near - uniform[0].double()).abs().min()))
        return token

    with mock.patch.object(sampling, "draw_tokens", recording):
        yield margins


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(args.tokenizer, folder)
        server, url = start(folder, args.port, folder / "log")
        http = psutil.Process(server.pid)
        engine = next(child for child in http.children() if any("spawn_main" in word for word in child.cmdline()))
        every = asks(args.requests)
        began = time.perf_counter()
        memory = asyncio.run(soak(url, every, args.concurrency, [http, engine]))
        seconds = time.perf_counter() - began
        counts = asyncio.run(metrics(url))
        server.terminate()
        code = server.wait(60)
        different, unexplained = differing(folder, args.port, every)
    result = report(args, every, memory, counts, (different, unexplained), seconds, code)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if not key.startswith("resident")}, indent=2))
    sys.exit(0 if result["passed"] else 1)


def report(
    args: argparse.Namespace,
    every: list[Ask],
    memory: list[list[int]],
    counts: dict[str, float],
    different: tuple[int, int],
    seconds: float,
    code: int,
) -> dict[str, Any]:
    warm = memory[len(memory) // 10 :]
    growth = [round(max(read) / read[0] - 1, 4) for read in zip(*warm, strict=True)]
    left = [counts[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
    errors = sorted({ask.error for ask in every if ask.error is not None})
    unanswered = sum(ask.leaves_after is None and ask.text is None for ask in every)
    passed = not errors and not any(left) and not different[1] and not unanswered and code == 0
    return {
        "benchmark": "serve_soak",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": args.requests,
        "concurrency": args.concurrency,
        "temperature": TEMPERATURE,
        "finished": sum(ask.text is not None for ask in every),
        "left_by_client": sum(ask.text is None for ask in every) - unanswered,
        "aborts_seen_by_server": counts["request_aborted_total"],
        "preemptions": counts["num_preemptions_total"],
        "unanswered": unanswered,
        "errors": errors,
        "differing_from_offline": different[0],
        "differing_unexplained": different[1],
        "running_waiting_and_blocks_left": left,
        "resident_mib_http": [round(http / 2**20, 1) for http, _ in memory],
        "resident_mib_engine": [round(engine / 2**20, 1) for _, engine in memory],
        "growth_http_engine": growth,
        "seconds": round(seconds, 1),
        "exit_code_after_sigterm": code,
        "passed": passed and max(growth) <= MOST_GROWTH,
        "versions": {"porter": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "processors": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()

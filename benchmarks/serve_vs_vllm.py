"""The same load on porter's server and on vLLM's, one after the other, each server alone on the machine.

    python benchmarks/serve_vs_vllm.py MODEL --vllm VLLM_SCRIPT [--rounds 1] [--concurrency 32] [--dtype float32]

MODEL is a checkpoint folder whose architecture has a registered port. The load is `porter bench serve`: so many clients
that each send the next prompt when the last one is answered. Prefix caches are off. Every round goes to
benchmarks/results/serve_vs_vllm.json, the servers' versions with it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--vllm", required=True, help="vLLM's command")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_vs_vllm.json")
    return parser.parse_args()


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    same = ["--dtype", args.dtype, "--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
    return {
        "porter": [sys.executable, "-m", "porter", "serve", args.model, "--port", "8131", *same],
        "vllm": [args.vllm, "serve", args.model, "--port", "8132", *same],
    }


def wait_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
        if server.poll() is not None:
            raise SystemExit(f"{server.args} ended with {server.returncode}")
    raise SystemExit(f"{url} did not get ready")


def measure(args: argparse.Namespace, name: str, command: list[str]) -> dict[str, Any]:
    """Start a server, warm it up, load it, end it."""
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    server = subprocess.Popen(command, env=os.environ | (VLLM if name == "vllm" else {}))
    try:
        wait_ready(url, server)
        load(url, 8, args.concurrency)
        return load(url, args.num_prompts, args.concurrency)
    finally:
        server.terminate()
        server.wait(60)


def load(url: str, num_prompts: int, concurrency: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        sizes = ["--num-prompts", str(num_prompts), "--max-concurrency", str(concurrency)]
        lengths = ["--input-len", "64", "--output-len", "48", "--output", str(file)]
        bench = [sys.executable, "-m", "porter", "bench", "serve", "--base-url", url, *sizes, *lengths]
        subprocess.run(bench, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def main() -> None:
    args = parse()
    rounds = [
        {"server": name, **measure(args, name, command)}
        for _ in range(args.rounds)
        for name, command in commands(args).items()
    ]
    vllm_version = subprocess.run([args.vllm, "--version"], capture_output=True, text=True).stdout.strip()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": args.dtype,
        "processors": len(os.sched_getaffinity(0)),
        "vllm": vllm_version,
        "python": platform.python_version(),
        "rounds": rounds,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    keys = ("server", "output_tokens_per_s", "ttft_ms", "inter_token_ms", "failed")
    print(json.dumps([{key: each[key] for key in keys} for each in rounds], indent=2))


if __name__ == "__main__":
    main()

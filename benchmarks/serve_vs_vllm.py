"""The same load on porter's server and on vLLM's, in turns; the server that is not measured is stopped meanwhile.

    python benchmarks/serve_vs_vllm.py MODEL --vllm-python PYTHON [--rounds 3] [--concurrency 32] [--dtype float32]

MODEL is a checkpoint folder whose architecture has a registered port. The load is `porter bench serve`: so many clients
that each send the next prompt when the last one is answered. Same weights, dtype, processors and limits on both sides,
prefix caches off, one start for all rounds, one short round before them that does not count. Every round goes to
benchmarks/results/ as JSON, with the medians.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from porter import __version__

RESULTS = Path(__file__).parent / "results"
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
START_TIMEOUT = 300
SHOWN = ("output_tokens_per_s", "ttft_ms", "inter_token_ms")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--vllm-python", required=True, help="the Python that has vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


class Server:
    """A server in a process group of its own, so that all of it can be stopped and continued."""

    def __init__(self, args: argparse.Namespace, name: str, command: list[str], port: int) -> None:
        same = ["--dtype", args.dtype, "--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*command, "--port", str(port), *same]
        start = time.perf_counter()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (VLLM if name == "vllm" else {})
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        try:
            self._wait_ready()
        except BaseException:
            self.end()
            raise
        self.startup = round(time.perf_counter() - start, 1)
        print(f"{name} is ready after {self.startup} s", flush=True)
        self.signal(signal.SIGSTOP)

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{' '.join(self.command)} did not get ready")

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.process.pid, number)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The server runs in this block only."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def end(self) -> None:
        """Ask it to end, and see to it."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            if self.process.poll() is None:
                self.signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)


def load(args: argparse.Namespace, url: str, num_prompts: int, output_len: int) -> dict[str, Any]:
    """What `porter bench serve` measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        sizes = ["--num-prompts", str(num_prompts), "--max-concurrency", str(args.concurrency)]
        lengths = ["--input-len", str(args.input_len), "--output-len", str(output_len), "--output", str(file)]
        bench = [sys.executable, "-m", "porter", "bench", "serve", "--base-url", url, *sizes, *lengths]
        done = subprocess.run(bench, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(bench)} exited {done.returncode}\n{done.stderr}{done.stdout}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def medians(rounds: list[dict[str, Any]], name: str) -> dict[str, float]:
    mine = [each for each in rounds if each["server"] == name]
    return {
        "output_tokens_per_s": statistics.median(each["output_tokens_per_s"] for each in mine),
        **{
            f"{what}_{q}": statistics.median(each[what][q] for each in mine)
            for what in ("ttft_ms", "inter_token_ms")
            for q in ("p50", "p99")
        },
    }


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def measure(args: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Start-up seconds of both servers, and the rounds."""
    commands = {
        "porter": [sys.executable, "-m", "porter", "serve", args.model],
        "vllm": [args.vllm_python, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", args.model],
    }
    commands["vllm"].append("--disable-uvicorn-access-log")  # porter has none by default
    rounds = []
    with ExitStack() as stack:
        servers = {}
        for port, (name, command) in enumerate(commands.items(), start=8131):
            servers[name] = Server(args, name, command, port)
            stack.callback(servers[name].end)
        for number in range(args.rounds + 1):
            for name, server in servers.items():
                with server.running():
                    if number == 0:
                        load(args, server.url, args.concurrency, 8)
                    else:
                        rounds.append({"server": name, **load(args, server.url, args.num_prompts, args.output_len)})
                        print(name, *(rounds[-1][what] for what in SHOWN), flush=True)
        return {name: server.startup for name, server in servers.items()}, rounds


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    startup, rounds = measure(args)
    found = {name: medians(rounds, name) for name in startup}
    speeds, gaps = ([found[name][what] for name in startup] for what in ("output_tokens_per_s", "inter_token_ms_p99"))
    result = {
        "benchmark": "serve_vs_vllm",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "processors": len(os.sched_getaffinity(0)),
        "versions": {
            "porter": __version__,
            "vllm-cpu": version(args.vllm_python, "vllm-cpu"),
            "torch": [version(python, "torch") for python in (sys.executable, args.vllm_python)],
            "python": platform.python_version(),
        },
        "startup_seconds": startup,
        "medians": found,
        "throughput_ratio": round(speeds[0] / speeds[1], 3),
        "inter_token_p99_ratio": round(gaps[0] / gaps[1], 3),
        "rounds": rounds,
    }
    path = args.output or RESULTS / f"serve_vs_vllm_{Path(args.model).name}_cpu_{args.dtype}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "rounds"}, indent=2))


if __name__ == "__main__":
    main()

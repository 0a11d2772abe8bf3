"""A real server in processes of its own, on a tiny random checkpoint, started by a file that brings its own model."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest
from openai import OpenAI

from porter.runtime.engine import LLM

ROOT = Path(__file__).parents[2]
PORT = ROOT / "tests" / "models" / "handwritten_llama.py"
KEY = "a-secret"
SCRIPT = f"""
import runpy
import sys

sys.path.insert(0, {str(PORT.parent)!r})
from handwritten_llama import LlamaForCausalLM

from porter.runtime.model_registry import ModelRegistry

ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
runpy.run_module("porter.serve", run_name="__main__")
"""


@dataclass
class Server:
    """A server that runs; `log` is its stderr."""

    process: "subprocess.Popen[bytes]"
    log: Path
    url: str = ""

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until it says where it serves."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = re.search(r"serving tiny at (http://\S+)/v1", self.log.read_text())
            if found:
                self.url = found.group(1)
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not ready in time: {self.log.read_text()}")

    def openai(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def metrics(self) -> dict[str, float]:
        """Every metric without labels."""
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("porter_"): float(value) for name, value in pairs}

    def eventually(self, check: Callable[[dict[str, float]], bool], timeout: float = 20.0) -> dict[str, float]:
        """The first metrics that `check` accepts."""
        end = time.monotonic() + timeout
        while not check(found := self.metrics()):
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found

    def engine(self) -> Any:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if any("spawn_main" in word for word in child.cmdline()))

    def stop(self) -> int:
        """Ask it to end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="session")
def launch(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers; they are ended after the session."""
    started: list[Server] = []
    folder = tmp_path_factory.mktemp("servers")
    script = folder / "my_server.py"
    script.write_text(SCRIPT)

    def start(*options: str, model: str = str(chat_checkpoint), port: int = 0, wait: bool = True) -> Server:
        log = folder / f"{len(started)}.log"
        command = [sys.executable, str(script), model, "--port", str(port), "--served-model-name", "tiny"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PORTER_HOME": str(folder / "home")}
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, "--device", "cpu", "--api-key", KEY, *options], stderr=stderr, env=environment
            )
        started.append(Server(process, log))
        if wait:
            started[-1].wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def server(launch: Callable[..., Server]) -> Server:
    """One server with plenty of room, for all tests that leave it as it was."""
    return launch("--num-gpu-blocks-override", "1024", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="session")
def offline(chat_checkpoint: Path) -> Iterator[LLM]:
    """The same model without a server."""
    llm = LLM(chat_checkpoint, port=PORT, device="cpu", num_blocks=1024)
    yield llm
    llm.shutdown()

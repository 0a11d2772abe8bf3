"""One engine in a process of its own: run by its path, so that each can have its own Python and libraries.

    python side.py porter|hf|vllm OPTIONS_AS_JSON

Then every line on stdin is a JSON order {"inputs", "outputs", "temperature", "seed"}, answered by a JSON line. It
imports nothing of porter unless the engine is porter.
"""

import json
import os
import random
import resource
import sys
import time
from typing import Any


def prompts_of(order: dict[str, Any], vocab_size: int) -> list[list[int]]:
    """Random token ids, never the first few, which may be special."""
    rng = random.Random(order["seed"])
    return [[rng.randrange(min(10, vocab_size - 1), vocab_size) for _ in range(n)] for n in order["inputs"]]


class PorterSide:
    """porter's engine."""

    def __init__(self, options: dict[str, Any]) -> None:
        from porter.runtime.engine import LLM

        engine = options["engine"] | {"port": options["port"], "skip_tokenizer_init": True}
        engine |= {"enable_prefix_caching": False, "dtype": options["dtype"], "device": options["device"]}
        self.llm = LLM(options["model"], load_format=options["load_format"], **engine)
        core = self.llm.llm_engine
        self.vocab_size = core.vocab_size
        self.kv_tokens = core.block_manager.num_blocks * core.config.block_size

    def run(self, order: dict[str, Any]) -> float:
        from porter.runtime.engine import SamplingParams

        prompts: Any = [{"prompt_token_ids": ids} for ids in prompts_of(order, self.vocab_size)]
        common = {"temperature": order["temperature"], "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=n, **common) for n in order["outputs"]]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(order["outputs"])
        return seconds


class HfSide:
    """transformers' generate on padded batches, as many tokens as the longest output of the batch."""

    kv_tokens = None

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        dtype = "auto" if options["dtype"] == "auto" else getattr(torch, options["dtype"])
        device = options["device"]
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        config = AutoConfig.from_pretrained(options["model"])
        if options["load_format"] == "dummy":
            with torch.device(self.device):
                self.model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).to(self.device)
        self.model.eval()
        self.model.generation_config.eos_token_id = None
        self.vocab_size = config.get_text_config().vocab_size
        self.batch = options["engine"]["max_num_seqs"]

    def run(self, order: dict[str, Any]) -> float:
        prompts = prompts_of(order, self.vocab_size)
        start = time.perf_counter()
        for first in range(0, len(prompts), self.batch):
            self._batch(prompts[first : first + self.batch], max(order["outputs"][first : first + self.batch]), order)
        return time.perf_counter() - start

    def _batch(self, prompts: list[list[int]], num_new: int, order: dict[str, Any]) -> None:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        sampling = {"do_sample": order["temperature"] > 0}
        if order["temperature"] > 0:
            sampling |= {"temperature": order["temperature"], "top_k": 0, "top_p": 1.0}
        length = {"max_new_tokens": num_new, "min_new_tokens": num_new, "pad_token_id": 0}
        with torch.no_grad():
            self.model.generate(ids, attention_mask=mask, **length, **sampling)
        if self.device != "cpu":
            torch.cuda.synchronize()


class VllmSide:
    """vLLM's offline engine."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        engine = {name: value for name, value in options["engine"].items() if value is not None}
        engine |= {"skip_tokenizer_init": True, "enable_prefix_caching": False, "dtype": options["dtype"]}
        self.llm = LLM(model=options["model"], load_format=options["load_format"], **engine)
        config = self.llm.llm_engine.vllm_config
        self.vocab_size = config.model_config.get_vocab_size()
        blocks = config.cache_config.num_gpu_blocks
        self.kv_tokens = blocks * config.cache_config.block_size if blocks else None

    def run(self, order: dict[str, Any]) -> float:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in prompts_of(order, self.vocab_size)]
        common = {"temperature": order["temperature"], "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=n, **common) for n in order["outputs"]]
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start


SIDES: dict[str, Any] = {"porter": PorterSide, "hf": HfSide, "vllm": VllmSide}


def facts(name: str) -> dict[str, Any]:
    """Versions, device and peak memory in bytes, as this process sees them."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": sys.version.split()[0]}
    for package in ("porter-lm", "torch", "triton", "transformers", "vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {"side": name, "versions": versions, "peak_host_bytes": peak, "device": "cpu"}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "peak_device_bytes": torch.cuda.max_memory_allocated()}
    return found


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    # libraries may print: stdout is kept for answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    try:
        side = SIDES[name](options)
    except Exception as error:
        # the one that started this process tells it
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps({"failed": told}), file=answers)
        raise SystemExit(2) from None
    print(json.dumps({"start_seconds": time.perf_counter() - start, "kv_tokens": side.kv_tokens}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"seconds": side.run(json.loads(line))} | facts(name)), file=answers)


if __name__ == "__main__":
    main()

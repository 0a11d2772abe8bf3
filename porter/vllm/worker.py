"""Runs inside vLLM's own environment: generates and scores prompts with each checkpoint of a list of jobs.

`python worker.py JOBS.json RESULTS.jsonl`. It imports vLLM and nothing of porter; models come from installed plugins.
"""

import gc
import importlib
import json
import sys
import time
from typing import Any


def main(jobs_file: str, results_file: str) -> None:
    """Run the jobs in order; each adds one line: {"name", "prompts": [...]} or {"name", "error"}."""
    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        started = time.monotonic()
        try:
            result: dict[str, Any] = {"prompts": run(job)}
        except Exception as error:  # whatever vLLM or the port raises is the job's result
            result = {"error": reason(error)}
        finally:
            clean_up()
        result = {"name": job["name"], **result, "seconds": round(time.monotonic() - started, 1)}
        with open(results_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM makes of each prompt: greedy tokens, and log-probabilities {token: value} of each position."""
    from vllm import LLM, SamplingParams

    register(job["classes"])
    llm = LLM(job["model"], skip_tokenizer_init=True, max_logprobs=job["top"], **job["options"])
    params = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        prompt_logprobs=job["top"],
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
    return [
        {"tokens": list(output.outputs[0].token_ids), "logprobs": [position(p) for p in output.prompt_logprobs]}
        for output in outputs
    ]


def register(classes: dict[str, str]) -> None:
    """Register model classes themselves. Of a class that it is told by name vLLM asks a new process, for seconds."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for architecture, place in classes.items():
        module, _, name = place.partition(":")
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))


def position(found: dict[int, Any] | None) -> dict[int, float] | None:
    """Token -> log-probability; None for the first token, which nothing predicts."""
    return None if found is None else {int(token): float(entry.logprob) for token, entry in found.items()}


def reason(error: BaseException) -> str:
    """The last cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def clean_up() -> None:
    """Leave nothing of one engine to the next."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])

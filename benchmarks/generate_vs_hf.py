"""Tokens per second of porter's engine and of transformers' generate, alternating in one run.

    python benchmarks/generate_vs_hf.py MODEL [--port FILE] [--batch 1 16] [--dtype float32] [--device cpu]

Same weights, dtype, prompts, threads and number of tokens on both sides; greedy, the end token ignored. Each round
times one side after the other. Other load only ever adds time, so speeds are those of each side's best round; the ratio
of the medians stands beside it, and a run whose rounds differ by more than a quarter is called noisy: repeat it on an
idle machine before quoting it. Results, every round included, go to benchmarks/results/ as JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from porter import __version__
from porter.runtime.engine import LLM, SamplingParams

RESULTS = Path(__file__).parent / "results"
NOISY = 1.25  # slowest round over fastest


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--port", help="port file; default: the registered one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, llm: LLM, hf: Any, batch: int) -> dict[str, Any]:
    """Tokens per second of both sides for one batch size."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(10, hf.config.vocab_size, (batch, args.prompt_tokens), generator=generator)
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    tokens: dict[str, list[list[int]]] = {}

    def ours() -> None:
        llm.llm_engine.block_manager.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": row} for row in prompts.tolist()], params, use_tqdm=False)
        tokens["porter"] = [output.outputs[0].token_ids for output in outputs]

    def theirs() -> None:
        ids = prompts.to(hf.device)
        mask = torch.ones_like(ids)
        found = hf.generate(ids, attention_mask=mask, max_new_tokens=args.output_tokens, do_sample=False)
        tokens["hf"] = found[:, args.prompt_tokens :].tolist()

    times: dict[str, list[float]] = {"porter": [], "hf": []}
    for round_ in range(args.rounds + 1):
        for name, run in (("porter", ours), ("hf", theirs)):
            elapsed = seconds(run, args.device)
            if round_:  # the first round warms up
                times[name].append(elapsed)
    count = batch * args.output_tokens
    speed = {name: count / min(found) for name, found in times.items()}
    medians = {name: statistics.median(found) for name, found in times.items()}
    same = sum(a == b for a, b in zip(tokens["porter"], tokens["hf"], strict=True))
    return {
        "batch": batch,
        "porter_tokens_per_s": round(speed["porter"], 2),
        "hf_tokens_per_s": round(speed["hf"], 2),
        "ratio": round(speed["porter"] / speed["hf"], 3),
        "ratio_of_medians": round(medians["hf"] / medians["porter"], 3),
        "noisy": any(max(found) > NOISY * min(found) for found in times.values()),
        "seconds": {name: [round(value, 4) for value in found] for name, found in times.items()},
        "same_outputs": f"{same}/{batch}",
    }


def device_name(device: str) -> str:
    if device != "cpu":
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    args = parse()
    dtype = getattr(torch, args.dtype)
    options = {"port": args.port, "dtype": args.dtype, "device": args.device}
    llm = LLM(args.model, skip_tokenizer_init=True, max_model_len=2048, **options)
    hf = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    hf.generation_config.eos_token_id = None
    rows = []
    print(f"{'batch':>5} {'porter tok/s':>13} {'HF tok/s':>10} {'ratio':>7} {'of medians':>11}  same outputs")
    for batch in args.batch:
        row = measure(args, llm, hf, batch)
        rows.append(row)
        print(
            f"{batch:>5} {row['porter_tokens_per_s']:>13.1f} {row['hf_tokens_per_s']:>10.1f} {row['ratio']:>6.2f}x"
            f" {row['ratio_of_medians']:>10.2f}x  {row['same_outputs']}{'  NOISY' if row['noisy'] else ''}"
        )
    report = {
        "benchmark": "generate_vs_hf",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(args.device),
        "versions": {
            "porter": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "rows": rows,
    }
    path = args.output or RESULTS / f"generate_vs_hf_{Path(args.model).name}_{args.device}_{args.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Ports on a GPU against transformers: bf16 logits, and greedy tokens by CUDA graphs, eagerly and by transformers.

    python benchmarks/check_on_gpu.py --ports FOLDER_OF_PORTS [--output FILE]

FOLDER_OF_PORTS holds one folder a model type (`porter convert TYPE -o FOLDER/TYPE`). Weights are random. R is
|port bf16 - HF float32| over |HF bf16 - HF float32|, by position.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from porter import __version__
from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.metadata import AttentionMetadata

SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "n_layer": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "n_embd": 512, "n_head": 8, "n_positions": 1024, "sliding_window": 64, "num_experts": 8, "n_layers": 4,
    "num_local_experts": 8, "moe_intermediate_size": 256, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OUTPUT = 48


def write_checkpoint(model_type: str, folder: Path) -> None:
    """A small random model whose logits differ clearly between tokens."""
    default = AutoConfig.for_model(model_type)
    known = {name: value for name, value in SIZES.items() if getattr(default, name, None) is not None}
    config = AutoConfig.for_model(model_type, **known)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "emb" in name or "wte" in name else 1.3 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def load_hf(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.cuda().eval()


@torch.no_grad()
def port_logits(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Logits [n, vocab] of one prefill."""
    runner = llm.llm_engine.executor._runner
    blocks = -(-len(ids) // 16)
    metadata = AttentionMetadata.for_sequences([len(ids)], [len(ids)], [list(range(blocks))], 16, "cuda")
    tokens = torch.tensor(ids, device="cuda")
    from porter.runtime.deferred import materialize

    hidden = materialize(runner.model(tokens, torch.arange(len(ids), device="cuda"), runner.kv_caches, metadata))
    return materialize(runner.model.compute_logits(hidden)).float()


def check(model_type: str, port: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(model_type, folder)
        prompts = [torch.randint(3, 4096, (n,)).tolist() for n in (5, 37, 130, 64, 200, 17)]
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        options: dict[str, Any] = {
            "port": port, "device": "cuda", "skip_tokenizer_init": True, "max_model_len": 512, "num_blocks": 400,
            "max_num_seqs": 8, "max_num_batched_tokens": 256,
        }  # fmt: skip
        result: dict[str, Any] = {"model_type": model_type}
        given = [{"prompt_token_ids": p} for p in prompts]
        outputs = {}
        for dtype in ("float32", "bfloat16"):
            for eager in (False, True):
                start = time.perf_counter()
                llm = LLM(folder, dtype=dtype, enforce_eager=eager, **options)
                result[f"start_s_{dtype}_{'eager' if eager else 'graph'}"] = round(time.perf_counter() - start, 2)
                found = [o.outputs[0].token_ids for o in llm.generate(given, params, use_tqdm=False)]
                single = llm.generate(given[:1], params, use_tqdm=False)[0].outputs[0].token_ids
                outputs[dtype, eager] = found
                result.setdefault("bs1_equals_batch", {})[f"{dtype}_{eager}"] = single == found[0]
                if dtype == "bfloat16" and not eager:
                    logits = [port_logits(llm, p) for p in prompts]
                if dtype == "float32" and not eager:
                    logits32 = [port_logits(llm, p) for p in prompts]
                    graphs = llm.llm_engine.executor._runner.graphs
                    result["graphs"] = None if graphs is None else graphs.sizes
                llm.shutdown()
                del llm
        truth = load_hf(folder, torch.float32)
        half = load_hf(folder, torch.bfloat16)
        ratios, errors, errors32 = [], [], []
        with torch.no_grad():
            for p, found, found32 in zip(prompts, logits, logits32, strict=True):
                ids = torch.tensor([p], device="cuda")
                exact = truth(ids).logits[0].float()
                rounded = half(ids).logits[0].float()
                ratios.append((found - exact).norm(dim=-1) / (rounded - exact).norm(dim=-1))
                errors.append((found - exact).norm(dim=-1) / exact.norm(dim=-1))
                errors32.append((found32 - exact).norm(dim=-1) / exact.norm(dim=-1))
            expected = []
            for p in prompts:
                ids = torch.tensor([p], device="cuda")
                length = {"max_new_tokens": OUTPUT, "min_new_tokens": OUTPUT}
                out = truth.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, **length)
                expected.append(out[0, len(p) :].tolist())
        ratio = torch.cat(ratios)
        result |= {
            "R_p50": ratio.median().item(), "R_p95": ratio.quantile(0.95).item(),
            "bf16_relative_error": torch.cat(errors).max().item(),
            "float32_relative_error": torch.cat(errors32).max().item(),
            "greedy_float32_graph_equals_hf": outputs["float32", False] == expected,
            "greedy_float32_graph_equals_eager": outputs["float32", False] == outputs["float32", True],
            "greedy_bf16_graph_equals_eager": outputs["bfloat16", False] == outputs["bfloat16", True],
            "greedy_matching_tokens_float32_hf": (
                torch.tensor(outputs["float32", False]) == torch.tensor(expected)
            ).float().mean().item(),
        }  # fmt: skip
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ports", type=Path, required=True)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for folder in sorted(args.ports.iterdir()):
        if args.types and folder.name not in args.types:
            continue
        try:
            row = check(folder.name, folder)
        except Exception as error:  # the table shows it, and the exit code
            import traceback

            traceback.print_exc(limit=-6)
            row = {"model_type": folder.name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        rows.append(row)
        print(json.dumps(row), flush=True)
    report = {
        "benchmark": "check_on_gpu", "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "versions": {"porter": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "triton": __import__("triton").__version__, "python": platform.python_version()},
        "rows": rows,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()

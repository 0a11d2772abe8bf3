"""Run a model with the transformers that its code was written for, and record what it computes, for `porter verify`.

Needs torch, safetensors, Python 3.10 or later and that release of transformers; nothing else. Give a checkpoint folder
with config.json, the model's own code if it has any, and weights; with --random tiny weights are made and saved there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from porter.verify.trace import Trace, join, recording

LENGTHS = (5, 11, 23, 37)  # primes that no size of a tiny model shares
NEW_TOKENS = 12
_FORMAT = "1"


def load(folder: str, random: bool) -> Any:
    """The model of a folder in float32 with plain attention; `random` makes its weights and saves them there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = "eager"
    config.use_cache = False
    if random:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).float().eval()
        randomise(model)
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, str(Path(folder) / "model.safetensors"), {"format": "pt"})
        return model
    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True).float().eval()


@torch.no_grad()
def randomise(model: Any) -> None:
    """Give every parameter a random value, also those made without one; logits end up spread."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.2)


@torch.inference_mode()
def logits_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    """`[num_tokens, vocab]` of one full forward without a cache."""
    output = model(input_ids=torch.tensor([token_ids]), use_cache=False)
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits[0].float()


def continued(model: Any, prompt: list[int]) -> list[int]:
    """NEW_TOKENS greedy tokens after the prompt, each from a full forward."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def record(model: Any, prompts: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by name, and the calls of modules with parameters in the order in which they returned."""
    traces, logits, new, after = [], [], [], []
    for prompt in prompts:
        with recording(model, len(prompt)) as trace:
            logits.append(logits_of(model, prompt))
        traces.append(trace)
        new.append(continued(model, prompt))
        after.append(logits_of(model, prompt + new[-1][:-1])[len(prompt) - 1 :])
    tensors = {
        "token_ids": torch.tensor([i for prompt in prompts for i in prompt]),
        "lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "logits": torch.cat(logits),
        "new_token_ids": torch.tensor(new),
        "new_logits": torch.stack(after),
    }
    calls = _calls(model, join(traces), tensors)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, calls


def _calls(model: Any, trace: Trace, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    with_weights = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    calls = []
    for number, ((module, _), call) in enumerate(trace.keyed()):
        if module in with_weights:
            calls.append(
                {"number": number, "module": module, "inputs": list(call.inputs), "outputs": len(call.outputs)}
            )
            tensors.update({f"{number}.in.{name}": value for name, value in call.inputs.items()})
            tensors.update({f"{number}.out.{i}": value for i, value in enumerate(call.outputs)})
    return calls


def main() -> None:
    """Load, run, and write one safetensors file."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="checkpoint folder")
    parser.add_argument("--out", default="reference.safetensors", help="file to write")
    parser.add_argument("--random", action="store_true", help="make random weights and save them in the folder")
    given = parser.parse_args()
    model = load(given.folder, given.random)
    generator = torch.Generator().manual_seed(0)
    vocab = int(model.config.vocab_size)
    prompts = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    tensors, calls = record(model, prompts)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    kept = {"format": _FORMAT, "calls": json.dumps(calls), "versions": json.dumps(versions)}
    save_file(tensors, given.out, {**kept, "architecture": type(model).__name__})
    print(f"{given.out}: {len(calls)} calls of modules, {len(tensors['token_ids'])} tokens")


if __name__ == "__main__":
    main()

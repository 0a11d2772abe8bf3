"""The original: the model that transformers builds, in plain attention, run without a cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from porter.errors import OriginalError
from porter.verify.trace import Keep, Trace, join, recording

# Eager attention is the plainest there is, so it is the truth, but for models that get it wrong.
# falcon: transformers 5.19 adds ALiBi in the mask and once more to the scores; its other paths add it once.
_ATTENTION = {"falcon": "sdpa"}


@dataclass(frozen=True)
class ReferenceRun:
    """Module outputs and logits `[num_tokens, vocab]` (float32) of the original on some prompts."""

    trace: Trace
    logits: torch.Tensor


def load_reference(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The original model of a checkpoint folder; OriginalError if transformers can't load it."""
    quiet_transformers()
    with asked_of_original(f"load {folder}", "check the files; a model with its own code needs --trust-remote-code"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        attention = _ATTENTION.get(config.model_type, "eager")
        model: PreTrainedModel = _class_for(config).from_pretrained(
            str(folder), dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
        if type(model).__module__.startswith("transformers_modules."):
            model = _with_own_tables(model, attention)
    return model.eval()


def _class_for(config: PreTrainedConfig) -> Any:
    """AutoModelForCausalLM, or the class that a config names which it doesn't know: text configs of larger models."""
    known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    named = None if known else getattr(transformers, next(iter(config.architectures or ()), ""), None)
    return named or AutoModelForCausalLM


def _with_own_tables(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The model built anew, with the same weights: transformers 5 leaves tables that a model's own code computes while
    it is built, and that no checkpoint holds, as memory nobody wrote."""
    fresh: PreTrainedModel = type(model)._from_config(model.config, attn_implementation=attention, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


@contextmanager
def asked_of_original(task: str, remedy: str) -> Iterator[None]:
    """What goes wrong inside is the original's own doing: it is raised again as OriginalError, one line."""
    try:
        yield
    except Exception as error:  # any library, any model's own code
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise OriginalError(f"transformers can't {task} ({type(error).__name__}: {reason})", remedy) from error


def quiet_transformers() -> None:
    """Keep transformers' warnings and bars out of porter's output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@torch.inference_mode()
def run_reference(model: PreTrainedModel, prompts: list[list[int]], keep: Keep = torch.clone) -> ReferenceRun:
    """Run each prompt alone, without padding or cache, and record every module."""
    traces, logits = [], []
    for prompt in prompts:
        with recording(model, len(prompt), keep) as trace:
            logits.append(full_logits(model, prompt))
        traces.append(trace)
    return ReferenceRun(join(traces, keep=keep), torch.cat(logits))


@torch.inference_mode()
def full_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits `[num_tokens, vocab]` in float32 of one full forward without cache; OriginalError if it raises."""
    kind = model.config.model_type
    with asked_of_original(f"run this {kind} model", "compare with a config that the original itself accepts"):
        logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
    return logits

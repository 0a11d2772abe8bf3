"""The public API: LLM(model).generate(prompts, SamplingParams(...))."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from porter.runtime.checkpoint import load_config, load_tokenizer, resolve_model
from porter.runtime.config import (
    EngineConfig,
    default_sampling,
    eos_token_ids,
    resolve_device,
    resolve_dtype,
    resolve_max_model_len,
)
from porter.runtime.errors import RequestError
from porter.runtime.llm_engine import LLMEngine
from porter.runtime.model_registry import ModelRegistry, load_port, port_reference
from porter.runtime.outputs import RequestOutput
from porter.runtime.sampling import RequestOutputKind
from porter.runtime.sampling import SamplingParams as SamplingParams


class TokensPrompt(TypedDict):
    """A prompt that is already token ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt
Message = dict[str, Any]


class LLM:
    """A model ready to generate.

    model: checkpoint folder or hub name.
    port: port file, folder, "module:Class" or class; without it the registry decides by the config's architectures.
    dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". quantization: None, "int8" or "fp8".
    max_model_len: prompt plus output in tokens; default what the model has positions for.
    num_blocks: KV cache blocks of block_size tokens; default what memory allows.
    max_num_batched_tokens, max_num_seqs: tokens and sequences of a step at most.
    load_progress: called with (bytes loaded, bytes in all). load_format "dummy" fills the model with noise.
    enforce_eager: run decode steps on a GPU without CUDA graphs.

    Raises EngineError subclasses, one line each: ConfigError, PortError, WeightError, WorkerError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        port: str | Path | type[nn.Module] | None = None,
        dtype: str | torch.dtype = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 128,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        num_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        quantization: str | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        seed: int = 0,
        device: str = "auto",
        trust_remote_code: bool = False,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        load_format: str = "auto",
        load_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        folder = resolve_model(model)
        hf_config = load_config(folder, trust_remote_code)
        found = load_port(port) if port is not None else ModelRegistry.resolve(hf_config.architectures)
        config = EngineConfig(
            model=folder,
            hf_config=hf_config,
            port=port_reference(found),
            dtype=resolve_dtype(dtype, hf_config),
            device=resolve_device(device),
            max_model_len=resolve_max_model_len(hf_config, max_model_len),
            max_model_len_is_given=max_model_len is not None,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            load_format=load_format,
            seed=seed,
            load_progress=load_progress,
        )
        self.tokenizer = None if skip_tokenizer_init else load_tokenizer(tokenizer or folder, trust_remote_code)
        eos_ids = eos_token_ids(hf_config, folder, getattr(self.tokenizer, "eos_token_id", None))
        self.llm_engine = LLMEngine(config, self.tokenizer, eos_ids)
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order. One SamplingParams for all, or one for each prompt."""
        listed: list[Prompt] = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        params = self._params_for(listed, sampling_params)
        ids: list[str] = []
        try:
            for prompt, each in zip(listed, params, strict=True):
                request_id = str(next(self._ids))
                self.llm_engine.add_request(request_id, _prompt_of(prompt), each)
                ids.append(request_id)
            finished = self._run(len(ids), use_tqdm)
        except BaseException:
            for request_id in ids:
                self.llm_engine.abort_request(request_id)
            raise
        return [finished[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written out with the tokenizer's chat template."""
        several = bool(messages) and not isinstance(messages[0], dict)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_prompt(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Answer one prompt; yields what is new after each step. Leaving the loop early aborts the request."""
        params = replace(sampling_params or self.get_default_sampling_params(), output_kind=RequestOutputKind.DELTA)
        request_id = str(next(self._ids))
        self.llm_engine.add_request(request_id, _prompt_of(prompt), params)
        try:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    if output.request_id == request_id:
                        yield output
        finally:
            self.llm_engine.abort_request(request_id)

    def chat_prompt(self, messages: Sequence[Message]) -> TokensPrompt:
        """A conversation as token ids, ready for the assistant's answer."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("the tokenizer has no chat template", "use generate, or a model tuned for chat")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return TokensPrompt(prompt_token_ids=self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**default_sampling(self.llm_engine.config.model))

    def shutdown(self) -> None:
        """Stop the processes of the other tensor-parallel ranks; also happens when the LLM is collected."""
        self.llm_engine.shutdown()

    def _params_for(
        self, prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        params = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts came with {len(params)} SamplingParams", "give one, or one for each"
            )
        return [replace(each, output_kind=RequestOutputKind.FINAL_ONLY) for each in params]

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        from tqdm import tqdm  # type: ignore[import-untyped]

        finished: dict[str, RequestOutput] = {}
        with tqdm(total=num_requests, desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    finished[output.request_id] = output
                    bar.update()
        return finished


def _prompt_of(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    try:
        return list(prompt["prompt_token_ids"])
    except (KeyError, TypeError):
        raise RequestError(f"{prompt!r} is not a prompt", 'give text or {"prompt_token_ids": [...]}') from None

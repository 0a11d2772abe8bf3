"""Layers with states: however the engine batches, chunks or preempts, the tokens are those of one full forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.layers.state import StateCache, States, state_bytes
from porter.runtime.metadata import AttentionMetadata

PORT = Path(__file__).parents[1] / "models" / "handwritten_states.py"
Serve = Callable[..., LLM]
Prompts = Callable[..., list[list[int]]]
HIDDEN, KERNEL, NEW = 16, 3, 12
LENGTHS = (1, 2, 5, 17, 30)
KINDS = {"StatesForCausalLM": ("decay", "attention", "window"), "OnlyStatesForCausalLM": ("decay", "window")}


@dataclass(frozen=True)
class Original:
    """Weights on disk, and what a model of `kinds` computes with them, each token written out."""

    folder: Path
    architecture: str
    weights: dict[str, torch.Tensor]

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS[self.architecture]

    @property
    def port(self) -> str:
        return f"{PORT}:{self.architecture}"

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        x = self.weights["embed.weight"][torch.tensor(list(token_ids))]
        for i, kind in enumerate(self.kinds):
            normed = F.layer_norm(x, x.shape[-1:])
            mixed: torch.Tensor = getattr(self, f"_{kind}")(normed, self.weights.get(f"layers.{i}.mixer.weight"))
            x = x + mixed
        logits: torch.Tensor = x @ self.weights["lm_head.weight"].T
        return logits

    def _decay(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        decay = weight.tanh()
        return torch.stack([sum((decay ** (t - s) * x[s] for s in range(t + 1)), x[0] * 0) for t in range(len(x))])

    def _window(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        taken = [[(x[t - k], weight[:, KERNEL - 1 - k]) for k in range(min(KERNEL, t + 1))] for t in range(len(x))]
        return torch.stack([sum((row * factor for row, factor in each), x[0] * 0) for each in taken])

    def _attention(self, x: torch.Tensor, weight: None) -> torch.Tensor:
        scores = (x @ x.T * HIDDEN**-0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        attended: torch.Tensor = scores.softmax(-1) @ x
        return attended

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=KINDS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder = tmp_path_factory.mktemp(request.param)
    config = LlamaConfig(vocab_size=96, hidden_size=HIDDEN, num_attention_heads=1, architectures=[request.param])
    config.save_pretrained(folder)
    kinds = KINDS[request.param]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (96, HIDDEN), "lm_head.weight": (96, HIDDEN)}
    for i, kind in enumerate(kinds):
        if kind != "attention":
            shapes[f"layers.{i}.mixer.weight"] = (HIDDEN, KERNEL) if kind == "window" else (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return Original(folder, request.param, weights)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one batch"),
        pytest.param({"max_num_seqs": 2}, id="slots taken again"),
        pytest.param({"max_num_batched_tokens": 7}, id="chunks"),
        pytest.param({"max_num_batched_tokens": 1}, id="chunks of one"),
        pytest.param({"num_blocks": 16}, id="preempted"),
    ],
)
def test_greedy_tokens_are_those_of_a_full_forward(
    original: Original, serve: Serve, prompts: Prompts, options: dict[str, Any]
) -> None:
    llm = serve(original.folder, port=original.port, **options)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    asked = prompts(*LENGTHS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked * 2], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [original.greedy(prompt) for prompt in asked] * 2
    assert all(output.num_cached_tokens == 0 for output in outputs)  # blocks alone do not make a prefix
    assert (llm.llm_engine.scheduler.num_preemptions > 0) == ("num_blocks" in options)


def test_decoder_layers_without_attention_have_no_cache(original: Original, serve: Serve) -> None:
    caches = serve(original.folder, port=original.port).llm_engine.executor.kv_caches
    assert [cache is None for cache in caches] == ([True, False, True] if "attention" in original.kinds else [])


def test_states_of_a_sequence_take_this_much_memory(original: Original, serve: Serve, prompts: Prompts) -> None:
    llm = serve(original.folder, port=original.port)
    model = llm.llm_engine.executor.model
    assert state_bytes(model) == 0
    llm.generate([{"prompt_token_ids": prompts(5)[0]}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert state_bytes(model) == 4 * (HIDDEN + HIDDEN * KERNEL)


def test_a_convolution_keeps_its_last_inputs() -> None:
    inputs = torch.randn(2, 4, 6)
    states = States()
    assert torch.equal(states.update_conv_state(inputs[..., :2], conv_kernel_size=3), F.pad(inputs[..., :2], (1, 0)))
    states.has_previous_state = True
    assert torch.equal(states.update_conv_state(inputs[..., 2:]), F.pad(inputs, (1, 0)))
    assert torch.equal(states.conv_states[0], inputs[..., -3:])


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    cache = StateCache()
    for slots, value in (([1], 1.0), ([6, 0], 2.0)):
        states = States(recurrent_states={0: torch.full((len(slots), 3), value)})
        cache.store(torch.tensor(slots), states, max(slots) + 1)
    assert cache.load(torch.tensor([0, 1, 6])).recurrent_states[0][:, 0].tolist() == [2.0, 1.0, 2.0]


def test_a_step_says_where_states_are() -> None:
    given = AttentionMetadata.for_sequences([1, 2], [4, 2], [[0], [1]], 4, state_slots=[5, 3])
    assert given.state_slots.tolist() == [5, 3]
    assert AttentionMetadata.for_sequences([1, 2], [4, 2], [[0], [1]], 4).state_slots.tolist() == [0, 1]

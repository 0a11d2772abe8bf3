"""Greedy generation through the paged engine, under the pressures of serving, against the original's full forward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from porter.runtime.engine import LLM
from porter.runtime.outputs import RequestOutput
from porter.runtime.sampling import SamplingParams
from porter.verify.checks.logits import tie_margin, tolerated, wrong_tokens
from porter.verify.result import Check
from porter.verify.subject import Subject

NAME = "greedy"
NEW_TOKENS = 12
_BLOCK = 4


@dataclass(frozen=True)
class Scenario:
    """Engine options that put generation under one pressure, and the sign that it was really met."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1


@dataclass
class Tally:
    """Tokens judged so far, and the first that the original would not have chosen."""

    tokens: int = 0
    wrong: int = 0
    first: str = ""
    met: dict[str, bool] = field(default_factory=dict)


def check(subject: Subject, thorough: bool = True) -> Check:
    """PASS if every token of every scenario is the original's best, outside ties.

    All pressures one by one if `thorough`, else all at once.
    """
    tally = Tally()
    for scenario in scenarios(subject) if thorough else [_pressed(subject)]:
        run_scenario(subject, scenario, tally)
    unmet = [name for name, met in tally.met.items() if not met]
    share = 1 - tally.wrong / max(tally.tokens, 1)
    passed = tolerated(subject, tally.wrong, tally.tokens) and not unmet
    detail = tally.first or (f"the pressure was not met: {', '.join(unmet)}" if unmet else ", ".join(tally.met))
    data = {"worst": 1 - share, "tokens": tally.tokens, "scenarios": list(tally.met), **_window(subject)}
    return Check(NAME, "PASS" if passed else "FAIL", f"{share:.0%} of {tally.tokens}", "100%", detail, data)


def _window(subject: Subject) -> dict[str, int]:
    window = getattr(subject.config.get_text_config(), "sliding_window", None)
    return {"window_not_reached": window} if window and window >= max(map(len, subject.short_prompts)) else {}


def scenarios(subject: Subject) -> list[Scenario]:
    """One for each way in which serving differs from one forward."""
    few, longest = _few_blocks(subject)
    return [
        Scenario("batched"),
        Scenario("chunked prefill", {"max_num_batched_tokens": 7}),
        Scenario("preempted", {"num_blocks": few, "max_model_len": longest}),
        *([] if subject.keeps_states else [Scenario("prefix hits", {"num_blocks": 512}, rounds=2)]),
    ]


def _pressed(subject: Subject) -> Scenario:
    few, longest = _few_blocks(subject)
    options = {"max_num_batched_tokens": 7, "num_blocks": few, "max_model_len": longest}
    return Scenario("chunked and preempted", options)


def _few_blocks(subject: Subject) -> tuple[int, int]:
    """Blocks with room for the longest sequence and not for two, and that sequence's length."""
    longest = max(map(len, subject.short_prompts)) + NEW_TOKENS
    return -(-longest // _BLOCK) + 3, longest


def run_scenario(subject: Subject, scenario: Scenario, tally: Tally) -> None:
    """Generate under the scenario's options and judge every token."""
    options = {"max_model_len": _length(subject), "block_size": _BLOCK, "num_blocks": 256, **scenario.options}
    llm = LLM(
        subject.folder,
        port=subject.port,
        dtype=subject.torch_dtype,
        device="cpu",
        skip_tokenizer_init=True,
        trust_remote_code=subject.trust_remote_code,
        **options,
    )
    try:
        outputs = [output for _ in range(scenario.rounds) for output in generate(llm, subject.short_prompts)]
        tally.met[scenario.name] = _met(scenario, llm, outputs)
    finally:
        llm.shutdown()
        del llm
        subject.release()
    for output in outputs:
        _judge(subject, scenario.name, output, tally)


def generate(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    """NEW_TOKENS greedy tokens after each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def _judge(subject: Subject, scenario: str, output: RequestOutput, tally: Tally) -> None:
    tokens = _unpadded(subject, output.outputs[0].token_ids)
    logits = subject.logits_after(tuple(output.prompt_token_ids), tuple(tokens))
    tokens = tokens[: len(logits)]
    wrong = wrong_tokens(torch.tensor(tokens), logits, tie_margin(subject))
    tally.tokens += len(tokens)
    tally.wrong += len(wrong)
    if wrong and not tally.first:
        where = f"{scenario}: prompt of {len(output.prompt_token_ids)}"
        tally.first = f"{where}, {_mistake(tokens, logits, wrong[0])}; look at: {_cause(scenario, wrong[0])}"


def _unpadded(subject: Subject, tokens: Sequence[int]) -> list[int]:
    """Tokens up to the first padding token: after one, originals that count positions around padding go astray."""
    padding = getattr(subject.config.get_text_config(), "pad_token_id", None)
    return list(tokens[: tokens.index(padding) + 1] if padding in tokens else tokens)


def _met(scenario: Scenario, llm: LLM, outputs: list[RequestOutput]) -> bool:
    if "preempted" in scenario.name:
        return llm.llm_engine.scheduler.num_preemptions > 0
    if scenario.name == "prefix hits":
        return any(output.num_cached_tokens > 0 for output in outputs)
    return True


def _length(subject: Subject) -> int:
    return max(map(len, subject.short_prompts)) + NEW_TOKENS


def _mistake(tokens: list[int], logits: torch.Tensor, row: int) -> str:
    gap = float(logits[row].max() - logits[row, tokens[row]])
    return f"token {row + 1} is {tokens[row]}, the original's is {int(logits[row].argmax())} by {gap:.1e}"


def _cause(scenario: str, index: int) -> str:
    if index == 0:
        return "prefill through the engine: chunk edges or cached prefixes" if scenario != "batched" else "prefill"
    return (
        "decode: slots, context lengths or the window"
        if scenario == "batched"
        else f"what {scenario} changes in the cache"
    )

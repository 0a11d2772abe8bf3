"""A request's fields as SamplingParams, the model's recommendations filled in."""

from collections.abc import Mapping, Sequence
from typing import Any

from porter.runtime.request_check import check_request
from porter.runtime.sampling import RequestOutputKind, SamplingParams
from porter.runtime.structured_outputs import StructuredOutputs
from porter.serve.errors import ApiError
from porter.serve.messages import EngineFacts
from porter.serve.protocol import SamplingFields

# Fields that mean the same here and in SamplingParams, None being "not given"
_SAME = (
    "frequency_penalty",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def sampling_params(
    body: SamplingFields, defaults: Mapping[str, Any], max_tokens: int | None, **more: Any
) -> SamplingParams:
    """SamplingParams for a request; `defaults` are used for what it leaves open. RequestError if they don't fit."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **{**defaults, **given, **more},
        max_tokens=max_tokens,
        logit_bias=_logit_bias(body.logit_bias),
        structured_outputs=_structured_outputs(body),
        output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
    )


def check_length(token_ids: list[int], params: SamplingParams, facts: EngineFacts, asked: int | None) -> None:
    """ApiError or RequestError at once for what can never be served; `asked` is what the request has as max_tokens."""
    most = facts.max_model_len
    if len(token_ids) >= most or len(token_ids) + (asked or 0) > most:
        wish = "" if asked is None else f" and asks for {asked} more"
        message = f"this model's context length is {most} tokens; the prompt has {len(token_ids)}{wish}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    check_request(token_ids, params, most, facts.vocab_size, has_tokenizer=True)


def check_token_ids(token_ids: Sequence[int], facts: EngineFacts) -> None:
    """ApiError for a token id that the model does not have."""
    wrong = next((token_id for token_id in token_ids if token_id >= facts.vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"token id {wrong} is not in the vocabulary of {facts.vocab_size}")


def check_logprobs(wanted: int | None, most: int, param: str) -> None:
    """ApiError if more alternatives are wanted than the server gives."""
    if wanted is not None and wanted > most:
        raise ApiError(400, f"{param} may be at most {most} on this server", param=param)


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias") from None


def _structured_outputs(body: SamplingFields) -> StructuredOutputs | None:
    wanted = body.structured_outputs
    if wanted is not None:
        choice = None if wanted.choice is None else tuple(wanted.choice)
        return StructuredOutputs(wanted.json_, bool(wanted.json_object), wanted.regex, choice)
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return StructuredOutputs(json_object=True)
    return StructuredOutputs(json=form.json_schema.schema_)

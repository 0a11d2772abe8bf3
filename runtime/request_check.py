"""Whether a request can be served at all: asked before it is queued, by the engine and by a server in front of it."""

from collections.abc import Sequence

from porter.runtime.errors import RequestError
from porter.runtime.sampling import SamplingParams


def check_request(
    token_ids: Sequence[int], params: SamplingParams, max_model_len: int, vocab_size: int, has_tokenizer: bool
) -> None:
    """Raise RequestError unless a prompt of `token_ids` can be served with `params`."""
    if not token_ids:
        raise RequestError("the prompt is empty", "give at least one token")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt's {len(token_ids)} tokens leave no room in max_model_len {max_model_len}",
            "shorten the prompt or raise max_model_len",
        )
    named = [*token_ids, *(params.logit_bias or {}), *params.stop_ids]
    if min(named) < 0 or max(named) >= vocab_size:
        wrong = next(token for token in named if not 0 <= token < vocab_size)
        raise RequestError(f"token id {wrong} is not in the vocabulary of {vocab_size}")
    if params.stop_strings and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer", "use stop_token_ids")

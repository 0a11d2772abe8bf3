"""One token a row, drawn from the softmax of its logits by a uniform number of its own."""

import torch

from porter.kernels.cpu_library import cpu_function


def draw_tokens_reference(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """logits `[n, vocab]`, temperature float32 `[n]` above 0, uniform float64 `[n]` in [0, 1) -> token ids int64 `[n]`.

    Inverts the cumulative distribution. A token of logit -inf is never drawn.
    """
    # The maximum is taken off first so that a tiny temperature can't overflow
    scaled = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / temperature.unsqueeze(-1)
    # Float64 so that the tail of a large vocabulary keeps its share of the cumulative sum
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def draw_tokens(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The same; on a CPU without a copy of the logits, which for a large vocabulary are a batch's largest tensors."""
    usable = logits.is_cpu and logits.stride(-1) == 1 and logits.numel()
    function = cpu_function("draw_tokens", logits.dtype, "pipppii") if usable else None
    if function is None:
        return draw_tokens_reference(logits, temperature, uniform)
    places = torch.empty(logits.shape[0], dtype=torch.int64)
    temperature, uniform = temperature.float().contiguous(), uniform.double().contiguous()
    pointers = temperature.data_ptr(), uniform.data_ptr(), places.data_ptr()
    function(logits.data_ptr(), logits.stride(0), *pointers, *logits.shape)
    return places

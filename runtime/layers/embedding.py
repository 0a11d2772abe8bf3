"""Token embedding and output head, sharded over the vocabulary."""

import torch
from torch import nn

from porter.runtime.errors import ConfigError
from porter.runtime.layers.linear import UNQUANTIZED, LinearMethod
from porter.runtime.layers.sharding import Part, set_parts
from porter.runtime.parallel import all_gather, all_reduce, get_tp_rank, get_tp_size


class VocabParallelBase(nn.Module):
    """A `[vocab, dim]` weight whose rows are dealt to the ranks; the last rank's missing rows are zero."""

    weight: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, linear_method: LinearMethod | None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.linear_method = linear_method or UNQUANTIZED
        self.tp_size = get_tp_size()
        self.rows = -(-num_embeddings // self.tp_size)
        self.first_row = min(get_tp_rank() * self.rows, num_embeddings)
        self.dtype = torch.get_default_dtype()  # of what goes in and out, however the weight is kept
        self.linear_method.create_weights(self, embedding_dim, self.rows, self.dtype)
        set_parts(self.get_parameter("weight"), {None: self._part((num_embeddings, embedding_dim))})

    def _part(self, shape: tuple[int, ...]) -> Part:
        return Part(shape, 0, self.first_row, min(self.rows, self.num_embeddings - self.first_row))


class VocabParallelEmbedding(VocabParallelBase):
    """forward(ids `[...]`) -> `[..., embedding_dim]`, complete on every rank."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, linear_method: LinearMethod | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, linear_method)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return self.linear_method.embedding(self, ids)
        local = ids - self.first_row
        foreign = (local < 0) | (local >= self.rows)
        embedded = self.linear_method.embedding(self, local.masked_fill(foreign, 0))
        return all_reduce(embedded.masked_fill(foreign.unsqueeze(-1), 0))


class ParallelLMHead(VocabParallelBase):
    """forward(hidden `[n, hidden]`) -> logits `[n, vocab]` of the whole, unpadded vocabulary on every rank."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, bias: bool = False, *, linear_method: LinearMethod | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, linear_method)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.rows), requires_grad=False)
            set_parts(self.bias, {None: self._part((num_embeddings,))})

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.linear_method.apply(self, hidden_states, self.bias)
        if self.tp_size == 1:
            return logits
        return all_gather(logits)[..., : self.num_embeddings]

    def tie_weights(self, embedding: VocabParallelBase) -> None:
        """Share the embedding's weight (and its scales); the bias stays. Raises ConfigError for another shape."""
        found = (embedding.num_embeddings, embedding.embedding_dim)
        expected = (self.num_embeddings, self.embedding_dim)
        if found != expected:
            raise ConfigError(
                f"a head of {expected} can't share an embedding of {found}", "set tie_word_embeddings=false"
            )
        for name, parameter in embedding.named_parameters(recurse=False):
            setattr(self, name, parameter)

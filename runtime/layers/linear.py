"""Linear layers: tensor-parallel, packed, and open to quantization through `linear_method`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from porter.kernels.act_and_mul import act_and_mul
from porter.kernels.linear_row import can_fuse, linear_row
from porter.runtime.deferred import Deferred, can_defer, materialize
from porter.runtime.errors import ConfigError
from porter.runtime.layers.sharding import Part, Parts, ShardId, even_part, set_parts
from porter.runtime.parallel import all_reduce, divide, get_tp_rank, get_tp_size


class LinearMethod:
    """How a layer stores and applies its weights; this base class leaves them unquantized.

    A layer's weight is `[out, in]`, or `[num_experts, out, in]`; a quantized method may hold it otherwise.
    """

    def create_weights(
        self,
        layer: nn.Module,
        in_per_partition: int,
        out_per_partition: int,
        params_dtype: torch.dtype,
        *,
        name: str = "weight",
        num_experts: int | None = None,
    ) -> None:
        """Register the parameter `name` (and what goes with it) on `layer`, zeroed, in this rank's sizes."""
        shape = (
            (out_per_partition, in_per_partition)
            if num_experts is None
            else (num_experts, out_per_partition, in_per_partition)
        )
        layer.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=params_dtype), requires_grad=False))

    def load_part(self, layer: nn.Module, name: str, part: Part, tensor: torch.Tensor) -> None:
        """Fill the part of parameter `name` from a whole checkpoint tensor, `part.shape`."""
        part.place(getattr(layer, name)).copy_(part.take(tensor))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Called once when every parameter of the model is filled."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `[..., in]` times the layer's weight, plus bias: `[..., out]`."""
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if can_fuse(x, weight):
            return linear_row(x, weight, bias)
        return F.linear(x, weight, bias)

    def apply_gated(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None, hidden_act: str
    ) -> torch.Tensor:
        """As `apply`, then act(first half) * second half: `[..., out / 2]`."""
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        # a method with an `apply` of its own stores the weight its own way
        if type(self).apply is LinearMethod.apply and can_fuse(x, weight, hidden_act):
            return linear_row(x, weight, bias, None, hidden_act)
        return act_and_mul(self.apply(layer, x, bias), hidden_act)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` of the layer's weight: `[..., in]`."""
        return F.embedding(ids, layer.weight)  # type: ignore[arg-type]

    def expert_weight(self, layer: nn.Module, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's `[out, in]` of the stack `name`, in `dtype`."""
        weights: torch.Tensor = getattr(layer, name)
        return weights[expert]


UNQUANTIZED = LinearMethod()


class LinearOutput(Deferred):
    """The output of a linear layer, which an activation or an addition after it may take in."""

    def __new__(cls, layer: "LinearBase", x: torch.Tensor) -> Self:
        return cls.like(x, (*x.shape[:-1], layer.out_per_partition))

    def __init__(self, layer: "LinearBase", x: torch.Tensor) -> None:
        super().__init__(x)
        self.layer, self.x = layer, x

    def compute(self) -> torch.Tensor:
        return self.layer.linear_method.apply(self.layer, self.x, self.layer.bias)

    def gated(self, hidden_act: str) -> torch.Tensor:
        """act(first half) * second half."""
        self.check_inputs()
        return self.layer.linear_method.apply_gated(self.layer, self.x, self.layer.bias, hidden_act)


class LinearBase(nn.Module):
    """What all linears share: the method, its weight, an optional bias, and the parts they load from."""

    weight: torch.Tensor

    def __init__(
        self,
        in_per_partition: int,
        out_per_partition: int,
        weight_parts: Parts,
        bias_parts: Parts | None,
        linear_method: LinearMethod | None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_method = linear_method or UNQUANTIZED
        self.out_per_partition = out_per_partition
        self.dtype = dtype = torch.get_default_dtype()  # of what goes in and out, however the weight is kept
        self.linear_method.create_weights(self, in_per_partition, out_per_partition, dtype)
        set_parts(self.get_parameter("weight"), weight_parts, num_kv_heads)
        self.bias: nn.Parameter | None = None
        if bias_parts is not None:
            self.bias = nn.Parameter(torch.zeros(out_per_partition, dtype=dtype), requires_grad=False)
            set_parts(self.bias, bias_parts, num_kv_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = materialize(x)
        return self.linear_method.apply(self, x, self.bias)


def _row_parts(sizes: dict[ShardId, tuple[int, int, int]], columns: int) -> tuple[Parts, Parts]:
    """Weight and bias parts from {shard: (rows in the checkpoint, first row kept, rows kept)}, laid end to end."""
    weight: dict[ShardId, Part] = {}
    offset = 0
    for shard, (rows, start, length) in sizes.items():
        weight[shard] = Part((rows, columns), 0, start, length, offset)
        offset += length
    return weight, {shard: replace(part, shape=part.shape[:1]) for shard, part in weight.items()}


def _share(rows: int, what: str) -> tuple[int, int, int]:
    length = divide(rows, get_tp_size(), what)
    return rows, get_tp_rank() * length, length


class ReplicatedLinear(LinearBase):
    """The same weight on every rank."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, linear_method: LinearMethod | None = None
    ) -> None:
        weight, bias_parts = _row_parts({None: (out_features, 0, out_features)}, in_features)
        super().__init__(in_features, out_features, weight, bias_parts if bias else None, linear_method)


class ColumnParallelLinear(LinearBase):
    """Each rank computes its share of the output features; the output stays sharded."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, linear_method: LinearMethod | None = None
    ) -> None:
        share = _share(out_features, "out_features")
        weight, bias_parts = _row_parts({None: share}, in_features)
        super().__init__(in_features, share[2], weight, bias_parts if bias else None, linear_method)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel linears on one input, computed as one; shard ids 0, 1, ..."""

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        bias: bool = True,
        *,
        linear_method: LinearMethod | None = None,
    ) -> None:
        shares: dict[ShardId, tuple[int, int, int]] = {i: _share(n, "out_features") for i, n in enumerate(out_features)}
        self.output_sizes = [share[2] for share in shares.values()]
        weight, bias_parts = _row_parts(shares, in_features)
        super().__init__(in_features, sum(self.output_sizes), weight, bias_parts if bias else None, linear_method)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = materialize(x)
        return LinearOutput(self, x) if can_defer(x) else self.linear_method.apply(self, x, self.bias)

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The shards of an output `[..., sum of local sizes]`."""
        return tuple(y.split_with_sizes(self.output_sizes, dim=-1))


class QKVParallelLinear(LinearBase):
    """Query, key and value projections as one; heads are sharded, KV heads replicated once tp_size exceeds them.

    `num_heads` and `num_kv_heads` are this rank's counts. Shard ids "q", "k", "v".
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        *,
        linear_method: LinearMethod | None = None,
    ) -> None:
        total_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        query = _share(num_heads, "num_heads")
        first_kv, kv_heads = _kv_share(num_heads, total_kv_heads)
        self.head_dim = head_dim
        self.num_heads = query[2]
        self.num_kv_heads = kv_heads
        self.output_sizes = [self.num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        key = (total_kv_heads * head_dim, first_kv * head_dim, kv_heads * head_dim)
        rows = (query[0] * head_dim, query[1] * head_dim, query[2] * head_dim)
        weight, bias_parts = _row_parts({"q": rows, "k": key, "v": key}, hidden_size)
        super().__init__(
            hidden_size,
            sum(self.output_sizes),
            weight,
            bias_parts if bias else None,
            linear_method,
            num_kv_heads=total_kv_heads,
        )

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query `[T, num_heads * head_dim]`, key and value `[T, num_kv_heads * head_dim]`."""
        query, key, value = y.split_with_sizes(self.output_sizes, dim=-1)
        return query, key, value


def _kv_share(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """This rank's first KV head and how many it holds."""
    size, rank = get_tp_size(), get_tp_rank()
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads = {num_heads} does not divide by num_kv_heads = {num_kv_heads}", "check the model's config"
        )
    if num_kv_heads >= size:
        kv_heads = divide(num_kv_heads, size, "num_kv_heads")
        return rank * kv_heads, kv_heads
    replicas = divide(size, num_kv_heads, "tp_size, over num_kv_heads,") if size % num_kv_heads == 0 else 0
    if not replicas:
        raise ConfigError(
            f"tp_size = {size} is not a multiple of num_kv_heads = {num_kv_heads}", "choose a tp_size that is"
        )
    return rank // replicas, 1


class RowParallelLinear(LinearBase):
    """Each rank holds its share of the input features; outputs are summed over ranks, the bias added once."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, linear_method: LinearMethod | None = None
    ) -> None:
        local = divide(in_features, get_tp_size(), "in_features")
        weight: Parts = {None: even_part((out_features, in_features), 1)}
        bias_parts: Parts | None = {None: Part((out_features,))} if bias else None
        super().__init__(local, out_features, weight, bias_parts, linear_method)
        self.tp_size = get_tp_size()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = materialize(x)
        if self.tp_size == 1:
            return LinearOutput(self, x) if can_defer(x) else self.linear_method.apply(self, x, self.bias)
        y = all_reduce(self.linear_method.apply(self, x, None))
        return y if self.bias is None else y + self.bias

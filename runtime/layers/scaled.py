"""Weights of 8 bits: one scale per output channel, quantized while loading from a float checkpoint."""

import torch
from torch import nn

from porter.kernels.act_and_mul import act_and_mul
from porter.kernels.linear_row import can_fuse, linear_row
from porter.kernels.scaled_linear import dequantize, scaled_linear
from porter.runtime.layers.linear import LinearMethod
from porter.runtime.layers.sharding import Part


class ScaledLinearMethod(LinearMethod):
    """Holds `<name>` in `dtype` and float32 `<name>_scale`, which no checkpoint has: loading the weight fills it."""

    dtype: torch.dtype

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight `[..., out, in]` -> the same in `dtype`, and scales `[..., out]`."""
        raise NotImplementedError

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        return scaled_linear(x, weight, scale, bias)

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
        """The weight `[(num_experts,) out, in]` and its scales `[(num_experts,) out]`."""
        rows = (out_per_partition,) if num_experts is None else (num_experts, out_per_partition)
        weight = nn.Parameter(torch.zeros(*rows, in_per_partition, dtype=self.dtype), requires_grad=False)
        scale = nn.Parameter(torch.zeros(rows, dtype=torch.float32), requires_grad=False)
        scale.derived = True  # type: ignore[attr-defined]
        layer.params_dtype = params_dtype  # type: ignore[assignment]
        layer.register_parameter(name, weight)
        layer.register_parameter(f"{name}_scale", scale)

    def load_part(self, layer: nn.Module, name: str, part: Part, tensor: torch.Tensor) -> None:
        """Quantize the whole tensor, then keep this rank's slice: every tp_size has the same scales."""
        weight, scale = self.quantize(tensor)
        part.place(getattr(layer, name)).copy_(part.take(weight))
        scales: torch.Tensor = getattr(layer, f"{name}_scale")
        if part.dim == 0:
            part.place(scales).copy_(part.take(scale))
        else:
            (scales if part.index is None else scales[part.index]).copy_(scale)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        if can_fuse(x, weight):
            return linear_row(x, weight, bias, scale)
        return self.multiply(x, weight, scale, bias)

    def apply_gated(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None, hidden_act: str
    ) -> torch.Tensor:
        """As `apply`, then act(first half) * second half."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        if can_fuse(x, weight, hidden_act):
            return linear_row(x, weight, bias, scale, hidden_act)
        return act_and_mul(self.apply(layer, x, bias), hidden_act)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Dequantized rows `ids`."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        # as bytes, since not every operation knows fp8
        rows = weight.view(torch.uint8)[ids].view(self.dtype)
        return dequantize(rows, scale[ids], layer.params_dtype)  # type: ignore[arg-type]

    def expert_weight(self, layer: nn.Module, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dequantized `[out, in]`."""
        weight: torch.Tensor = getattr(layer, name)
        scale: torch.Tensor = getattr(layer, f"{name}_scale")
        return dequantize(weight[expert], scale[expert], dtype)

    def dequantize(self, layer: nn.Module, name: str = "weight") -> torch.Tensor:
        """The float32 weight that the layer stands for: what every faster path is tested against."""
        return dequantize(getattr(layer, name), getattr(layer, f"{name}_scale"), torch.float32)

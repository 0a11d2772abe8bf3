"""A tiny random checkpoint of any config: sizes shrunk by the meaning of a field's name, every weight randomised."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from porter.errors import SourceError
from porter.verify.reference import asked_of_original, full_logits

LAYERS = 2
WINDOW = 8
HEADS = 4
HIDDEN = 64
MAX_POSITION = 512
_HEAD_DIM = r"(head_dim|dim_head|kv_channels|d_kv)$"
_HIDDEN = r"(hidden_size|d_model|n_embd|dim_model|emb_dim|d_embed|embedding_size|embed_proj_dim)"

# The first rule whose pattern is found in a field's name decides; only whole numbers are replaced, None stays None.
# 131 and 96 are chosen so that the vocabulary has to be padded and everything else divides by 2 and 4.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"^pad_token_id$", 0),
    (r"^(bos|decoder_start)_token_id$", 1),
    (r"^eos_token_id$", 2),
    (r"^(first_k_dense_replace|num_dense_layers|max_window_layers)$", 1),
    (r"(^n_layers?|num_layers|hidden_layers|decoder_layers|encoder_layers)$", LAYERS),
    (r"(key_value_heads|kv_heads|kv_n_heads)$", 2),
    (r"(^|_)d_head$", HIDDEN // HEADS),
    (r"(heads?|n_head)$", HEADS),
    (r"(^topk_group|n_groups?|num_expert_group)$", 1),
    (r"(rotary_dim|index_topk)$", 8),
    (r"(^|_)expand$", 1),  # of state spaces: heads * head_dim = expand * hidden_size
    (r"(^|_)d_ssm$", HIDDEN),
    (r"_layer_period$", 2),
    (r"_layer_offset$", 1),
    (_HEAD_DIM, HIDDEN // HEADS),
    (r"_rank$", 24),
    (r"vocab_size", 131),
    (r"(per_tok|top_?k|top_k_experts|moe_k)$", 2),
    (r"shared_experts$", 1),
    (r"(num_experts|_experts)$", 4),
    (r"(moe|expert|shared)_.*(intermediate|ffn)", 32),
    (r"(intermediate|ffn|feed_forward|inner|d_ff|dim_ff|dff|mlp_hidden)", 96),
    (_HIDDEN, HIDDEN),
    (r"original_max_position", 32),
    (r"(max_position|n_positions|n_ctx|max_seq_len|max_target_positions)", MAX_POSITION),
    (r"window", WINDOW),
    (r"(state_size|d_state|chunk_size)$", 8),
    (r"query_pre_attn_scalar", 24),
)
# What some config classes leave None though their models can't be built without it.
_NEEDED = r"(key_value_heads$|shared_experts|routed_experts|experts_per_tok|^head_dim)$"
_KEPT = frozenset({"chunk_size_feed_forward"})
_KINDS = ("conv", "linear_attention", "full_attention")
_GENERIC = frozenset(PreTrainedConfig().to_dict()) - {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_SOFTCAP = 5.0  # small, so that a lost cap shows
_EPS = 1e-3  # large enough that another eps shows
_FACTOR = 1.25  # for factors that are 1 by default, so that a lost one shows


def model_type_of(architecture: str) -> str:
    """The model type of the installed transformers whose causal LM is `architecture`; SourceError if there is none."""
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == architecture:
            return str(model_type)
    raise SourceError(
        f"the installed transformers has no {architecture} to compare with",
        "give a checkpoint folder with its own code: --model FOLDER --trust-remote-code",
    )


def tiny_config(model_type: str, widths: int = 1) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk; see `shrink`."""
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise SourceError(
            f"unknown model type {model_type}", "see `porter convert --help` for what is accepted"
        ) from error
    return shrink(config, widths)


def shrink(config: PreTrainedConfig, widths: int = 1, /, **overrides: Any) -> PreTrainedConfig:
    """A config of the same class with small sizes, every kind of layer once, and `overrides` on top.

    Heads and hidden states are `widths` times as wide as usual, for engines that have no layers for the smallest.

    Raises OriginalError when the config class rejects them.
    """
    small = _shrink_config(config.to_dict())
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS  # latent attention has a key for every head
    for name, value in small.items() if widths > 1 else ():
        if value in (HIDDEN, HIDDEN // HEADS) and re.search(f"{_HEAD_DIM}|{_HIDDEN}", name):
            small[name] = value * widths
    if "is_decoder" in small:
        small["is_decoder"] = True  # what an encoder's config has to say to be served
    with asked_of_original(f"make a tiny {config.model_type} config", "use --model instead"):
        made = type(config)(**{**small, **overrides})
        return type(config)(**{**small, **_further_kinds(made), **overrides})


def _further_kinds(config: PreTrainedConfig) -> dict[str, Any]:
    """A layer of each kind, if the default has one kind or none and the original knows layers with states besides."""
    original = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if original is None or not hasattr(config, "layer_types"):
        return {}
    text = Path(inspect.getfile(original)).read_text(encoding="utf-8")
    known = [kind for kind in _KINDS if f'"{kind}"' in text]
    present = set(config.layer_types or ())
    if len(known) < 2 or len(present) > 1 or not present <= set(known):
        return {}
    counts: dict[str, Any] = {name: len(known) for name in _LAYER_COUNTS if hasattr(config, name)}
    if hasattr(config, "attn_layer_indices"):
        return {"attn_layer_indices": [1], **counts}
    return {"layer_types": known, **counts}


def write_checkpoint(config: PreTrainedConfig, folder: Path, seed: int = 0, gain: float = 1.0) -> None:
    """Save a randomised model of `config` in `folder` under the names that hub checkpoints use.

    `gain` is a factor on every weight.

    Raises OriginalError when transformers can't build or run a model of that config.
    """
    torch.manual_seed(seed)
    with asked_of_original(f"build a tiny {config.model_type}", "use --model instead"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, gain)
    model.save_pretrained(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel, gain: float = 1.0) -> None:
    """Give every parameter and persistent buffer random values; logits end up spread but not saturated."""
    embedding = model.get_input_embeddings()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            _randomise_tensor(name, tensor, _is_transposed(model, name))
    embedding.weight.normal_(std=0.3)
    if gain == 1.0:
        _spread_logits(model)
        return
    for parameter in model.parameters():
        parameter.mul_(gain)


def _randomise_tensor(name: str, tensor: torch.Tensor, transposed: bool) -> None:
    if tensor.ndim >= 2 and not tensor.eq(tensor.flatten()[0]).all():
        fan_in = tensor.shape[0 if transposed else -1]
        tensor.normal_(std=fan_in**-0.5)
        return
    if isinstance(tensor, nn.Parameter) and not (tensor.abs() < 1e3).all():
        tensor.fill_(1.0)  # from torch.empty: whatever lay there
    if name.endswith("weight"):  # a norm: flipped signs keep a tied head from predicting the token it was given
        tensor.sub_(2 * torch.randint_like(tensor, 2))
    tensor.add_(torch.randn_like(tensor) * 0.2)


def _is_transposed(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


def _spread_logits(model: PreTrainedModel, spread: float = 2.5) -> None:
    head = model.get_output_embeddings()
    for _ in range(3):
        deviation = float(full_logits(model, list(range(3, 35))).std(-1).mean())
        head.weight.mul_(min(max(spread / max(deviation, 1e-6), 0.2), 5.0))


def _shrink_config(config: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in config.items() if name not in _GENERIC}
    small = {name: _shrunk(str(name), value) for name, value in fields.items()}
    return _pick_layers(small, _layer_count(fields))


def _shrunk(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _shrink_config(value)
    if "softcap" in name and isinstance(value, float):
        return _SOFTCAP
    if "eps" in name and isinstance(value, float):
        return _EPS
    if value == 1.0 and isinstance(value, float) and re.search(r"multiplier|scal(e|ing)", name):
        return _FACTOR
    if name == "eos_token_id" and isinstance(value, list):
        return 2
    open_size = value is None and re.search(_NEEDED, name)
    if name in _KEPT or isinstance(value, bool) or not (isinstance(value, int) or open_size):
        return value
    return next((size for pattern, size in _SIZES if re.search(pattern, name)), value)


def _layer_count(fields: dict[str, Any]) -> int:
    return next((fields[name] for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), 0)


def _pick_layers(fields: dict[str, Any], count: int) -> dict[str, Any]:
    """Cut every per-layer list to one entry for each kind of layer; lists of one kind are left to the config class."""
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == count > 1}
    rows = list(zip(*lists.values(), strict=True))
    kinds = sorted({rows.index(row) for row in rows})
    if len(kinds) < 2:
        return {name: value for name, value in fields.items() if name not in lists}
    counts: dict[str, Any] = {name: len(kinds) for name in _LAYER_COUNTS if name in fields}
    return {**fields, **counts, **{name: [value[i] for i in kinds] for name, value in lists.items()}}

"""Other values for the fields of a config that change a model's structure: what a port must also get right."""

import inspect
import re
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from porter.analyze.serving import SERVING
from porter.manifest import Port
from porter.verify.fields import fields_read
from porter.verify.tiny import HEADS, HIDDEN, WINDOW, shrink

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE = {
    "rope-linear": {"rope_type": "linear", "factor": 4.0},
    "rope-llama3": {**_LLAMA3, "original_max_position_embeddings": 32},
    "rope-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
_YARN_MSCALE = {**_ROPE["rope-yarn"], "mscale": 0.7, "mscale_all_dim": 0.9}
# Values worth trying besides the default. A field's other values, and what has to change along with it.
_ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1, HEADS),
    "n_kv_heads": (1, HEADS),
    "head_dim": (24,),
    "sliding_window": (WINDOW, None),
    "word_embed_proj_dim": (HIDDEN // 2,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("relu",),
    "hidden_activation": ("relu",),
    "activation_function": ("tanh",),
    "activation": ("relu",),
}
_COMPANIONS: dict[str, dict[str, Any]] = {
    "use_sliding_window": {"sliding_window": WINDOW, "max_window_layers": 1},
    "new_decoder_architecture": {"num_kv_heads": 2},
}
_NOT_STRUCTURE = frozenset(SERVING)
# Floats that change no output, or that other variants change.
_NO_FACTOR = r"eps|drop|range|std|init|loss|coef|jitter|prob|partial|rope|rotary"
_OTHER = 0.75  # of a factor's usual value
_FAINT = 0.03  # small enough that the eps of a norm matters beside what it is given


@dataclass(frozen=True)
class Variant:
    """A name for the report, the config fields that differ from the tiny default, and a factor on all weights."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.0


def variants(config: PreTrainedConfig, port_file: Path, same_release: bool = True) -> list[Variant]:
    """The default, faint weights, other factors, and each other value of a field that the port or its original reads.

    The original's own fields count only if the port is of the `same_release`: a file of another one may be older than
    the field. Whether the original takes the value shows when it is run with it.
    """
    read = fields_read(port_file) | (_fields_of_original(config) if same_release else frozenset())
    first = [Variant("default"), Variant("faint", _larger_eps(config), _FAINT)]
    return [*first, *_factors(config, read), *_values(config, read), *_flags(config, read), *_ropes(config, read)]


def _fields_of_original(config: PreTrainedConfig) -> frozenset[str]:
    """What the installed file reads: a port that lost a field must be tried with other values of it too."""
    original = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return frozenset() if original is None else fields_read(Path(inspect.getfile(original)), but_in="_init_weights")


def _larger_eps(config: PreTrainedConfig) -> dict[str, float]:
    """Other values of every eps, so that one that a port has by heart shows."""
    small = config.to_dict()
    return {name: 3 * value for name, value in small.items() if "eps" in name and isinstance(value, float)}


def _factors(config: PreTrainedConfig, read: frozenset[str]) -> list[Variant]:
    """Another value of every factor, cap or limit at once, so that one that a port has by heart shows."""
    small = shrink(config).to_dict()
    floats = {name: value for name, value in small.items() if name in read and isinstance(value, float)}
    others: dict[str, Any] = {
        name: _OTHER * value for name, value in floats.items() if value and not re.search(_NO_FACTOR, name)
    }
    rope = small.get("rope_parameters") or {}
    if "rope_parameters" in read and isinstance(rope.get("rope_theta"), float):
        others["rope_parameters"] = {**rope, "rope_theta": _OTHER * rope["rope_theta"]}
    return [Variant("other factors", others)] if others else []


def of_this_release(port: Port) -> bool:
    """Whether a port was made from a file of the installed transformers."""
    return (port.manifest.get("source") or {}).get("transformers") == version("transformers")


def unread_fields(config: PreTrainedConfig, port: Port) -> dict[str, None]:
    """Fields that the config class works out by itself when they are None and that a port of another release ignores.

    An old file may have 4 * hidden_size where today's original reads a field. The two are the same model only where
    that field has the value that the class gives it, so it is left to the class. A port of the installed release gets
    no such help.
    """
    if of_this_release(port):
        return {}
    read = fields_read(port.path)
    defaults = {field.name for field in fields(config) if field.default is None} if is_dataclass(config) else set()
    derived = [name for name in sorted(defaults - read) if isinstance(getattr(config, name, None), int)]
    return dict.fromkeys(derived)


def _values(config: PreTrainedConfig, read: frozenset[str]) -> list[Variant]:
    small = shrink(config)
    return [
        Variant(f"{name}={value}", {name: value})
        for name, values in _ALTERNATIVES.items()
        if name in read and hasattr(config, name)
        for value in values
        if value != getattr(small, name)
    ]


def _flags(config: PreTrainedConfig, read: frozenset[str]) -> list[Variant]:
    flags = {name: value for name, value in config.to_dict().items() if isinstance(value, bool)}
    names = sorted((read | {"tie_word_embeddings"} | _COMPANIONS.keys()) & flags.keys() - _NOT_STRUCTURE)
    return [
        Variant(f"{name}={not flags[name]}", {name: not flags[name], **_companions(config, name)}) for name in names
    ]


def _companions(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    return {key: value for key, value in _COMPANIONS.get(name, {}).items() if hasattr(config, key)}


def _ropes(config: PreTrainedConfig, read: frozenset[str]) -> list[Variant]:
    rope = getattr(config, "rope_parameters", None)
    if "rope_parameters" not in read or not rope or "rope_type" not in rope:
        return []
    kinds = {**_ROPE, "rope-yarn-mscale": _YARN_MSCALE} if "qk_rope_head_dim" in read else _ROPE
    return [Variant(name, {"rope_parameters": {**rope, **scaling}}) for name, scaling in kinds.items()]

"""The names of a checkpoint's tensors as vLLM's WeightsMapper, from the weight rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from porter.spec import ModelSpec

# what old checkpoints carry and no model needs
ALWAYS_SKIPPED = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias")

_ORDER = ("q", "k", "v", *range(16))  # shard ids as a packed layer lays them out


def class_lines(spec: ModelSpec) -> str:
    """The class attributes of a vLLM model that speak of names: mapper, packed modules, embeddings."""
    patterns = ", ".join(f"re.compile({pattern!r}): {new!r}" for pattern, new in _patterns(spec))
    mapper = f"WeightsMapper(orig_to_new_regex={{{patterns}}})" if patterns else "WeightsMapper()"
    packed = {name: sorted(parts, key=lambda p: _ORDER.index(parts[p])) for name, parts in spec.weights.packed.items()}
    tables = {"embedding": "input_embeddings", "head": "output_embeddings"}
    found = {getattr(spec, k).rpartition(".")[2]: v for k, v in tables.items() if getattr(spec, k)}
    embeddings = ", ".join(f'"{name}": "{kind}"' for name, kind in found.items())
    return f"hf_to_vllm_mapper = {mapper}\npacked_modules_mapping = {packed!r}\nembedding_modules = {{{embeddings}}}\n"


def _patterns(spec: ModelSpec) -> Iterator[tuple[str, str | None]]:
    rules = spec.weights
    for old, new in rules.renames.items():
        yield _segments(old), rf"\g<1>{new}\g<2>" if new else r"\g<1>"
    yield from _base(spec, rules.base_prefix)
    if spec.layers:
        for skipped in dict.fromkeys((*rules.skip, *ALWAYS_SKIPPED)):
            yield _segments(skipped), None


def _segments(path: str) -> str:
    """A pattern that finds `path` as a run of whole dotted segments."""
    return rf"(^|\.){re.escape(path)}(\.|$)"


def _base(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, str]]:
    """Checkpoints of the bare model lack the prefix that the port's layers have, or have it where the port's don't."""
    tops = sorted({path.partition(".")[0] for path in spec.layers} | set(_heads(spec.weights.tied)))
    if not prefix or not tops:
        return
    if prefix in tops:
        known = "|".join(re.escape(top) + r"(?:\.|$)" for top in tops)
        yield rf"^(?!{known})", f"{prefix}."
    else:
        yield rf"^{re.escape(prefix)}\.", ""


def _heads(tied: Mapping[str, str]) -> Iterator[str]:
    for name in tied:
        yield name.partition(".")[0]

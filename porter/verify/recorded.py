"""Reads what a recording script wrote where the original runs, and writes that script."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from porter.errors import OriginalError
from porter.verify import record, trace
from porter.verify.reference import ReferenceRun
from porter.verify.trace import Call, Trace


@dataclass(frozen=True)
class Recorded:
    """An original's run: its prompts, module outputs and logits, and the greedy tokens after each prompt.

    `new_logits[i]` `[new_tokens, vocab]` are those that `new_tokens[i]` were chosen from.
    """

    prompts: list[list[int]]
    run: ReferenceRun
    new_tokens: list[list[int]]
    new_logits: torch.Tensor
    versions: dict[str, str]

    def logits_after(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
        """Logits for as many of `tokens` as follow the recorded ones, and for the first that does not."""
        which = self.prompts.index(list(prompt))
        pairs = zip(tokens, self.new_tokens[which], strict=False)
        differs = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(tokens))
        return self.new_logits[which][: min(differs + 1, len(tokens))]


def load_recorded(path: Path) -> Recorded:
    """Read a recording; OriginalError if it is none."""
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            kept = file.metadata() or {}
        calls = [_call(tensors, each) for each in json.loads(kept["calls"])]
        lengths, ids = tensors["lengths"].tolist(), tensors["token_ids"]
        run = ReferenceRun(Trace(len(ids), calls), tensors["logits"])
        prompts = [part.tolist() for part in ids.split(lengths)]
        new = tensors["new_token_ids"].tolist()
        return Recorded(prompts, run, new, tensors["new_logits"], json.loads(kept["versions"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OriginalError(
            f"{path} is no recording of an original ({error})",
            "make one with the script that `porter reference` writes",
        ) from error


def _call(tensors: dict[str, torch.Tensor], each: dict[str, Any]) -> Call:
    number = each["number"]
    inputs = {name: tensors[f"{number}.in.{name}"] for name in each["inputs"]}
    return Call(each["module"], inputs, tuple(tensors[f"{number}.out.{i}"] for i in range(each["outputs"])))


def script() -> str:
    """The recording script as one file: what records modules, then what runs the model."""
    head, body = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (trace, record))
    about, _, rest = body.partition('"""\n\n')
    rest = re.sub(r"^from porter\.[^\n]*\n", "", rest, flags=re.MULTILINE)
    shared = head.partition('"""\n\n')[2]
    imports = [line for text in (shared, rest) for line in re.findall(r"^(?:import|from) [^\n]*\n", text, re.MULTILINE)]
    plain = [re.sub(r"^(?:import|from) [^\n]*\n", "", text, flags=re.MULTILINE).strip() for text in (shared, rest)]
    return f'{about}"""\n\n{"".join(sorted(set(imports)))}\n\n{plain[0]}\n\n\n{plain[1]}\n'

"""One checkpoint and the port that is to serve it: what every check works on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from porter.runtime.config import DTYPES
from porter.runtime.layers.state import keeps_states
from porter.verify.compare import Originals, originals, other_choices
from porter.verify.memory import Spool, give_back
from porter.verify.port_run import PortRun, load_port_weights, new_port, port_logits, run_port
from porter.verify.recorded import Recorded
from porter.verify.reference import ReferenceRun, full_logits, load_reference, run_reference
from porter.verify.schedule import Schedule
from porter.verify.tolerances import Tolerance, tolerance
from porter.verify.trace import Keep

T = TypeVar("T")
SHORT = 64  # tokens
FEW_TIES = 0.2  # of the tokens; a router that is wrong sends more of them elsewhere
_OF_ORIGINAL = (
    "reference",
    "reference_run",
    "rounded_run",
    "expected_logits",
    "logit_rounding",
    "logits_after",
    "chooses_otherwise",
)


@dataclass
class Subject:
    """`folder` is the checkpoint, `prompts` the token ids that all checks share; models are made when asked for.

    `frugal`: no more is held at a time than the original, one port and what the prompts' logits take.
    `same_release`: whether the port was made from the file that the original runs.
    """

    folder: Path
    port_file: Path
    port: type[nn.Module]
    config: Any
    dtype: str
    prompts: list[list[int]]
    tp: tuple[int, ...] = (2,)
    trust_remote_code: bool = False
    recorded: Recorded | None = None
    frugal: bool = False
    same_release: bool = True
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tolerance(self) -> Tolerance:
        return tolerance(self.dtype)

    @property
    def half(self) -> bool:
        return self.dtype != "float32"

    @property
    def short_prompts(self) -> list[list[int]]:
        """The prompts that are continued by generation."""
        return [prompt for prompt in self.prompts if len(prompt) <= SHORT]

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token of the flat batch."""
        return torch.cat([torch.arange(len(prompt)) for prompt in self.prompts])

    @property
    def reference(self) -> PreTrainedModel:
        """The original in float32: the truth."""
        return self.memo("reference", lambda: load_reference(self.folder, torch.float32, self.trust_remote_code))

    @property
    def reference_run(self) -> ReferenceRun:
        if self.recorded is not None:
            return self.recorded.run
        return self.memo("reference_run", lambda: run_reference(self.reference, self.prompts, self._keep))

    @property
    def expected_logits(self) -> torch.Tensor:
        """The original's logits `[num_tokens, vocab]`, in float32."""
        return self.memo("expected_logits", lambda: self.reference_run.logits)

    @property
    def port_logits(self) -> torch.Tensor:
        """The port's logits `[num_tokens, vocab]`, in float32."""
        return self.memo("port_logits", lambda: self.port_run.logits)

    @property
    def keeps_states(self) -> bool:
        """Whether some layer of the port keeps a state of each sequence, told once so that no model is kept for it."""
        return self.memo("keeps_states", lambda: keeps_states(self.model))

    @property
    def logit_rounding(self) -> float:
        """How far rounding alone moves the original's logits at most."""
        return self.memo("logit_rounding", lambda: float((self.rounded_run.logits - self.expected_logits).abs().max()))

    @property
    def original_calls(self) -> Originals:
        """The calls of the original's modules that hold parameters."""
        if self.recorded is not None:
            return self.recorded.run.trace.by_module()
        return originals(self.reference_run.trace, self.reference)

    def logits_after(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
        """The original's logits that each of `tokens` was to be chosen from; a recording ends at the first other."""
        if self.recorded is not None:
            return self.recorded.logits_after(prompt, tokens)
        known: dict[tuple[int, ...], torch.Tensor] = self.memo("logits_after", dict)
        ids = prompt + tokens[:-1]
        if ids not in known:
            known[ids] = full_logits(self.reference, list(ids))[len(prompt) - 1 :]
        return known[ids]

    @property
    def rounded_run(self) -> ReferenceRun:
        """The original in the working dtype: what rounding alone costs."""
        return self.memo("rounded_run", self._run_rounded)

    @property
    def model(self) -> Any:
        """The port in the working dtype, loaded."""
        return self.memo("model", lambda: load_port_weights(self.build(), self.folder))

    @property
    def port_run(self) -> PortRun:
        return self.memo("port_run", lambda: run_port(self.model, self.prompts, self.torch_dtype, keep=self._keep))

    @property
    def chooses_otherwise(self) -> bool:
        """Whether rounding alone sends tokens to other experts in the original: not all can be compared then."""
        return self.memo("chooses_otherwise", lambda: self.half and _choices_differ(self))

    @property
    def tips(self) -> bool:
        """Whether, in float32, a few tokens go to other experts than the original's, as at a tie between two."""
        if self.half:
            return False
        theirs = self.original_calls
        calls = [c for c in self.port_run.trace.calls if len(theirs.get(c.module, ())) == 1]
        shares = [other_choices(c.outputs, theirs[c.module][0].outputs) for c in calls]
        return 0 < max(shares, default=0.0) <= FEW_TIES

    def build(self, linear_method: Any = None) -> Any:
        """A fresh instance of the port, its weights not loaded."""
        return new_port(self.port, self.config, self.torch_dtype, linear_method)

    def logits(self, model: Any, steps: Schedule | None = None) -> torch.Tensor:
        """Logits `[num_tokens, vocab]` of an instance of the port on the prompts, in one forward or step by step."""
        return port_logits(model, self.prompts, self.torch_dtype, steps)

    def with_port(self, port_file: Path, port: type[nn.Module]) -> "Subject":
        """The same checkpoint and original, what is known of them included, and another port."""
        known = {name: made for name, made in self._made.items() if name in _OF_ORIGINAL}
        return replace(self, port_file=port_file, port=port, _made=known)

    def release(self, *names: str) -> None:
        """Free what was made under these names, if memory is to be spared; what is needed again is made again."""
        if self.frugal:
            for name in names:
                self._made.pop(name, None)
            give_back()

    @property
    def _keep(self) -> Keep:
        return Spool() if self.frugal else torch.clone

    def memo(self, name: str, make: Callable[[], T]) -> T:
        """make(), once for each name."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _run_rounded(self) -> ReferenceRun:
        model = load_reference(self.folder, self.torch_dtype, self.trust_remote_code)
        run = run_reference(model, self.prompts, self._keep)
        del model
        self.release()
        return run


def _choices_differ(subject: Subject) -> bool:
    """Whether a whole-number input over tokens (which experts) is another in the original's own half-precision run."""
    pairs = zip(subject.reference_run.trace.calls, subject.rounded_run.trace.calls, strict=False)
    choices = [(call.inputs.get(name), given) for call, other in pairs for name, given in other.inputs.items()]
    return any(one is not None and not given.is_floating_point() and not one.equal(given) for one, given in choices)

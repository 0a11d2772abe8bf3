"""What a person asks `porter verify` for; light, so that the command line can build it."""

from dataclasses import dataclass
from pathlib import Path

from porter.errors import UsageError
from porter.verify.tolerances import tolerance

ENGINES = {"porter": "native", "vllm": "vllm"}  # and the emit target of the ports that each runs


@dataclass(frozen=True)
class Request:
    """`subject` is a port, a source or a model type; either `model` (real weights) or `random` is given.

    `engine` is what runs the port: porter's runtime, or the vLLM of `vllm_python`. `tp` are the sizes to compare with
    1; empty: the smallest that divides the model's heads. `reference` is a recording of the original, for
    code that does not run here.
    """

    subject: str | None = None
    model: str | None = None
    random: bool = False
    dtype: str = "float32"
    tp: tuple[int, ...] = ()
    port: Path | None = None
    trust_remote_code: bool = False
    engine: str = "porter"
    vllm_python: Path | None = None
    reference: Path | None = None

    @property
    def target(self) -> str:
        """The emit target of the ports that the engine runs."""
        return ENGINES[self.engine]

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["porter verify", *([self.subject] if self.subject else [])]
        words += ["--random"] if self.random else [f"--model {self.model}"]
        words += [f"--dtype {self.dtype}"] if self.dtype != "float32" else []
        words += [*(f"--tp {size}" for size in self.tp), *([f"--port {self.port}"] if self.port else [])]
        words += [f"--reference {self.reference}"] if self.reference else []
        return " ".join([*words, *(["--trust-remote-code"] if self.trust_remote_code else [])])

    def __post_init__(self) -> None:
        tolerance(self.dtype)
        if self.engine not in ENGINES:
            raise UsageError(f"there is no engine {self.engine!r}", f"choose one of {', '.join(ENGINES)}")
        if (self.model is None) == (not self.random):
            raise UsageError("verify needs weights, real or random", "pass either --model FOLDER or --random")
        if self.random and self.subject is None and self.port is None:
            raise UsageError("--random needs something to verify", "name a port, a modeling file or a model type")
        if self.reference is not None and (self.random or self.dtype != "float32"):
            raise UsageError("--reference holds one float32 run on real weights", "pass --model FOLDER --dtype float32")
        if any(size < 2 for size in self.tp):
            raise UsageError("--tp takes sizes of 2 or more", "every other check already runs with 1")

"""Runs the seeded faults: each in ports that it fits, through the checks that `porter verify --random` makes."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from porter.errors import OriginalError, PorterError
from porter.manifest import Port, write_port
from porter.runtime.errors import EngineError
from porter.runtime.model_registry import load_port
from porter.verify.faults import attention, layers, loading, rounding
from porter.verify.faults.fault import Fault
from porter.verify.faults.mutate import Site
from porter.verify.reference import quiet_transformers
from porter.verify.request import Request
from porter.verify.result import Case, Check
from porter.verify.run import few_threads, random_subject, run_case, variant_checks
from porter.verify.subject import Subject
from porter.verify.tiny import model_type_of, tiny_config
from porter.verify.variants import Variant, variants

FAULTS: tuple[Fault, ...] = (*attention.FAULTS, *layers.FAULTS, *loading.FAULTS, *rounding.FAULTS)
# Old and new, dense and sparse; between them every trait of attention, every layer and every layout that ports have.
MODELS = (
    "llama",
    "gpt2",
    "mixtral",
    "bloom",
    "gemma2",
    "opt",
    "gpt_oss",
    "gpt_neox",
    "granite",
    "qwen2_moe",
    "starcoder2",
    "cohere",
    "phi",
    "qwen3",
)
PORTS_PER_FAULT = 3
Told = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One fault in one port, and what the verifier made of it.

    `broken` is the module with the fault, `named` the one that the report names; `caught_by` is the check, '' if none.
    """

    fault: str
    family: str
    model: str
    broken: str
    case: str = ""
    caught_by: str = ""
    named: str = ""
    located: bool | None = None
    explained: bool | None = None
    detail: str = ""

    @property
    def caught(self) -> bool:
        return bool(self.caught_by)


@dataclass(frozen=True)
class RightPort:
    """A port without a fault: its checks' first failure is a false alarm, told in `alarm`."""

    model: str
    dtype: str
    cases: int
    alarm: str = ""


@dataclass
class Lab:
    """A right port with the checkpoints of its variants, whose originals are run once for all faults."""

    model: str
    port: Port
    folder: Path
    text: str
    _subjects: dict[tuple[str, str], Subject] = field(default_factory=dict)

    def subject(self, variant: Variant, dtype: str) -> Subject:
        """The right port on a variant's checkpoint; OriginalError if its original can't run."""
        key = (variant.name, dtype)
        if key not in self._subjects:
            folder = self.folder / f"checkpoint-{len(self._subjects)}"
            request = Request(port=self.port.path, random=True, dtype=dtype)
            self._subjects[key] = random_subject(request, self.port, load_port(self.port.path), variant, folder, {})
        return self._subjects[key]

    def first_failure(self, port_file: Path, dtype: str) -> tuple[int, Case | None]:
        """How many cases were tried, and the first that fails."""
        port, tried = load_port(port_file), 0
        for variant in variants(tiny_config(model_type_of(self.port.architecture)), port_file):
            try:
                original = self.subject(variant, dtype)
                _ = original.reference_run
                subject = original.with_port(port_file, port)
                case = run_case(variant.name, variant.overrides, subject, lambda step: None, _quick_checks)
            except OriginalError:
                continue
            tried += 1
            if case.failure is not None:
                return tried, case
        return tried, None


def _quick_checks(subject: Subject) -> Iterator[tuple[str, Callable[[], Check]]]:
    return variant_checks(subject, thorough=False)


def run(models: tuple[str, ...], faults: tuple[Fault, ...], told: Told) -> tuple[list[Trial], list[RightPort]]:
    """Every fault in up to PORTS_PER_FAULT of the ports that have a place for it, and every port without a fault."""
    trials, right = [], []
    quiet_transformers()
    with few_threads(True), ExitStack() as stack:
        labs = [_lab(model, Path(stack.enter_context(tempfile.TemporaryDirectory()))) for model in models]
        for lab in labs:
            right += [_right(lab, dtype) for dtype in ("float32", "bfloat16")]
            told(f"{lab.model}: {right[-2].alarm or 'no alarm'}; bfloat16: {right[-1].alarm or 'no alarm'}")
        for number, fault in enumerate(faults):
            for lab, site in _places(fault, labs, number):
                trials.append(_try(fault, lab, site))
                told(_told(trials[-1]))
    return trials, right


def _lab(model: str, folder: Path) -> Lab:
    from porter.convert import convert
    from porter.source import load

    conversion = convert(load(model))
    return Lab(model, write_port(folder / "port", conversion.code, conversion.manifest), folder, conversion.code)


def _right(lab: Lab, dtype: str) -> RightPort:
    tried, case = lab.first_failure(lab.port.path, dtype)
    failure = case.failure if case else None
    alarm = f"{case.name}: {failure.name}: {failure.detail or failure.figure}" if case and failure else ""
    return RightPort(lab.model, dtype, tried, alarm)


def _places(fault: Fault, labs: list[Lab], number: int) -> Iterator[tuple[Lab, Site]]:
    """The fault's place in some ports, beginning with another port for each fault so that all get their share."""
    start, found = number * 5 % len(labs), 0
    for lab in labs[start:] + labs[:start]:
        places = [site for site in fault.mutate(lab.text) if _compiles(site.text)]
        if places and found < PORTS_PER_FAULT:
            found += 1
            yield lab, places[(number + found) % len(places)]


def _compiles(text: str) -> bool:
    try:
        compile(text, "port", "exec")
    except SyntaxError:
        return False
    return True


def _try(fault: Fault, lab: Lab, site: Site) -> Trial:
    trial = Trial(fault.name, fault.family, lab.model, site.broken)
    file = lab.folder / "port" / "faulty" / lab.port.path.name
    file.parent.mkdir(exist_ok=True)
    file.write_text(site.text, encoding="utf-8")
    try:
        _, case = lab.first_failure(file, fault.dtype)
    except (PorterError, EngineError) as error:
        return replace(trial, case="default", caught_by="loading", explained=True, detail=str(error))
    if case is None or case.failure is None:
        return trial
    failure = case.failure
    named = failure.data.get("culprit")
    words = failure.detail.lower()
    return replace(
        trial,
        case=case.name,
        caught_by=failure.name,
        named=named if named is not None else "",
        located=_located(lab, case.name, site, failure),
        explained=any(word in words for word in fault.causes),
        detail=failure.detail,
    )


def _located(lab: Lab, case: str, site: Site, failure: Check) -> bool | None:
    """Whether the module that is named is the broken one, or the nearest around it that the original has too.

    None where the check names no module by its nature: the ledger names tensors.
    """
    if failure.name == "ledger":
        return None
    model = next(subject.model for (name, _), subject in lab._subjects.items() if name == case)
    named = failure.data.get("culprit")
    if named is None:
        return False
    broken = {path for path, module in model.named_modules() if _is_broken(path, module, model, site)}
    known = _compared(lab, case)
    return named in {_nearest(path, known) for path in broken} | broken


def _is_broken(path: str, module: nn.Module, model: nn.Module, site: Site) -> bool:
    parent, last = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    if not site.owner:
        return any(word == "*" or word in last for word in site.attribute.split("|"))
    if site.attribute and type(parent).__name__ == site.owner and last == site.attribute:
        return True
    if type(module).__name__ != site.owner:
        return False
    return not (site.built and site.attribute in dict(module.named_children()))


def _compared(lab: Lab, case: str) -> set[str]:
    from porter.verify.checks import modules

    subject = next(subject for (name, _), subject in lab._subjects.items() if name == case)
    rows = subject.memo("compared", lambda: modules.check(subject).data["modules"])
    return {row["module"] for row in rows} | {""}


def _nearest(path: str, known: set[str]) -> str:
    while path not in known:
        path = path.rpartition(".")[0]
    return path


def _told(trial: Trial) -> str:
    verdict = f"caught by {trial.caught_by} in {trial.case}" if trial.caught else "NOT CAUGHT"
    marks = "" if not trial.caught else f", located {trial.located}, explained {trial.explained}"
    return f"{trial.fault} in {trial.model} ({trial.broken}): {verdict}{marks}; {trial.named}; {trial.detail}"

"""Runs all checks on all cases of a request."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from porter import __version__
from porter.errors import OriginalError
from porter.manifest import Port, record_verification
from porter.runtime.checkpoint import load_config, resolve_model
from porter.runtime.errors import MachineError
from porter.runtime.model_registry import load_port
from porter.verify.checks import generation, ledger, logits, matrix, modules, parallel, quantized
from porter.verify.limits import untested
from porter.verify.prompts import random_prompts, text_prompts
from porter.verify.recorded import load_recorded
from porter.verify.reference import quiet_transformers
from porter.verify.request import Request
from porter.verify.result import Case, Check, Verification
from porter.verify.select import Selected, select_port
from porter.verify.sharding import tp_sizes
from porter.verify.subject import Subject
from porter.verify.tiny import model_type_of, shrink, tiny_config, write_checkpoint
from porter.verify.variants import Variant, of_this_release, unread_fields, variants

Told = Callable[[str], None]


@dataclass(frozen=True)
class _Plan:
    """What all cases of a verification share."""

    request: Request
    port: Port
    port_class: type[nn.Module]
    told: Told


def verify(request: Request, told: Told = lambda step: None) -> Verification:
    """Prove what `request` names; `told` hears each step. A port on disk that passes is marked verified.

    Raises PorterError or EngineError when it can't be tried at all; what a check finds is in the result.
    """
    started = time.monotonic()
    quiet_transformers()
    with few_threads(request.random), select_port(request) as selected:
        plan = _Plan(request, selected.port, load_port(selected.port.path), told)
        cases = tuple(_random_cases(plan) if request.random else [_real_case(plan)])
        result = _result(plan, selected, cases, time.monotonic() - started)
        if result.passed and selected.recorded and not selected.converted:
            record_verification(selected.port, result.record())
    return result


@contextmanager
def few_threads(tiny: bool) -> Iterator[None]:
    """One thread while models are tiny: more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if tiny else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _real_case(plan: _Plan) -> Case:
    folder = resolve_model(str(plan.request.model))
    config = load_config(folder, plan.request.trust_remote_code)
    recording = plan.request.reference
    recorded = load_recorded(recording) if recording is not None else None
    prompts = recorded.prompts if recorded else text_prompts(folder, config, plan.request.trust_remote_code)
    sizes = plan.request.tp or (smallest_tp(config),)
    subject = replace(_subject(plan, folder, config, prompts, sizes), recorded=recorded, frugal=True)
    return run_case("real weights", {}, subject, plan.told)


def _random_cases(plan: _Plan) -> Iterator[Case]:
    """The default config, whose original has to run, and its variants, each with fewer checks."""
    config = tiny_config(model_type_of(plan.port.architecture))
    unread = unread_fields(config, plan.port)
    for variant in variants(config, plan.port.path, of_this_release(plan.port)):
        is_default = variant.name == "default"
        try:
            with tempfile.TemporaryDirectory(prefix="porter-tiny-") as folder:
                subject = random_subject(plan.request, plan.port, plan.port_class, variant, Path(folder), unread)
                checks = default_checks if is_default else variant_checks
                case = run_case(variant.name, variant.overrides, subject, plan.told, checks)
                if _compared(case.failure) and subject.tips:  # a tie is one of these prompts, a mistake of any
                    others = replace(subject, prompts=random_prompts(subject.config, seed=1), _made={})
                    case = run_case(variant.name, variant.overrides, others, plan.told, checks)
                yield case
        except OriginalError as error:
            if is_default:
                raise
            yield Case(variant.name, variant.overrides, (), skipped=error.message)


def _compared(failure: Check | None) -> bool:
    """Whether modules were compared and one is wrong; a port that raised has no figure."""
    return failure is not None and failure.name == modules.NAME and bool(failure.figure)


def random_subject(
    request: Request, port: Port, port_class: type[nn.Module], variant: Variant, folder: Path, unread: dict[str, None]
) -> Subject:
    """A tiny random checkpoint of `variant`, written into `folder`; OriginalError if its original can't run."""
    config = shrink(tiny_config(model_type_of(port.architecture)), **{**unread, **variant.overrides})
    write_checkpoint(config, folder, gain=variant.gain)
    config = load_config(folder)
    is_default = variant.name == "default"
    sizes = request.tp or (legal_tp(port_class, config) if is_default else (smallest_tp(config),))
    prompts = random_prompts(config)
    subject = Subject(folder, port.path, port_class, config, request.dtype, prompts, sizes, request.trust_remote_code)
    return replace(subject, same_release=of_this_release(port))


def _subject(plan: _Plan, folder: Path, config: Any, prompts: list[list[int]], sizes: tuple[int, ...]) -> Subject:
    request = plan.request
    return Subject(
        folder,
        plan.port.path,
        plan.port_class,
        config,
        request.dtype,
        prompts,
        sizes,
        request.trust_remote_code,
    )


def smallest_tp(config: Any) -> int:
    """The smallest tp_size from 2 to 8 that divides the number of attention heads; 2 if none does."""
    heads = getattr(config.get_text_config(), "num_attention_heads", 2)
    return next((size for size in range(2, 9) if heads % size == 0), 2)


def legal_tp(port_class: type[nn.Module], config: Any) -> tuple[int, ...]:
    """Every size above 1 that the port allows; the smallest candidate, whose check says why not, if there is none."""
    legal = tuple(size for size in tp_sizes(port_class, config).legal if size > 1)
    return legal or (smallest_tp(config),)


Checks = Callable[[Subject], Iterator[tuple[str, Callable[[], Check]]]]


def run_case(name: str, overrides: dict[str, Any], subject: Subject, told: Told, checks: Checks | None = None) -> Case:
    """The checks of one checkpoint in order; what comes after a failure would only repeat it and is skipped."""
    found: list[Check] = []
    for label, check in (checks or default_checks)(subject):
        told(f"{name}: {label}")
        failed = any(each.status == "FAIL" for each in found)
        found.append(Check(label, "skip", detail="not reached") if failed else check())
    return Case(name, overrides, tuple(found))


def default_checks(subject: Subject) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check, by name; the last starts processes."""
    yield from variant_checks(subject, thorough=True)
    for size in subject.tp[:1]:
        name = f"tp {size} processes"
        yield name, partial(_guarded, name, partial(parallel.check_processes, subject, size))


def variant_checks(subject: Subject, thorough: bool = False) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The checks that start no processes; the engine's pressures one by one if `thorough`."""
    yield "ledger", partial(ledger.check, subject)
    for module in (modules, logits):
        yield module.NAME, partial(_guarded, module.NAME, partial(module.check, subject))
    subject.release("reference_run", "rounded_run", "port_run")
    yield matrix.NAME, partial(_guarded, matrix.NAME, partial(matrix.check, subject))
    subject.release("model")
    yield "greedy", partial(_guarded, "greedy", partial(generation.check, subject, thorough))
    subject.release("reference")
    for size in subject.tp:
        yield f"tp {size}", partial(_guarded, f"tp {size}", partial(parallel.check, subject, size))
        subject.release()
    yield "int8", partial(_guarded, "int8", partial(quantized.check, subject))
    subject.release()


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A port that raises fails the check in which it did; an original that raises leaves nothing to check, a machine
    that is too small or too slow leaves the check unproved."""
    try:
        return check()
    except OriginalError:
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        if _of_the_machine(error):
            return Check(name, "unproved", detail=f"the machine could not do it: {first}")
        return Check(name, "FAIL", detail=f"the port raised {type(error).__name__}: {first}")


def _of_the_machine(error: Exception) -> bool:
    """Out of memory or disk, or a process that was killed or did not start."""
    return isinstance(error, (MachineError, MemoryError, OSError)) or "can't allocate memory" in str(error)


def _unread(plan: _Plan) -> tuple[str, ...]:
    if not plan.request.random:
        return ()
    return tuple(unread_fields(tiny_config(model_type_of(plan.port.architecture)), plan.port))


def _result(plan: _Plan, selected: Selected, cases: tuple[Case, ...], seconds: float) -> Verification:
    request = plan.request
    return Verification(
        architecture=plan.port.architecture,
        port=selected.note,
        port_sha256=plan.port.sha256,
        converted=selected.converted,
        checkpoint="tiny random" if request.random else str(request.model),
        dtype=request.dtype,
        cases=cases,
        limits=untested(request, cases, _unread(plan)),
        versions={"porter": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        seconds=round(seconds, 1),
        command=request.command,
        hashes={"port": plan.port.sha256, **_hashes(cases)},
        tp_sizes=_tp_sizes(plan),
    )


def _hashes(cases: tuple[Case, ...]) -> dict[str, str]:
    """Of the first case's config and checkpoint."""
    found = (check.data.get("hashes") for case in cases for check in case.checks)
    return next((hashes for hashes in found if hashes), {})


def _tp_sizes(plan: _Plan) -> dict[str, Any]:
    """The table of sizes for the config that people serve: the checkpoint's, or the model type's default."""
    request = plan.request
    if request.random:
        config = AutoConfig.for_model(model_type_of(plan.port.architecture))
    else:
        config = load_config(resolve_model(str(request.model)), request.trust_remote_code)
    try:
        return asdict(tp_sizes(plan.port_class, config))
    except Exception as error:  # a default config that no checkpoint has: some can't be built by the original either
        return {"legal": [], "illegal": {}, "error": f"{type(error).__name__}: {error}"}

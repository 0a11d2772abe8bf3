"""What each command calls and prints. Heavy modules are imported only where they are used."""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter import console, registry
from porter.atomic import write_files
from porter.errors import CheckFailed, EditedError, PorterError, UsageError, explained_config
from porter.manifest import MANIFEST, Port, dumps, read_port, write_port

if TYPE_CHECKING:
    from porter.passes.base import Pass
    from porter.runtime.engine import LLM
    from porter.runtime.sampling import SamplingParams
    from porter.targets.base import TargetPass
    from porter.verify.request import Request


@dataclass(frozen=True)
class ConvertOptions:
    """Flags of `porter convert`."""

    diff: bool = False
    check: bool = False
    json: bool = False
    force: bool = False


@dataclass(frozen=True)
class Sampling:
    """Options that `complete` and `chat` share."""

    port: Path | None
    dtype: str
    max_tokens: int
    temperature: float
    seed: int | None

    def params(self) -> "SamplingParams":
        from porter.runtime.sampling import SamplingParams

        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)


def convert(source_name: str, out: Path | None, target: str, options: ConvertOptions) -> None:
    """`porter convert`."""
    with console.working(f"converting {source_name}"):
        from porter import convert as converter
        from porter import source as sources

        source = sources.load(source_name)
        conversion = converter.convert(source, target=target)
    module = Path(conversion.module_name)
    folder = out or Path("ports") / (module.parent.name or module.stem)
    if options.check:
        _check_drift(folder, conversion)
        return
    if options.diff:
        from porter.diffing import port_diff

        name = str(conversion.manifest["module"])
        edits = conversion.manifest.get("edits") or []
        console.diff(port_diff((source_name, source.text), (name, conversion.code), edits))
        if out is None:
            return
    port = write_port(folder, conversion.code, conversion.manifest, others=conversion.others, force=options.force)
    _print_converted(port, options.json)


def _check_drift(folder: Path, conversion: Any) -> None:
    from porter.diffing import text_diff

    port = read_port(folder)
    on_disk = port.path.read_text(encoding="utf-8")
    console.diff(text_diff(on_disk, conversion.code, str(port.path), "regenerated"))
    stale = _stale_entries(port, conversion.manifest)
    if on_disk != conversion.code:
        remedy = "run `porter convert` again, with --force if edited"
        raise CheckFailed(f"{port.path} is not what its source gives", remedy)
    if stale:
        what = f"{', '.join(stale)} of {port.folder / MANIFEST}"
        raise CheckFailed(f"{what} is not what the source gives", "run `porter convert` again")
    console.say(f"{port.path} is up to date")


def _stale_entries(port: Port, manifest: dict[str, Any]) -> list[str]:
    """The manifest's entries that converting again would change; the record of a verification is no such entry."""
    regenerated = json.loads(dumps(manifest))  # as it would be read back
    names = sorted({*port.manifest, *regenerated} - {"verified"})
    return [name for name in names if port.manifest.get(name) != regenerated.get(name)]


def _print_converted(port: Port, json: bool) -> None:
    if json:
        console.print_json({"path": str(port.path), "manifest": port.manifest})
        return
    console.result(str(port.path))
    edits = port.manifest.get("edits") or []
    console.say(f"{port.architecture}: {len(edits)} edits, each with its reason in port.json and in --diff")
    engine = "" if port.target == "native" else f" --engine {port.target}"
    console.say(f"next: porter verify {port.folder}{engine} --random, or --model CHECKPOINT")


def verify(request: "Request", json: bool, html: Path | None = None) -> int:
    """`porter verify`; returns the exit code."""
    with console.progress("loading torch and transformers", None) as advance:
        from porter.verify.report import print_verification

        if request.engine == "vllm":
            from porter.vllm.verify import verify as run
        else:
            from porter.verify.run import verify as run
        result = run(request, advance)
    if html:
        from porter.atomic import write_files
        from porter.verify.html import page

        write_files(html.parent, {html.name: page(result)})
    if json:
        console.print_json(result.to_json())
    else:
        print_verification(result)
    return CheckFailed.exit_code if result.failure else 0 if result.passed else PorterError.exit_code


def conform(path: Path, places: list[str], json: bool) -> int:
    """`porter conform`; returns the exit code."""
    from porter.vllm.conform import conform as check
    from porter.vllm.conform import port_files
    from porter.vllm.versions import symbols_for

    port = read_port(path)
    files = port_files(port.folder)
    if port.target != "vllm":
        raise UsageError(f"{port.path} is no port for vLLM", "convert with --target vllm")
    found = {version: check(files, symbols) for version, symbols in symbols_for(files, places)}
    if json:
        console.print_json({version: [asdict(each) for each in misfits] for version, misfits in found.items()})
    else:
        rows = [(version, f"{len(misfits)} misfits" if misfits else "fits") for version, misfits in found.items()]
        console.table("", ("vLLM", port.architecture), rows)
        for version, misfits in found.items():
            for each in misfits:
                console.say(f"{version}: {each}")
    return CheckFailed.exit_code if any(found.values()) else 0


def vllm_env(folder: Path | None, version: str, cpu: bool) -> None:
    """`porter vllm-env`."""
    from porter.vllm import environment

    with console.working(f"installing vLLM {version}"):
        python = environment.make(folder, version, cpu)
    console.result(str(python))
    console.say("`porter verify --engine vllm` uses it from now on")


def reference(out: Path, force: bool) -> None:
    """`porter reference`."""
    with console.progress("loading torch and transformers", None):
        from porter.verify.recorded import script

        text = script()
    if out.exists() and not force and out.read_text(encoding="utf-8") != text:
        raise EditedError(out)
    write_files(out.parent, {out.name: text})
    console.result(str(out))
    console.say(f"next, with the model's own transformers: python {out.name} FOLDER --out reference.safetensors")
    console.say("then: porter verify SOURCE --model FOLDER --reference reference.safetensors")


def register(path: Path, force: bool) -> None:
    """`porter register`."""
    entry = registry.register(read_port(path), force=force)
    console.result(f"{entry.architecture} {entry.id}")
    if entry.replaced:
        console.say(f"it takes the place of {entry.replaced}, which stays in the store")
    if not entry.port.verified:
        console.warn(f"{entry.port.path.name} is not verified as it is now; run `porter verify {path}` first")
    if entry.port.edited:
        console.warn(f"{entry.port.path.name} was edited since porter wrote it")


def list_ports(json: bool) -> None:
    """`porter list`."""
    entries = registry.entries()
    if json:
        console.print_json([_described(entry) for entry in entries])
    elif not entries:
        console.say("no port is registered; `porter register PORT` adds one")
    else:
        rows = [(entry.architecture, entry.id, _origin(entry.port), entry.port.state) for entry in entries]
        console.table("", ("architecture", "port", "source", "state"), rows)


def show(architecture: str, json: bool) -> None:
    """`porter show`."""
    entry = registry.find(architecture)
    if json:
        console.print_json({**_described(entry), "manifest": entry.port.manifest})
        return
    verified = entry.port.manifest.get("verified") or {}
    figures = verified.get("figures") or {}
    rows = [(key, str(value)) for key, value in _described(entry).items()]
    rows += [("checkpoint", str(verified.get("checkpoint"))), ("dtype", str(verified.get("dtype")))] if verified else []
    console.table(
        architecture, ("what", "value"), rows + [(f"  {name}", str(value)) for name, value in figures.items()]
    )


def unregister(architecture: str) -> None:
    """`porter unregister`."""
    entry = registry.unregister(architecture)
    console.result(f"{entry.architecture} {entry.id}")
    console.say("removed from the store")


def _described(entry: registry.Entry) -> dict[str, str]:
    return {
        "architecture": entry.architecture,
        "port": entry.id,
        "path": str(entry.port.path),
        "source": _origin(entry.port),
        "state": entry.port.state,
    }


def _origin(port: Port) -> str:
    source = port.manifest.get("source") or {}
    return str(source.get("name") or Path(str(source.get("path", "?"))).name)


def complete(model: str, prompt: str, options: Sampling, json: bool) -> None:
    """`porter complete`."""
    llm = _engine(model, options)
    output = llm.generate([prompt], options.params(), use_tqdm=False)[0].outputs[0]
    if json:
        tokens = list(output.token_ids)
        console.print_json({"prompt": prompt, "text": output.text, "token_ids": tokens, "reason": output.finish_reason})
    else:
        console.result(prompt + output.text)


def chat(model: str, options: Sampling) -> None:
    """`porter chat`."""
    llm = _engine(model, options)
    messages: list[dict[str, str]] = []
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = ""
        for output in llm.stream(llm.chat_prompt(messages), options.params()):
            answer += output.outputs[0].text
            console.stream(output.outputs[0].text)
        console.stream("\n")
        messages.append({"role": "assistant", "content": answer})


def sweep(given: list[str], out: Path, jobs: int, resume: bool, json: bool) -> int:
    """`porter sweep`; returns the exit code. The scoreboard is written after each row."""
    from porter.verify import scoreboard
    from porter.verify.sweep import sources, sweep

    rows = scoreboard.read(out)
    todo = {name: source for name, source in sources(given).items() if not (resume and name in rows)}
    with console.progress("sweep", len(todo)) as advance:
        for row in sweep(todo, jobs):
            rows[row.name] = row
            scoreboard.write(out, [rows[name] for name in sorted(rows)])
            console.say(f"{row.result:9} {row.name:28} {row.seconds:6.1f} s  {row.reason}")
            advance(row.name)
    if json:
        console.print_json(scoreboard.as_json([rows[name] for name in sorted(rows)]))
    return int(any(row.result not in ("verified", "refused") for row in rows.values())) * CheckFailed.exit_code


def explain(name: str | None) -> None:
    """`porter explain`."""
    from porter.emit import target_settings
    from porter.passes.base import discover
    from porter.refusals import KINDS
    from porter.targets.base import passes_of, stage_of

    if name and name.upper() in KINDS:
        kind = KINDS[name.upper()]
        console.result(f"{kind.code}: {kind.title}\n\n{kind.why}\n\nWhat to do: {kind.remedy}.")
        return

    known: list[Pass | TargetPass] = [*discover(), *passes_of("vllm", target_settings("vllm")["passes"])]
    passes = {_pass_name(each): each for each in known}
    wanted = name.replace("_", "-") if name else None
    if wanted is None:
        rows = [(stage_of(each), title, _purpose(each).splitlines()[0]) for title, each in passes.items()]
        console.table("", ("stage", "pass", "what it does"), rows)
        console.table("", ("code", "refusal"), [(kind.code, kind.title) for kind in KINDS.values()])
    elif wanted not in passes:
        raise UsageError(f"there is no pass or refusal code {name}", "see `porter explain`")
    else:
        _print_pass(wanted, passes[wanted])


def ledger(model: str, port: Path | None, json: bool) -> int:
    """`porter ledger`; returns the exit code."""
    from porter.weights import checkpoint_ledger, outline

    note, result = checkpoint_ledger(outline(model), port)
    console.say(note)
    if json:
        console.print_json(result.to_json())
    else:
        console.table(result.summary, ("tensor", "shape", "goes to", "why"), result.rows())
    return 0 if result.complete else CheckFailed.exit_code


def faults(names: list[str], models: list[str], out: Path | None, json: bool) -> int:
    """`porter faults`; returns the exit code."""
    with console.progress("loading torch and transformers", None) as advance:
        from porter.atomic import write_files
        from porter.verify.faults import suite, table

        chosen = tuple(fault for fault in suite.FAULTS if not names or any(name in fault.name for name in names))
        if not chosen:
            raise UsageError(f"no fault has {' or '.join(names)} in its name", "see docs/faults.md")
        trials, right = suite.run(tuple(models) or suite.MODELS, chosen, advance)
    found = table.as_json(trials, right)
    if out:
        write_files(out, {"faults.json": dumps(found), "faults.md": table.markdown(trials, right)})
    if json:
        console.print_json(found)
    else:
        console.result("\n".join(table.summary(trials, right)))
    rates = table.rates(trials, right)
    return CheckFailed.exit_code if rates.caught < rates.trials or rates.false_alarms else 0


def _engine(model: str, options: Sampling) -> "LLM":
    with explained_config(), console.bytes_progress(f"loading {model}") as progress:
        from porter.runtime.engine import LLM

        return LLM(model, port=options.port, dtype=options.dtype, load_progress=progress)


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            console.stream("> ")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _pass_name(each: "Pass | TargetPass") -> str:
    return each.name.replace("_", "-")


def _purpose(each: "Pass | TargetPass") -> str:
    doc = type(each).__doc__ or sys.modules[type(each).__module__].__doc__ or each.reason
    return inspect.cleandoc(doc)


def _print_pass(name: str, each: "Pass | TargetPass") -> None:
    from porter.diffing import text_diff
    from porter.targets.base import stage_of

    console.result(f"{name} ({stage_of(each)})\n\n{_purpose(each)}\n")
    for example in each.EXAMPLES:
        console.diff([*text_diff(example.before, example.after, "before", "after"), ""])
    for same in each.UNCHANGED:
        console.result(f"left alone ({same.reason}):\n{same.source}")

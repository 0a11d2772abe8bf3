"""Conversion: analyse, rewrite stage by stage, emit, and report every edit with its reason."""

from __future__ import annotations

import ast
import difflib
import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import libcst as cst

from porter import __version__
from porter.analyze import serving
from porter.analyze.counting import looked_up
from porter.analyze.facts import Facts, line_of
from porter.analyze.inline import inline_imports
from porter.analyze.interp import explore
from porter.analyze.mixers import find_mixer
from porter.analyze.program import ClassInfo, Program
from porter.analyze.unused_weights import weighted
from porter.analyze.weights import derive
from porter.emit import emit, target_settings
from porter.errors import Refusal, SourceError
from porter.mixers.apart import check_calls, put_back, set_apart
from porter.passes import edit
from porter.passes.attend_place import read_attention, turns_queries
from porter.passes.base import Pass, Stage, discover
from porter.passes.edit import params_of
from porter.source import Source
from porter.spec import ModelSpec, describe
from porter.targets.base import TargetPass, passes_of, stage_of
from porter.targets.package import package

ROUNDS = 24
_KEPT = "a layer with a state keeps its own arithmetic, over the runtime's states"


@dataclass(frozen=True)
class Edit:
    """One change: the pass that made it, the line of the source that it is about, and why."""

    stage: str
    name: str
    line: int
    before: str
    after: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "stage": self.stage,
            "line": self.line,
            "before": self.before,
            "after": self.after,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Conversion:
    """A port: its module's name and text, the manifest that goes beside it, and what was understood."""

    module_name: str
    code: str
    manifest: dict[str, Any]
    spec: dict[str, Any]
    others: dict[str, str] = field(default_factory=dict)  # further files of the target, by name


def convert(source: Source, target: str = "native") -> Conversion:
    """Rewrite a modeling file into a port. The file is read as text and never run.

    Raises:
        SourceError: it is not Python.
        Refusal: a construct is not understood; nothing is guessed.
        UsageError: there is no such target.
    """
    target_settings(target)
    with _without_collector():
        return _convert(source, target)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Trees and values are many and live until the end: collecting cycles meanwhile takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _convert(source: Source, target: str) -> Conversion:
    work = _Work(source)
    try:
        work.check()
        for stage in Stage:
            work.run_stage(stage)
        facts = work.facts()
        if work.turns and not turns_queries(facts):
            raise Refusal(
                "", 0, "rotation of queries and keys", "it did not survive the rewriting", "report this file", "P900"
            )
        _check_entry(facts)
        rules = derive(source, work.original, facts, work.notes)
        model = replace(describe(facts, rules), requires=work.requires())
        work.put_back()
        work.rewrite_for(target, model)
        code = emit(source, work.tree, model, target)
    except Refusal as refusal:
        raise work.diagnosed(refusal) from refusal
    except RecursionError as error:
        raise Refusal(source.name, 1, "the file", "it nests too deeply to follow", "simplify it") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"porter went wrong on it ({type(error).__name__}: {error})"
        raise Refusal(source.name, 1, "the file", told, "report this file", "P900") from error
    spec = _spec(facts, model, work)
    module, others = package(source, model, code, target)
    return Conversion(module, code, _manifest(source, target, module, code, spec, work, others), spec, others)


def _check_entry(facts: Facts) -> None:
    """The engine calls every port alike."""
    forward = facts.program.method(facts.entry, "forward")
    names = [p.name.value for p in params_of(forward.node)] if forward is not None else []
    if names != ["self", "input_ids", "positions", "kv_caches", "attn_metadata"]:
        raise Refusal(
            "",
            0,
            f"forward({', '.join(names[1:])})",
            "it needs an input that the engine does not have",
            "remove it",
            "P400",
        )


class _Work:
    """The tree as it is now, the facts about it, and the edits so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.lines: list[int] = []  # source line of each line now
        own = _parse(source.text, source.name)
        whole = _parse(inline_imports(own, source.path).code, source.name)
        self.lines = _source_lines(source.text, whole.code)
        try:
            marked, self.apart = set_apart(whole)
        except Refusal as refusal:
            raise self.located(refusal) from refusal
        self.tree, kept = _parse(marked.code, source.name), self.lines
        self.own = frozenset(Program.read(own).classes)
        self.config = _parse(source.config_text, "its configuration") if source.config_text else None
        self.original = Program.read(self.tree, self.config)
        self.code = self.tree.code
        self.passes = discover()
        self.notes: dict[str, Any] = {}
        self.edits: list[Edit] = [
            Edit(
                "STATES",
                "keep_states",
                kept[body.line - 1],
                edit.code(body.original),
                edit.code(body.definition),
                _KEPT,
            )
            for body in self.apart.bodies.values()
        ]
        self.lines = _source_lines(source.text, self.tree.code)
        self.flat = False
        self.checked = False
        self.raised: tuple[frozenset[tuple[str, bool]], ...] = ()  # paths on which the file as it came raises
        self.counts_positions = False
        self.turns = False
        self.assumed: dict[str, Any] = {}  # config fields that were read at any stage and that serving fixes
        self._facts: Facts | None = None

    def check(self) -> None:
        """Read every attention on every path of the file as it came, so that a refusal names its own lines."""
        self._count_positions()
        check_calls(self.facts(), self.apart)
        read_attention(self.facts())
        self.turns = turns_queries(self.facts())
        self.notes["weighted"] = weighted(self.facts().worlds)
        self.checked, self.raised = True, self.facts().raised
        self._facts = None

    def _count_positions(self) -> None:
        """Whether the file, given no position_ids, looks up other positions than 0, 1, 2 ...: those are the original's.

        Some count from a padding id on. Whoever calls the original without positions gets these.
        """
        given = looked_up(self.facts().worlds)
        if given:
            facts, self._facts = self._facts, None
            self.counts_positions = True
            try:
                self.counts_positions = not looked_up(self.facts().worlds) <= given
            except Refusal as refusal:
                if "None" not in refusal.why:
                    raise
                self.counts_positions = False  # arithmetic with None: the original needs them given
            self._facts = self._facts if self.counts_positions else facts

    def facts(self) -> Facts:
        if self._facts is None:
            program = Program.read(self.tree, self.config)
            program.counts_positions = self.counts_positions
            wanted = program.classes.get(self.source.architecture or "")
            entry = wanted if wanted is not None and program.method(wanted, "forward") else program.entry(self.own)
            self._facts = explore(program, entry, self.flat, not self.checked, self.raised)
            self.assumed |= {k: v for world in self._facts.worlds for k, v in world.assumed.items()}
            self._facts.notes = self.notes
        return self._facts

    def requires(self) -> dict[str, Any]:
        """Values that a config must have for the port to be right, but for those that the file itself sets."""
        targets = (
            each.target
            for node in edit.walk(self.original.tree)
            if isinstance(node, cst.Assign)
            for each in node.targets
        )
        own = {t.attr.value for t in targets if isinstance(t, cst.Attribute) and edit.code(t.value).endswith("config")}
        return {name: value for name, value in sorted(self.assumed.items()) if name in serving.BINDING - own}

    def run_stage(self, stage: Stage) -> None:
        """Run a stage's passes to a fixed point, then clean up behind them."""
        own = [p for p in self.passes if p.stage is stage]
        if stage is Stage.FLATTEN:
            for each in own:
                self._apply(each)
            self.flat = True
            self._facts = None
        else:
            self._settle(own)
        if stage is not Stage.STRIP:
            self._settle([p for p in self.passes if p.stage is Stage.STRIP])

    def _settle(self, passes: list[Pass]) -> None:
        idle = 0
        for turn in range(ROUNDS * max(len(passes), 1)):
            changed = self._apply(passes[turn % len(passes)])
            idle = 0 if changed else idle + 1
            if idle >= len(passes):
                return
        raise Refusal("", 0, "the file", "the rewriting does not come to an end", "report this file", "P900")

    def _apply(self, each: Pass) -> bool:
        result = each.apply(self.facts())
        if result is self.tree or (after := result.code) == self.code:
            return False
        before, self.code = self.code, after
        self.tree = _parse(after, f"the file after {each.name}")
        self._facts = None
        self._record(each, before.splitlines(), after.splitlines())
        return True

    def put_back(self) -> None:
        """Bring the layers with states in; the tree is no longer executed after that."""
        before = self.code
        self.tree = _parse(put_back(self.tree, self.apart).code, self.source.name)
        self.code = self.tree.code
        self.lines = [self.lines[min(i, len(self.lines)) - 1] for i in _source_lines(before, self.code)]

    def rewrite_for(self, target: str, model: ModelSpec) -> None:
        """Run a target's own passes; the tree is no longer executed after them."""
        for each in passes_of(target, target_settings(target).get("passes", ())):
            after = each.apply(self.tree, model)
            before, self.code, self.tree = self.code, after.code, after
            self._record(each, before.splitlines(), self.code.splitlines())

    def _record(self, each: Pass | TargetPass, before: list[str], after: list[str]) -> None:
        """Turn the difference that a pass made into edits, and carry the source lines along."""
        lines: list[int] = []
        for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind == "equal":
                lines += self.lines[a:b]
                continue
            blank = next((k for k, line in enumerate(before[a:b]) if line.strip()), 0)
            at = self.lines[min(a + blank, len(self.lines) - 1)]
            kept = {line.strip(): self.lines[a + k] for k, line in reversed(list(enumerate(before[a:b])))}
            lines += [kept.get(line.strip(), at) for line in after[c:d]]
            old, new = "\n".join(before[a:b]).strip(), "\n".join(after[c:d]).strip()
            if old != new:
                self.edits.append(Edit(stage_of(each), each.name, at, old, new, each.reason))
        self.lines = lines or [1]

    def diagnosed(self, refusal: Refusal) -> Refusal:
        """A refusal, located; where the file mixes tokens in another way than attention does, that is the reason."""
        entry = self.entry
        nothing_found = entry is not None and refusal.code == "P201" and refusal.what == entry.name
        early = refusal.code == "P200" or (not self.checked and refusal.code in ("P100", "P101"))
        mixer = find_mixer(self.original, entry) if entry is not None and (early or nothing_found) else None
        if mixer is None:
            return self.located(refusal)
        tree = self.original.tree
        lines = _source_lines(self.source.text, tree.code)
        what = " ".join(tree.code_for_node(mixer.node).split())[:90]
        return Refusal(self.source.name, lines[line_of(tree, mixer.node) - 1], what, mixer.why, mixer.remedy, "P201")

    @property
    def entry(self) -> ClassInfo | None:
        """The entry class of the file as it came."""
        wanted = self.original.classes.get(self.source.architecture or "")
        named = wanted is not None and self.original.method(wanted, "forward")
        return wanted if named else self.original.entry(self.own)

    def located(self, refusal: Refusal) -> Refusal:
        """A refusal with the source's name and line."""
        line = self.lines[min(refusal.line, len(self.lines)) - 1] if refusal.line else 1
        return Refusal(self.source.name, line, refusal.what, refusal.why, refusal.remedy, refusal.code)


def _source_lines(before: str, after: str) -> list[int]:
    """The source line of each line of the file with borrowed definitions in; those have the line after them."""
    if before == after:
        return list(range(1, after.count("\n") + 2))
    lines: list[int] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(
        None, before.splitlines(), after.splitlines(), autojunk=False
    ).get_opcodes():
        lines += list(range(a + 1, b + 1)) if kind == "equal" else [a + 1] * (d - c)
    return lines


def _parse(text: str, name: str) -> cst.Module:
    try:
        return cst.parse_module(text)
    except cst.ParserSyntaxError as error:
        line, reason = _syntax_error(text) or (error.raw_line, "libcst can't read it")
        raise SourceError(
            f"{name}:{line}: not valid Python: {reason}",
            "give the whole modeling file, not a part of it nor a web page around it",
        ) from error


def _syntax_error(text: str) -> tuple[int, str] | None:
    """Python's own words for what is wrong, which are plainer than a parser's."""
    try:
        ast.parse(text)
    except SyntaxError as error:
        return error.lineno or 1, error.msg
    return None


def _spec(facts: Facts, model: ModelSpec, work: _Work) -> dict[str, Any]:
    """What was understood, JSON-able: config fields read, conditions, assumptions, layers, weight rules."""
    return {
        "architecture": facts.entry.name,
        "config_fields": sorted({k for w in facts.worlds for k in w.config_reads}),
        "conditions": sorted({k for w in facts.worlds for k, _ in w.decisions}),
        "assumes": {k: {"value": v, "reason": serving.SERVING[k][1]} for k, v in sorted(work.assumed.items())},
        "attention": [asdict(each) for each in model.attention],
        "layers": model.layers,
        "weight_rules": asdict(model.weights),
        "paths": len(facts.worlds),
    }


def _manifest(
    source: Source, target: str, module: str, code: str, spec: dict[str, Any], work: _Work, others: dict[str, str]
) -> dict[str, Any]:
    return {
        "porter": __version__,
        "architecture": spec["architecture"],
        "target": target,
        "module": module,
        "module_sha256": _digest(code),
        **({"files": {name: _digest(text) for name, text in sorted(others.items())}} if others else {}),
        "source": {"name": source.name, "sha256": source.sha256, "transformers": source.transformers},
        "spec": spec,
        "edits": [e.as_json() for e in work.edits],
        "verified": None,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

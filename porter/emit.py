"""From the rewritten tree to the text of a port: entry methods, imports, banner, layout, and a last check."""

from __future__ import annotations

import builtins
import symtable
import tomllib
from importlib.resources import files
from typing import Any

import libcst as cst

from porter import __version__
from porter.analyze.program import Program
from porter.analyze.weights import Rules
from porter.errors import Refusal
from porter.passes import edit
from porter.source import Source
from porter.spec import ModelSpec

LINE_LENGTH = 120
ENTRY_IMPORTS = {
    "collections.abc": ["Iterable"],
    "porter.runtime.loader": ["WeightRules", "load_weights"],
    "porter.runtime.sampling": ["Sampler", "SamplerOutput", "SamplingMetadata"],
    "porter.runtime.metadata": ["AttentionMetadata"],
    "porter.runtime.layers.linear": ["LinearMethod"],
    "transformers": ["PretrainedConfig"],
}


def emit(source: Source, tree: cst.Module, spec: ModelSpec, target: str) -> str:
    """The text of the port, from the rewritten tree.

    Raises:
        Refusal: the result would still need something of the original's library, or reads a name that nothing defines.
    """
    if "passes" not in target_settings(target):
        tree = _with_entry(tree, spec, target)
    body, imports = _split_imports(tree)
    text = render(
        target,
        "module.py.j2",
        {
            "header": _header(tree),
            "source": source.name,
            "sha256": source.sha256,
            "version": __version__,
            "title": _title(spec.architecture),
            "imports": _import_lines(imports, body, target),
            "body": body,
        },
    )
    text = _formatted(text)
    _check_names(text)
    return text


def render(target: str, template: str, values: dict[str, Any]) -> str:
    """The text of one of a target's templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("porter"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(f"{target}/{template}").render(**values)


def target_settings(target: str) -> dict[str, Any]:
    """The target.toml of an emit target.

    Raises:
        UsageError: there is no such target.
    """
    from porter.errors import UsageError

    path = files("porter.templates") / target / "target.toml"
    if not path.is_file():
        known = sorted(p.name for p in files("porter.templates").iterdir() if (p / "target.toml").is_file())
        raise UsageError(f"there is no target {target!r}", f"choose one of {', '.join(known)}")
    return tomllib.loads(path.read_text(encoding="utf-8"))


INIT = """
def __init__(self, config: PretrainedConfig, linear_method: LinearMethod | None = None):
    super().__init__(config, linear_method=linear_method)
    self.config = config
    self.sampler = Sampler()
"""


def _is_pass(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Pass)


# -- the entry class -------------------------------------------------------------------------------


class _Entry(cst.CSTTransformer):
    def __init__(self, name: str, rules: Rules, requires: dict[str, Any], methods: list[cst.BaseStatement]) -> None:
        super().__init__()
        self.name, self.rules, self.requires, self.methods = name, rules, requires, methods

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        if updated_node.name.value != self.name:
            return updated_node
        body = [self._statement(s) for s in updated_node.body.body if not _is_pass(s)]
        if not any(isinstance(s, cst.FunctionDef) and s.name.value == "__init__" for s in body):
            body += edit.block(INIT)
        place = 1 if body and '"""' in edit.code(body[0])[:4] else 0
        body.insert(place, edit.statement(f"weight_rules = {self.rules.source()}"))
        if self.requires:
            body.insert(place, edit.statement(f"requires = {self.requires!r}"))
        return updated_node.with_changes(body=updated_node.body.with_changes(body=[*body, *self.methods]))

    def _statement(self, node: cst.CSTNode) -> Any:
        if isinstance(node, cst.FunctionDef) and node.name.value == "__init__":
            lines = [*node.body.body, edit.statement("self.sampler = Sampler()")]
            if "self.config = " not in edit.code(node):
                place = next((i + 1 for i, s in enumerate(lines) if "super().__init__" in edit.code(s)), 0)
                lines.insert(place, edit.statement("self.config = config"))
            return node.with_changes(body=node.body.with_changes(body=lines), leading_lines=[cst.EmptyLine()])
        return node


def _with_entry(tree: cst.Module, spec: ModelSpec, target: str) -> cst.Module:
    methods = edit.block(render(target, "entry.py.j2", {}))
    after = tree.visit(_Entry(spec.architecture, spec.weights, spec.requires, methods))
    assert isinstance(after, cst.Module)
    return edit.add_imports(after, ENTRY_IMPORTS)


# -- imports ---------------------------------------------------------------------------------------


def _split_imports(tree: cst.Module) -> tuple[str, dict[str, str]]:
    """The text without imports and module docstring, and what each imported name stands for."""
    imports = {"math": "math", "re": "re", "torch": "torch", "nn": "torch.nn"}  # what passes may have written
    body: list[Any] = []
    for i, statement in enumerate(tree.body):
        if isinstance(statement, cst.SimpleStatementLine):
            first = statement.body[0]
            if isinstance(first, cst.Import | cst.ImportFrom):
                imports.update(Program.read(cst.Module([statement])).imports)
                continue
            if i < 2 and isinstance(first, cst.Expr) and isinstance(first.value, cst.SimpleString):
                continue
        body.append(statement)
    return tree.with_changes(body=body, header=[]).code, imports


def _import_lines(imports: dict[str, str], body: str, target: str) -> list[str]:
    """Sorted import lines for the names that the body reads; what the target does not allow is refused."""
    settings = target_settings(target)
    read = edit.names_read(cst.parse_module(body)) | {
        n.value for n in edit.walk(cst.parse_module(body)) if isinstance(n, cst.Name)
    }
    for node in edit.walk(cst.parse_module(body)):  # those inside functions and conditional blocks
        if isinstance(node, cst.Import | cst.ImportFrom):
            for full in Program.read(cst.Module([cst.SimpleStatementLine([node])])).imports.values():
                _allow(full.rpartition(".")[0] or full, full.rpartition(".")[2], settings)
    grouped: dict[str, set[str]] = {}
    plain: set[str] = set()
    for local, full in imports.items():
        if local not in read:
            continue
        if full == local or "." not in full:
            plain.add(f"import {full}")
        elif full == "torch.nn.functional" and local != "functional":
            plain.add(f"import torch.nn.functional as {local}")
        else:
            module, _, name = full.rpartition(".")
            _allow(module, name, settings)
            grouped.setdefault(module, set()).add(name if name == local else f"{name} as {local}")
    return _ordered(plain, grouped)


def _allow(module: str, name: str, settings: dict[str, Any]) -> None:
    root = module.split(".")[0]
    fine = any(module == a or module.startswith(f"{a}.") for a in settings["imports"])
    if not fine or (root == "transformers" and name not in settings["from_transformers"]):
        raise Refusal(
            "",
            0,
            f"{module}.{name}",
            "the port would still need it, and the runtime has nothing for it",
            "replace it in the source by plain torch",
            "P400",
        )


def _ordered(plain: set[str], grouped: dict[str, set[str]]) -> list[str]:
    """Standard library, third party, porter: each sorted, with a line between."""
    lines = sorted(plain) + [f"from {m} import {', '.join(sorted(n))}" for m, n in sorted(grouped.items())]

    def rank(line: str) -> int:
        module = line.split()[1].split(".")[0]
        return 2 if module in ("porter", "") else 1 if module in ("torch", "transformers", "vllm") else 0

    blocks = [[x for x in lines if rank(x) == r] for r in range(3)]
    return [line for block in blocks if block for line in ["", *block]][1:]


# -- the look --------------------------------------------------------------------------------------


def _header(tree: cst.Module) -> str:
    """The comments at the top of the source: its licence, without notes on how the file was generated."""
    first = tree.body[0] if tree.body else None
    leading = [*tree.header, *(getattr(first, "leading_lines", ()) or ())]
    lines = [x.comment.value for x in leading if x.comment is not None]
    kept = [
        x
        for x in lines
        if "🚨" not in x
        and "modular_" not in x
        and "Do NOT edit" not in x
        and "coding=" not in x
        and "auto-generated" not in x
        and "automatically generated" not in x
        and "the file from the modular" not in x
    ]
    return "\n".join([*kept, "#"]) if kept else "#"


def _title(entry: str) -> str:
    return entry.removesuffix("ForCausalLM").removesuffix("LMHeadModel") or entry


def _formatted(text: str) -> str:
    import black

    return black.format_str(text, mode=black.Mode(line_length=LINE_LENGTH))


# -- the last check --------------------------------------------------------------------------------


def _check_names(text: str) -> None:
    """Refuse a port that reads a name nothing defines: a token count, or a piece of the original that is gone."""
    try:
        table = symtable.symtable(text, "port", "exec")
    except SyntaxError as error:
        raise Refusal(
            "",
            error.lineno or 0,
            "the rewritten file",
            f"it is no valid Python ({error.msg})",
            "report this as a bug of porter",
            "P900",
        ) from error
    top = {s.get_name() for s in table.get_symbols()}
    for name in sorted(_undefined(table, top)):
        raise Refusal(
            "",
            0,
            name,
            "the rewritten file reads it but nothing defines it any more: it depends on the "
            "batch's shape or on what serving does not have",
            "rewrite that part of the source",
            "P400",
        )


def _undefined(table: symtable.SymbolTable, top: set[str]) -> set[str]:
    found = {
        s.get_name()
        for s in table.get_symbols()
        if s.is_referenced()
        and s.is_global()
        and s.get_name() not in top
        and not hasattr(builtins, s.get_name())
        and s.get_name() not in ("__class__", "super")
    }
    if table.get_type() == "module":
        found = {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced()
            and not s.is_assigned()
            and not s.is_imported()
            and not s.is_namespace()
            and not hasattr(builtins, s.get_name())
        }
    for child in table.get_children():
        found |= _undefined(child, top)
    return found


__all__ = ["emit", "render", "target_settings"]

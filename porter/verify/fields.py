"""Which config fields a port's text reads, found without importing it."""

import ast
from pathlib import Path

_READERS = {"get_rope_parameters": "rope_parameters"}


def fields_read(port_file: Path, but_in: str = "") -> frozenset[str]:
    """Names `x` of every `config.x`, `self.config.x` and `getattr(config, "x", ...)` in the file.

    What functions named `but_in` read, such as how weights begin, does not count.
    """
    tree = ast.parse(port_file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == but_in]
    outside = {id(node) for function in functions for node in ast.walk(function)}
    return frozenset(name for node in ast.walk(tree) if id(node) not in outside and (name := _field(node)))


def _field(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and _is_config(node.value):
        return node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _READERS.get(node.func.id) or _getattr_field(node)
    return None


def _getattr_field(call: ast.Call) -> str | None:
    name = call.args[1] if len(call.args) > 1 else None
    if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr") and _is_config(call.args[0]):
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def _is_config(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "config" or name.endswith("_config")

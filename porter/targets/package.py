"""The files of a port: its module's path, and what a target's templates put around it."""

from __future__ import annotations

from porter import __version__
from porter.emit import render, target_settings
from porter.source import Source
from porter.spec import ModelSpec
from porter.targets.support import support_text


def package(source: Source, spec: ModelSpec, code: str, target: str) -> tuple[str, dict[str, str]]:
    """The path of the module in the port's folder, and the other files by their paths."""
    stem = source.path.stem.removeprefix("modeling_")
    settings = target_settings(target)
    if "package" not in settings:
        return f"{stem}.py", {}
    name = settings["package"].format(stem=stem)
    values = {
        "package": name,
        "stem": stem,
        "architecture": spec.architecture,
        "source": source.name,
        "sha256": source.sha256,
        "version": __version__,
        "vllm": settings["vllm"],
    }
    others = {path.format(package=name): render(target, t, values) for path, t in settings["files"].items()}
    others[f"{name}/support.py"] = support_text(render(target, "support.py.j2", {}), code)
    return f"{name}/{stem}.py", others

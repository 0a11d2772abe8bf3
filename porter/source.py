"""Where a modeling file comes from: a path, a model type of the installed transformers, or a checkpoint folder.

Everything is read as text; nothing is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from porter.errors import SourceError


@dataclass(frozen=True)
class Source:
    """The text of a modeling file, of its configuration file if there is one, and where they came from.

    `model_type` is transformers' name of the model, as far as the path or the config tells it; `architecture` the class
    that a checkpoint's config asks for.
    """

    name: str
    text: str
    path: Path
    config_text: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    transformers: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load(spec: str) -> Source:
    """Read the modeling file that `spec` names.

    Raises:
        SourceError: nothing of that name, or it can't be read.
    """
    path = Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _from_checkpoint(path)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        found = sorted(path.glob("modeling_*.py"))
        if len(found) == 1:
            return _from_file(found[0])
        raise SourceError(
            f"{path} has no config.json and {len(found) or 'no'} modeling files", "name one modeling_*.py file"
        )
    if spec.endswith(".py") or ("/" in spec and path.suffix):
        raise SourceError(f"{path} does not exist", "check the path")
    return _from_transformers(spec)


def models_folder() -> Path:
    """The folder of modeling files of the installed transformers, found without importing it.

    Raises:
        SourceError: transformers is not installed.
    """
    try:
        return Path(str(distribution("transformers").locate_file("transformers/models")))
    except PackageNotFoundError as error:
        raise SourceError("transformers is not installed", "pip install transformers") from error


def _from_transformers(name: str) -> Source:
    """The file of a model type: in the folder of that name, else wherever its causal LM is defined."""
    model_type = name.replace("-", "_")
    path: Path | None = models_folder() / model_type / f"modeling_{model_type}.py"
    causal = causal_lm_types().get(name)
    if path is not None and not path.is_file():
        path = _defining(causal) if causal is not None else None
    if path is None:
        raise SourceError(
            f"{name!r} is no file, checkpoint folder or model type of transformers {version('transformers')}",
            _similar(model_type),
        )
    multimodal = causal is None or causal.endswith("ForConditionalGeneration")
    return _read(path, name, name if causal is not None else model_type, None if multimodal else causal)


def causal_lm_types() -> dict[str, str]:
    """Model type -> causal LM class, from the auto mapping of the installed transformers, which is read as text."""
    text = _text(models_folder() / "auto" / "modeling_auto.py")
    entries = text.partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")[2].partition("\n)\n")[0]
    return dict(re.findall(r'\("([\w-]+)", "(\w+)"\)', entries))


def _defining(name: str) -> Path | None:
    """The installed modeling file that defines a class."""
    for path in sorted(models_folder().glob("*/modeling_*.py")):
        if f"\nclass {name}(" in _text(path):
            return path
    return None


def _similar(name: str) -> str:
    import difflib

    known = [p.name for p in models_folder().iterdir() if (p / f"modeling_{p.name}.py").is_file()]
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else "name a modeling_*.py file or a model type such as llama"


def _from_file(path: Path) -> Source:
    stem = path.stem.removeprefix("modeling_")
    installed = path.resolve().is_relative_to(models_folder().resolve()) if _has_transformers() else False
    return _read(path, path.name, stem, None, installed)


def _has_transformers() -> bool:
    try:
        models_folder()
    except SourceError:
        return False
    return True


def _read(path: Path, name: str, model_type: str | None, architecture: str | None, installed: bool = True) -> Source:
    text = _text(path)
    config_text = next((_text(each) for each in _configurations(path, text) if each != path and each.is_file()), None)
    release = version("transformers") if installed and _has_transformers() else None
    return Source(name, text, path, config_text, model_type, architecture, release)


def _configurations(path: Path, text: str) -> list[Path]:
    """Where a file's configuration may be: beside it under the same name, or where its own import says."""
    imported = re.findall(r"^from \.(\w*config\w*) import", text, re.MULTILINE)
    return [
        path.with_name(path.name.replace("modeling_", "configuration_")),
        *[path.with_name(f"{i}.py") for i in imported],
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a text file", "name a Python modeling file") from error
    except OSError as error:
        raise SourceError(f"{path} can't be read: {error.strerror}", "check the path and its permissions") from error


def _from_checkpoint(folder: Path) -> Source:
    """The modeling file that a checkpoint's config.json names: its own (`auto_map`), else that of its model type."""
    try:
        config = json.loads(_text(folder / "config.json"))
    except json.JSONDecodeError as error:
        raise SourceError(f"{folder / 'config.json'} is not JSON (line {error.lineno})", "restore the file") from error
    if not isinstance(config, dict):
        raise SourceError(f"{folder / 'config.json'} holds no object", "restore the file")
    architecture = next(iter(config.get("architectures") or []), None)
    remote = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    model_type = config.get("model_type")
    if isinstance(remote, str) and "--" not in remote:
        path = folder / f"{remote.split('.')[0]}.py"
        return _read(path, f"{folder.name}/{path.name}", model_type, remote.split(".")[-1], installed=False)
    if not model_type:
        raise SourceError(f"{folder / 'config.json'} names neither auto_map nor model_type", "name a modeling file")
    found = _from_transformers(str(model_type))
    return Source(
        found.name, found.text, found.path, found.config_text, found.model_type, architecture, found.transformers
    )

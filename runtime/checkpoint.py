"""Finds a checkpoint on disk or on the hub, and streams its config, tokenizer and weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.runtime.errors import ConfigError, WeightError

if TYPE_CHECKING:  # finding files takes no torch
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(model: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, or the local copy of a hub repository, downloaded if need be."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{model} is not a folder", "give a checkpoint folder or a hub name like org/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name} is neither a folder nor could it be fetched from the hub ({reason})",
            "check the name and the network, or give a folder",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says, without the defaults of its class; ConfigError if it holds no object."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ConfigError(f"the config in {folder} can't be read ({_first_line(error)})", "check config.json") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the config in {folder} holds no object", "check config.json")
    return found


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config, as the class that transformers has for it."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"the config in {folder} can't be read ({_first_line(error)})",
            "check config.json; for a config class of its own pass trust_remote_code=True",
        ) from None


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder or hub repository."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"no tokenizer could be loaded from {source} ({_first_line(error)})",
            "name one with tokenizer=, or pass skip_tokenizer_init=True and prompt_token_ids",
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in a fixed order; raises WeightError if any is missing."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightError(f"{index} is not a weight index", "download it again") from None
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightError(f"{folder} lacks {', '.join(missing)}, named in {INDEX}", "download the missing files")
    if not files:
        raise WeightError(f"{folder} holds no .safetensors file", "convert the checkpoint to safetensors first")
    return files


def iterate_weights(
    folder: Path, progress: Callable[[int, int], None] | None = None
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Each tensor of a checkpoint with its name, one in memory at a time.

    `progress` is called with (bytes done, bytes in all). A damaged file raises WeightError.
    """
    files = weight_files(folder)
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file in files:
        for name, tensor in _iterate_file(file):
            yield name, tensor
            done += tensor.nbytes
            if progress is not None:
                progress(min(done, total), total)
    if progress is not None:
        progress(total, total)


def _iterate_file(file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise WeightError(f"{file} is damaged ({_first_line(error)})", "download it again") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

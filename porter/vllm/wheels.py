"""Reads the Python files of a vLLM: installed, a wheel on disk, or a release in the registry, of which only these."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from porter.errors import UsageError

REGISTRY = "https://pypi.org/simple/vllm/"
_JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}
_BLOCK = 1 << 18
_TIMEOUT = 60


@dataclass(frozen=True)
class VllmSource:
    """A vLLM's text: `read` gives a file's source by its path below site-packages, None if there is none."""

    version: str
    read: Callable[[str], str | None]

    def module(self, name: str) -> str | None:
        """The source of a dotted module or package."""
        path = name.replace(".", "/")
        return self.read(f"{path}.py") or self.read(f"{path}/__init__.py")


@contextmanager
def open_vllm(place: str) -> Iterator[VllmSource]:
    """The vLLM at `place`: a folder that holds or is the package, a wheel, or a release's number.

    Raises UsageError if there is none, or the registry can't be read.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        yield _folder(path)
        return
    if not path.is_file() and not re.fullmatch(r"\d+(\.\w+)+", place):
        raise UsageError(f"{place} is no folder, wheel or version of vLLM", "give a path, or a version like 0.32.0")
    with zipfile.ZipFile(path if path.is_file() else _Remote(_wheel_url(place))) as wheel:
        names = frozenset(wheel.namelist())
        version = place if not path.is_file() else path.name.split("-")[1]
        yield VllmSource(version, lambda name: wheel.read(name).decode() if name in names else None)


def _folder(path: Path) -> VllmSource:
    for root in (path, path.parent, *path.glob("lib/python3*/site-packages")):
        if (root / "vllm" / "__init__.py").is_file():
            return VllmSource(_installed_version(root), partial(_text, root))
    raise UsageError(f"{path} holds no vllm", "give its site-packages, its environment, or the package's folder")


def _text(root: Path, name: str) -> str | None:
    file = root / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _installed_version(root: Path) -> str:
    found = [p.name.split("-")[1] for p in root.glob("vllm*.dist-info")]
    return found[0].removesuffix(".dist") if found else "of unknown version"


def _wheel_url(version: str) -> str:
    """The Linux wheel of a release."""
    data = json.loads(_get(REGISTRY, _JSON))
    start = f"vllm-{version}-"
    wheels = [f["url"] for f in data["files"] if f["filename"].startswith(start) and "x86_64.whl" in f["filename"]]
    if not wheels:
        raise UsageError(f"the registry has no wheel of vLLM {version} for x86_64", "choose another release")
    return str(wheels[0])


def _get(url: str, headers: dict[str, str]) -> bytes:
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as answer:
            return bytes(answer.read())
    except (HTTPError, URLError, TimeoutError) as error:
        remedy = "check the version and the network, or give a wheel"
        raise UsageError(f"{url} can't be read ({error})", remedy) from error


class _Remote(io.RawIOBase):
    """A file on a server, of which only the blocks that are read are fetched."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.at = url, 0
        self.blocks: dict[int, bytes] = {}
        try:
            with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT) as answer:
                self.size = int(answer.headers["Content-Length"])
        except (HTTPError, URLError, TimeoutError) as error:
            raise UsageError(f"{url} can't be read ({error})", "check the network, or give a wheel") from error

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.at + size, self.size)
        found = b"".join(self._block(i) for i in range(self.at // _BLOCK, -(-end // _BLOCK)))
        start = self.at % _BLOCK
        self.at, length = end, end - self.at
        return found[start : start + length]

    def _block(self, index: int) -> bytes:
        if index not in self.blocks:
            last = min((index + 1) * _BLOCK, self.size) - 1
            self.blocks[index] = _get(self.url, {"Range": f"bytes={index * _BLOCK}-{last}"})
        return self.blocks[index]

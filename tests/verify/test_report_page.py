"""The page of a verification: it needs nothing else, shows what failed, and escapes what it is given."""

import re
from pathlib import Path

from porter.verify.html import page
from porter.verify.result import Case, Check, Verification
from porter.verify.sharding import tp_sizes
from porter.verify.tiny import shrink, tiny_config


def row(module: str, error: float) -> dict[str, object]:
    figures = {"error": error, "p50": error / 2, "p95": error, "place": [3, 4], "rounded": None}
    return {"module": module, "kind": "RMSNorm", "call": 0, **figures}


def verification(status: str, error: float) -> Verification:
    data = {"worst": error, "modules": [row("model.norm", 1e-6), row("model.<b>", error)]}
    modules = Check("modules", status, f"{error:.1e}", "0.0001", "look at: eps", data)  # type: ignore[arg-type]
    case = Case("default", {}, (modules, Check("logits", "skip", detail="not reached")))
    skipped = Case("alibi=True", {}, (), skipped="the original can't")
    return Verification(
        "OakForCausalLM", "ports/oak", "ab", False, "tiny random", "float32", (case, skipped), ("GPU kernels",),
        {"torch": "2"}, 3.0, "porter verify oak --random", {"port": "ab"}, {"legal": [1, 2], "illegal": {3: "heads"}},
    )  # fmt: skip


def test_a_page_stands_alone_and_escapes() -> None:
    text = page(verification("PASS", 1e-5))
    assert re.findall(r"(?:src|href)=|https?://", text) == []
    assert "every check passed" in text
    assert "model.&lt;b&gt;" in text
    assert "<b>" not in text
    assert "porter verify oak --random" in text


def test_what_failed_is_red_and_open() -> None:
    text = page(verification("FAIL", 0.5))
    assert text.count('fill="var(--bad)"') == 1
    assert "<details open>" in text
    assert "default: modules: look at: eps" in text


def test_sizes_are_told_with_the_reason_against_each() -> None:
    from porter.runtime.model_registry import load_port

    port = load_port(Path(__file__).parents[1] / "models" / "handwritten_llama.py")
    config = shrink(tiny_config("llama"), num_attention_heads=8, num_key_value_heads=2)
    found = tp_sizes(port, config)
    assert found.legal == (1, 2, 4, 8)
    assert set(found.illegal) == {3, 5, 6, 7}
    assert all(f"tp_size = {size}" in reason for size, reason in found.illegal.items())


def test_what_the_machine_could_not_do_is_neither_right_nor_wrong() -> None:
    text = page(verification("unproved", 1e-5))
    assert ">unproved</span>" in text
    assert "nothing was found wrong" in text
    assert "every check passed" not in text
    assert "a check failed" not in text

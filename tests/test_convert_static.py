"""Conversion reads text: it runs nothing of its input, imports neither torch nor transformers, and repeats itself."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from porter.convert import Conversion, convert
from porter.errors import PorterError, Refusal, SourceError
from porter.source import load

MODELS = Path(__file__).parent / "models"
ACORN = MODELS / "acorn" / "modeling_acorn.py"
# What each file of models/bad is refused for: the line of the construct (0: the whole file), and words of the message.
REFUSED = {
    "aspen": ("torch.cumsum(hidden_states", "along the sequence"),
    "larch": ("self.conv(", "along the sequence"),
    "maple": ("for t in range(seq_length)", "goes from token to token"),
    "yew": ("no causal language model", "ForCausalLM"),
    "alder": ("no causal language model", "ForCausalLM"),
}
PLANTS = {
    "at import": "{mark}\n{text}",
    "in a decorator": "{text}\n\n\n@(lambda f: {mark} or f)\ndef planted():\n    pass\n",
    "in a class body": "{text}\n\n\nclass Planted:\n    found = {mark}\n",
    "in a default argument": "{text}\n\n\ndef planted(x={mark}):\n    return x\n",
    "in the constructor": "{built}",
    "in the forward": "{ran}",
}
LOADED = """
import json, sys
from porter.convert import convert
from porter.source import load
conversion = convert(load(sys.argv[1]))
heavy = ("torch", "transformers", "triton", "porter.runtime", "safetensors")
print(json.dumps({"code": conversion.code, "edits": conversion.manifest["edits"],
    "loaded": sorted(m for m in sys.modules if m in heavy or m.split(".")[0] in heavy[:3]),
    "own": sorted(m for m in sys.modules if "acorn" in m)}))
"""


@cache
def acorn() -> Conversion:
    return convert(load(str(ACORN)))


@cache
def in_a_fresh_process(seed: str) -> dict[str, object]:
    """What a conversion gives and which modules it loads in a process with its own hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(ACORN)], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def planted(where: str, marker: Path) -> str:
    """The acorn file with a line that writes `marker` when it runs."""
    text = ACORN.read_text(encoding="utf-8")
    mark = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    head = "        super().__init__(config)\n"
    built = text.replace(head, f"{head}        {mark}\n")
    ran = text.replace("        hidden_states = outputs", f"        {mark}\n        hidden_states = outputs")
    assert built != text
    return PLANTS[where].format(mark=mark, text=text, built=built, ran=ran)


@pytest.mark.parametrize("where", PLANTS)
def test_nothing_of_the_source_runs(where: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "modeling_acorn.py"
    file.write_text(planted(where, marker), encoding="utf-8")
    before = set(sys.modules)
    with suppress(PorterError):  # either outcome is fine, running the file is not
        convert(load(str(file)))
    assert not marker.exists()
    assert [name for name in set(sys.modules) - before if "acorn" in name or "planted" in name] == []


def test_the_plant_is_one_that_works(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    exec(f"__import__('pathlib').Path({str(marker)!r}).touch()")
    assert marker.exists()


def test_converting_loads_neither_torch_nor_transformers() -> None:
    found = in_a_fresh_process("0")
    assert (found["loaded"], found["own"]) == ([], [])


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_another_process_with_another_hash_seed_gives_the_same_bytes_and_edits(seed: str) -> None:
    found = in_a_fresh_process(seed)
    assert found["code"] == acorn().code
    assert found["edits"] == acorn().manifest["edits"]


def test_converting_twice_gives_the_same_conversion() -> None:
    assert convert(load(str(ACORN))) == acorn()


def test_every_edit_names_its_pass_a_line_of_the_source_and_a_reason() -> None:
    lines = len(ACORN.read_text(encoding="utf-8").splitlines())
    edits = acorn().manifest["edits"]
    assert edits
    assert [e for e in edits if not (e["pass"] and e["reason"] and 1 <= e["line"] <= lines)] == []
    assert [e for e in edits if e["before"] == e["after"]] == []


def test_every_edit_is_made_by_a_pass_that_can_be_explained() -> None:
    from porter.passes.base import discover

    assert {e["pass"] for e in acorn().manifest["edits"]} <= {each.name for each in discover()}


def test_an_edit_of_a_line_of_the_source_gives_that_line() -> None:
    """Line numbers follow the source through the rewriting; they are not those of the file as it is by then."""
    places: dict[str, set[int]] = {}
    for number, line in enumerate(ACORN.read_text(encoding="utf-8").splitlines(), 1):
        places.setdefault(line.strip(), set()).add(number)
    edits = [(e["before"].split("\n")[0].strip(), e["line"]) for e in acorn().manifest["edits"]]
    known = [(text, line) for text, line in edits if text in places and len(places[text]) == 1]
    assert known
    assert [(text, line, places[text]) for text, line in known if line not in places[text]] == []


def test_the_manifest_holds_the_hashes_of_source_and_port() -> None:
    manifest = acorn().manifest
    assert manifest["source"]["sha256"] == hashlib.sha256(ACORN.read_bytes()).hexdigest()
    assert manifest["module_sha256"] == hashlib.sha256(acorn().code.encode()).hexdigest()
    assert (manifest["architecture"], manifest["module"]) == ("AcornForCausalLM", "acorn.py")


def test_the_manifest_is_json() -> None:
    manifest = acorn().manifest
    assert json.loads(json.dumps(manifest, allow_nan=False)).keys() == manifest.keys()


def test_comments_and_blank_lines_in_the_source_change_no_code(tmp_path: Path) -> None:
    text = ACORN.read_text(encoding="utf-8")
    noisy = text.replace("\n        hidden_states = ", "\n        # a remark\n\n        hidden_states = ")
    file = tmp_path / "modeling_acorn.py"
    file.write_text(noisy.replace("\nclass ", "\n# a class\n\n\nclass "), encoding="utf-8")
    assert _code_lines(convert(load(str(file))).code) == _code_lines(acorn().code)


def _code_lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith("#")]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_gives_file_line_construct_reason_and_remedy(name: str) -> None:
    path = MODELS / "bad" / f"modeling_{name}.py"
    what, why = REFUSED[name]
    with pytest.raises(Refusal) as caught:
        convert(load(str(path)))
    refusal = caught.value
    lines = path.read_text(encoding="utf-8").splitlines()
    assert refusal.file == path.name
    assert what.split("(")[0].split()[-1] in str(refusal)
    assert why in str(refusal)
    assert 1 <= refusal.line <= len(lines)
    assert refusal.remedy
    assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("name", "code"), [("aspen", "torch.cumsum"), ("maple", "for t in range"), ("larch", "self.conv(")]
)
def test_the_line_of_a_refusal_is_that_of_the_construct(name: str, code: str) -> None:
    path = MODELS / "bad" / f"modeling_{name}.py"
    with pytest.raises(Refusal) as caught:
        convert(load(str(path)))
    assert code in path.read_text(encoding="utf-8").splitlines()[caught.value.line - 1]


@pytest.mark.parametrize("name", ["rowan", "willow"])
def test_a_file_that_does_not_parse_is_named_with_its_line(name: str) -> None:
    with pytest.raises(SourceError, match=rf"modeling_{name}\.py:\d+: not valid Python: .*; "):
        convert(load(str(MODELS / "bad" / f"modeling_{name}.py")))

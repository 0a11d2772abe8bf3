"""The command line: quick to start, one line an error, exit codes that scripts can rely on."""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from porter import __version__, commands
from porter.cli import app
from porter.errors import CheckFailed, PorterError
from porter.runtime.errors import WeightError
from porter.runtime.outputs import CompletionOutput, RequestOutput
from porter.runtime.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *args: CliRunner().invoke(app, list(args))


def porter(*args: str, code: str = "from porter.cli import main; main()") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom porter.cli import app\napp(standalone_mode=False)\nprint(sorted(sys.modules))"
    loaded = porter("--help", code=code).stdout.splitlines()[-1]
    assert [name for name in ("torch", "transformers", "libcst", "numpy") if f"'{name}'" in loaded] == []


def test_help_takes_less_than_300_ms_of_processor_time() -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    marks = [spent()]
    for _ in range(3):
        assert porter("--help").returncode == 0
        marks.append(spent())
    assert min(after - before for before, after in itertools.pairwise(marks)) < 0.3


def test_version(run: Run) -> None:
    assert run("--version").output == f"porter {__version__}\n"


def test_every_command_has_help(run: Run) -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {name: run(name, "--help").exit_code for name in names} == dict.fromkeys(names, 0)


@pytest.mark.parametrize(
    "args",
    [
        ["show", "NoSuchForCausalLM"],
        ["show", "../../etc"],
        ["unregister", "NoSuchForCausalLM"],
        ["register", "no/such/port"],
        ["verify"],
        ["verify", "llama", "--random", "--dtype", "int3"],
        ["verify", "llama", "--random", "--model", "x"],
        ["verify", "--random"],
        ["verify", "llama", "--random", "--tp", "1"],
        ["verify", "--model", "no/such/folder/here"],
        ["verify", "--random", "--port", "no_such_port.py"],
        ["ledger", "--model", "./no-such-folder"],
        ["complete", "./no-such-folder", "hello"],
        ["chat", "./no-such-folder"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_2(run: Run, args: list[str]) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_hub_name_without_network_is_one_line(run: Run) -> None:
    result = run("complete", "nobody/no-such-model", "hello")
    assert result.exit_code == 2
    assert "network" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(PorterError("a", "b"), 2), (WeightError("a", "b"), 2), (CheckFailed("a", "b"), 1), (KeyboardInterrupt(), 130)],
    ids=["wrong input", "the runtime's", "failed check", "ctrl-c"],
)
def test_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(json: bool) -> None:
        raise error

    monkeypatch.setattr(commands, "list_ports", fail)
    result = run("list")
    assert result.exit_code == code
    assert "Traceback" not in result.output


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_called_one_and_shows_its_traceback_when_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def fail(json: bool) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(commands, "list_ports", fail)
    monkeypatch.setenv("PORTER_DEBUG", str(int(debug)))
    result = run("list")
    assert (result.exit_code, result.stdout, "Traceback" in result.stderr) == (2, "", debug)
    assert result.stderr.splitlines()[-1].startswith("error: internal error: KeyError: 'bug'; ")
    assert debug or result.stderr.count("\n") == 1


def test_a_folder_that_can_not_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("convert", "llama", "-o", str(tmp_path / "file" / "port"))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "internal error" not in result.stderr


def test_a_closed_pipe_ends_quietly() -> None:
    code = "import os, sys\nos.close(0)\nfrom porter.cli import main\nmain()"
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code, "list", "--json"]
    found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")


def test_list_of_an_empty_store(run: Run) -> None:
    assert json.loads(run("list", "--json").stdout) == []
    assert run("list").stdout == ""


class FakeLLM:
    """Answers with the prompt in capitals, word by word."""

    def generate(self, prompts: list[str], params: SamplingParams, use_tqdm: bool) -> list[RequestOutput]:
        return [output_of(prompt.upper()) for prompt in prompts]

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        return f"{len(messages)}: {messages[-1]['content']}"

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[RequestOutput]:
        yield from (output_of(word + " ") for word in prompt.upper().split())


def output_of(text: str) -> RequestOutput:
    return RequestOutput("0", None, [], [CompletionOutput(0, text, [1, 2], finish_reason="length")], True)


@pytest.fixture
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_engine", lambda model, options: FakeLLM())


@pytest.mark.usefixtures("_engine")
def test_complete_prints_prompt_and_text(run: Run) -> None:
    assert run("complete", "model", "hello ").stdout == "hello HELLO \n"
    found = json.loads(run("complete", "model", "hello", "--json").stdout)
    assert found == {"prompt": "hello", "text": "HELLO", "token_ids": [1, 2], "reason": "length"}


@pytest.mark.usefixtures("_engine")
def test_chat_keeps_the_conversation_until_an_empty_line() -> None:
    result = CliRunner().invoke(app, ["chat", "model"], input="good day\nand you\n\nunread\n")
    assert (result.exit_code, result.stdout) == (0, "1: GOOD DAY \n3: AND YOU \n")


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("option", ["--temperature=-1", "--max-tokens=0"])
def test_a_bad_sampling_value_is_one_line(run: Run, option: str) -> None:
    result = run("complete", "model", "hello", option)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_explain_lists_the_passes_and_shows_each(run: Run) -> None:
    from porter.passes.base import discover

    listed = run("explain")
    assert max(map(len, listed.stdout.splitlines())) <= 80
    for each in discover():
        shown = run("explain", each.name)
        assert (shown.exit_code, shown.stdout.splitlines()[0]) == (
            0,
            f"{each.name.replace('_', '-')} ({each.stage.name})",
        )
    assert run("explain", "no-such-pass").exit_code == 2

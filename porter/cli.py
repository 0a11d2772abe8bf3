"""The commands: each parses, calls, prints. Nothing heavy is imported until a command runs.

Exit codes: 0 fine, 1 a check found a problem, 2 wrong use or input, or a bug (PORTER_DEBUG=1 shows its traceback).
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from porter import __version__
from porter.bench.cli import app as bench_app
from porter.serve.cli import serve


class _Commands(TyperGroup):
    """Turns an error with an exit code into one line on stderr; 130 for Ctrl-C, 141 for a closed pipe."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except Exception as error:
            raise typer.Exit(_explained(error)) from error


def _explained(error: Exception) -> int:
    """Show an error as one line; the trees of porter and of its runtime bring their own text and exit code."""
    from porter import console

    code = getattr(error, "exit_code", None)
    if isinstance(code, int) and type(error).__module__.startswith("porter."):
        console.error(str(error))
        return code
    if isinstance(error, OSError) and error.filename and error.strerror:
        console.error(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left")
    else:
        console.internal_error(error)
    return 2


app = typer.Typer(
    name="porter",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Port Hugging Face modeling files to a paged-attention runtime, and prove the port.",
)

app.add_typer(bench_app)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that a person changed.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
PortFile = Annotated[Path | None, typer.Option("--port", help="A port's file or folder.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the reference run the model's code.")]
Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub repository.")]


def main() -> None:
    """The `porter` script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"porter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A modeling file, a model type (llama), or a checkpoint folder.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The folder to write; default ports/<model>.")] = None,
    target: Annotated[str, typer.Option(help="What to emit.")] = "native",
    diff: Annotated[
        bool, typer.Option("--diff", help="Show source -> port with reasons; writes only with -o.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Regenerate; exit 1 if the port there differs.")] = False,
    json: Json = False,
    force: Force = False,
) -> None:
    """Make a port of a modeling file. Never imports or runs it."""
    from porter import commands

    commands.convert(source, out, target, commands.ConvertOptions(diff, check, json, force))


@app.command()
def verify(
    subject: Annotated[str | None, typer.Argument(metavar="[SOURCE_OR_PORT]", help="What to verify.")] = None,
    model: Annotated[str | None, typer.Option(help="Real weights: a checkpoint folder or a hub repository.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Tiny random checkpoints of the model type.")] = False,
    dtype: Dtype = "float32",
    tp: Annotated[
        list[int] | None,
        typer.Option(help="Tensor-parallel size to compare with 1; default: a small one that divides."),
    ] = None,
    port: PortFile = None,
    reference: Annotated[
        Path | None, typer.Option(help="A recording of the original, made by the script of `porter reference`.")
    ] = None,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[
        str, typer.Option(help="What runs the port: porter, or vllm (plugins, in its own Python).")
    ] = "porter",
    vllm_python: Annotated[
        Path | None, typer.Option(help="A Python that has vLLM; default: `porter vllm-env`.")
    ] = None,
) -> None:
    """Prove a port against the original, module by module and token by token."""
    from porter import commands
    from porter.verify.request import Request

    request = Request(
        subject, model, random, dtype, tuple(tp or ()), port, trust_remote_code, engine, vllm_python, reference
    )
    raise typer.Exit(commands.verify(request, json, html))


@app.command()
def reference(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the script goes.")] = Path("reference.py"),
    force: Force = False,
) -> None:
    """Write a script that records an original where its own transformers runs, for `porter verify --reference`."""
    from porter import commands

    commands.reference(out, force)


@app.command()
def sweep(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Sources, NAME=SOURCE, or folders of modeling files. Default: all of transformers."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where scoreboard.json and .md go; rows there stay.")] = Path(
        "docs"
    ),
    jobs: Annotated[int, typer.Option(help="Processes side by side; 0: one for each processor.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Skip sources that have a row.")] = False,
    json: Json = False,
) -> None:
    """Convert and verify many sources, and write the scoreboard; exit 1 if any is neither verified nor refused."""
    from porter import commands

    raise typer.Exit(commands.sweep(sources or [], out, jobs or os.cpu_count() or 1, resume, json))


@app.command()
def conform(
    port: Annotated[Path, typer.Argument(metavar="PORT", help="A port for vLLM: its folder or its module.")],
    vllm: Annotated[
        list[str] | None,
        typer.Option(help="An installed vLLM, a wheel, or a release to read; default: all releases that porter knows."),
    ] = None,
    json: Json = False,
) -> None:
    """Check that a vLLM has every name and keyword that a port uses, from its source; exit 1 if not."""
    from porter import commands

    raise typer.Exit(commands.conform(port, vllm or [], json))


@app.command(name="vllm-env")
def vllm_env(
    folder: Annotated[Path | None, typer.Argument(help="Where to make it; default: beside porter's store.")] = None,
    version: Annotated[str, typer.Option(help="The release of vLLM.")] = "0.32.0",
    cpu: Annotated[bool, typer.Option("--cpu", help="The build for machines without a GPU.")] = False,
) -> None:
    """Make an environment with vLLM in it, for `porter verify --engine vllm`."""
    from porter import commands

    commands.vllm_env(folder, version, cpu)


@app.command()
def register(
    port: Annotated[Path, typer.Argument(metavar="PORT_OR_DIR", help="A port's folder or its module.")],
    force: Force = False,
) -> None:
    """Use this port for its architecture from now on."""
    from porter import commands

    commands.register(port, force)


@app.command(name="list")
def list_(json: Json = False) -> None:
    """The registered ports."""
    from porter import commands

    commands.list_ports(json)


@app.command()
def show(architecture: Annotated[str, typer.Argument(metavar="ARCH")], json: Json = False) -> None:
    """What is known about a registered port."""
    from porter import commands

    commands.show(architecture, json)


@app.command()
def unregister(architecture: Annotated[str, typer.Argument(metavar="ARCH")]) -> None:
    """Forget the port of an architecture."""
    from porter import commands

    commands.unregister(architecture)


@app.command()
def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    port: PortFile = None,
    dtype: Dtype = "auto",
    max_tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    json: Json = False,
) -> None:
    """Continue a text with a registered port."""
    from porter import commands

    options = commands.Sampling(port, dtype, max_tokens, temperature, seed)
    commands.complete(model, prompt, options, json)


@app.command()
def chat(
    model: Model,
    port: PortFile = None,
    dtype: Dtype = "auto",
    max_tokens: Annotated[int, typer.Option(help="How many tokens an answer has at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Talk with a chat model; an empty line ends it."""
    from porter import commands

    commands.chat(model, commands.Sampling(port, dtype, max_tokens, temperature, seed))


@app.command()
def explain(
    name: Annotated[
        str | None, typer.Argument(metavar="[PASS|CODE]", help="A pass's name, or a refusal's code.")
    ] = None,
) -> None:
    """What a pass does, with examples, or what a refusal's code means; without a name, all of them."""
    from porter import commands

    commands.explain(name)


@app.command()
def ledger(
    model: Annotated[str, typer.Option(help="A checkpoint folder or a hub repository.")],
    port: PortFile = None,
    json: Json = False,
) -> None:
    """Where each tensor of a checkpoint goes; exit 1 if any is left over."""
    from porter import commands

    raise typer.Exit(commands.ledger(model, port, json))


app.command()(serve)


@app.command()
def faults(
    names: Annotated[list[str] | None, typer.Argument(help="Words of the faults' names; default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model type to put faults into; default: a set.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where faults.json and faults.md go.")] = None,
    json: Json = False,
) -> None:
    """Make right ports wrong in known places, and see what verification notices; exit 1 if it misses any."""
    from porter import commands

    raise typer.Exit(commands.faults(names or [], model or [], out, json))

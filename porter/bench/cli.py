"""`porter bench`: each command parses and calls. Nothing heavy is imported until a command runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="bench", no_args_is_help=True, help="Measure the engine, alone or against others.")

Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub repository; for dummy weights, one config.")]
Port = Annotated[Path | None, typer.Option("--port", help="A port's file or folder; default: the registered one.")]
Against = Annotated[list[str] | None, typer.Option(help="hf or vllm: run in alternation; may be given twice.")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy: random weights of the config.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
InputLen = Annotated[str, typer.Option(help="Tokens of a prompt; 100:1024 draws them evenly.")]
OutputLen = Annotated[str, typer.Option(help="Tokens of an answer, likewise.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each engine that count; one more warms up.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Sequences of a step at most.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(min=1, help="Tokens of a step at most.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Prompt plus output at most; default: what the workload needs.")]
Memory = Annotated[float, typer.Option(help="gpu_memory_utilization of each engine; they share the GPU.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")]
Seed = Annotated[int, typer.Option(help="Draws lengths and tokens.")]
VllmPython = Annotated[str | None, typer.Option(help="The Python that has vLLM; default: this one.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the report here, as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Write a bar chart here, as SVG.")]


@app.command()
def throughput(
    model: Model,
    port: Port = None,
    against: Against = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests, all there from the start.")] = 256,
    input_len: InputLen = "100:1024",
    output_len: OutputLen = "100:1024",
    temperature: Temperature = 0.6,
    repeats: Repeats = 3,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 16384,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: Memory = 0.9,
    enforce_eager: Eager = False,
    seed: Seed = 0,
    vllm_python: VllmPython = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Tokens a second with many requests at once."""
    from porter.bench import commands

    work = commands.workload(num_prompts, input_len, output_len, temperature, seed)
    engine = commands.engine(
        work, max_num_seqs, max_num_batched_tokens, max_model_len, gpu_memory_utilization, enforce_eager
    )
    setup = commands.setup(model, port, dtype, device, load_format, engine, vllm_python)
    commands.bench("throughput", setup, work, against or [], commands.Reporting(repeats, output, plot))


@app.command()
def latency(
    model: Model,
    port: Port = None,
    against: Against = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    input_len: InputLen = "512",
    output_len: OutputLen = "257",
    temperature: Temperature = 0.6,
    repeats: Repeats = 3,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 16384,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: Memory = 0.9,
    enforce_eager: Eager = False,
    seed: Seed = 0,
    vllm_python: VllmPython = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Milliseconds to the first token and for each one after it."""
    from porter.bench import commands

    work = commands.workload(batch, input_len, output_len, temperature, seed)
    engine = commands.engine(
        work, max_num_seqs, max_num_batched_tokens, max_model_len, gpu_memory_utilization, enforce_eager
    )
    setup = commands.setup(model, port, dtype, device, load_format, engine, vllm_python)
    commands.bench("latency", setup, work, against or [], commands.Reporting(repeats, output, plot))


@app.command()
def profile(
    model: Model,
    port: Port = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens that each has.")] = 512,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    gpu_memory_utilization: Memory = 0.9,
    enforce_eager: Eager = False,
    output: Output = None,
) -> None:
    """Where the time of a decode step goes, and how far it is from what memory and arithmetic allow."""
    from porter.bench import commands

    work = commands.workload(batch, str(context), "256", 0.6, 0)
    engine = commands.engine(work, batch, 16384, None, gpu_memory_utilization, enforce_eager)
    setup = commands.setup(model, port, dtype, device, load_format, engine, None)
    commands.profile(setup, batch, context, output)


@app.command()
def serve(
    base_url: Annotated[str, typer.Option(help="Any server that speaks OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name for the model; default: the first it lists.")] = None,
    api_key: Annotated[str, typer.Option(envvar="PORTER_API_KEY", help="The server's key.")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 200,
    request_rate: Annotated[
        float, typer.Option(min=0.001, help="Requests a second, as a Poisson process; inf sends all at once.")
    ] = float("inf"),
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Open requests at most.")] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Words of a prompt of its own.")] = 128,
    prefix_len: Annotated[int, typer.Option(min=0, help="Words that all prompts start with.")] = 0,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    goodput_ttft: Annotated[float, typer.Option(help="A good request's first token, in ms at most.")] = 1000.0,
    goodput_tpot: Annotated[float, typer.Option(help="A good request's mean time a token, in ms at most.")] = 100.0,
    seed: Seed = 0,
    output: Output = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Load a server with streamed requests; exit 1 if any failed."""
    from porter.bench import serve as load

    options = load.Load(
        base_url=base_url,
        model=model,
        api_key=api_key,
        num_prompts=num_prompts,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        input_len=input_len,
        prefix_len=prefix_len,
        output_len=output_len,
        goodput_ttft=goodput_ttft,
        goodput_tpot=goodput_tpot,
        seed=seed,
    )
    raise typer.Exit(load.run(options, output, json))

"""The options of `porter serve`, in vLLM's words where it has them."""

from pathlib import Path
from typing import Annotated

import typer

from porter.serve.options import ServeOptions


def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub repository, or a registered port.")],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The TCP port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[list[str] | None, typer.Option(help="What clients call the model.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="A key to ask for; also PORTER_API_KEY.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Prompt and answer in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Samples in a step at most.")] = 128,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a step at most.")] = 2048,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a block of the KV cache.")] = 16,
    num_gpu_blocks_override: Annotated[int | None, typer.Option(min=1, help="Blocks of the KV cache.")] = None,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Share the blocks of equal prefixes.")] = True,
    quantization: Annotated[str | None, typer.Option(help="How to store weights: int8 or fp8.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU to use.")] = 0.9,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    seed: Annotated[int, typer.Option(help="For requests that give none.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for noise.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer's folder or hub name.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A jinja file for conversations.")
    ] = None,
    generation_config: Annotated[str, typer.Option(help="auto: the model's defaults; none: the API's.")] = "auto",
    max_logprobs: Annotated[int, typer.Option(min=0, max=1024, help="Alternatives that may be asked for.")] = 20,
    max_queued_requests: Annotated[int, typer.Option(min=0, help="Samples that may wait; then 429.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="The largest body of a request.")] = 4 * 2**20,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests after SIGTERM.")] = 30.0,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of a dead engine in ten minutes.")] = 3,
    allowed_origin: Annotated[list[str] | None, typer.Option(help="A web origin to allow (CORS).")] = None,
    uvicorn_log_level: Annotated[str, typer.Option(help="info logs every request.")] = "warning",
) -> None:
    """Serve a model over an OpenAI-compatible API."""
    from porter.serve import command

    engine = {
        "model": model,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "block_size": block_size,
        "num_blocks": num_gpu_blocks_override,
        "enable_prefix_caching": enable_prefix_caching,
        "quantization": quantization,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enforce_eager": enforce_eager,
        "seed": seed,
        "device": device,
        "load_format": load_format,
        "trust_remote_code": trust_remote_code,
        "tokenizer": tokenizer,
    }
    options = ServeOptions(
        engine=engine,
        host=host,
        port=port,
        served_model_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ()),
        allowed_origins=tuple(allowed_origin or ()),
        chat_template=chat_template,
        generation_config=generation_config,
        max_logprobs=max_logprobs,
        max_queued_requests=max_queued_requests,
        max_body_bytes=max_body_bytes,
        shutdown_timeout=shutdown_timeout,
        max_restarts=max_restarts,
        log_level=uvicorn_log_level,
    )
    raise typer.Exit(command.run(options))

"""What each `porter bench` command calls and prints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter import console
from porter.atomic import write_files
from porter.bench.compare import SIDES, Setup, compare, latency, report, started, throughput
from porter.bench.workload import Workload, parse_range
from porter.errors import UsageError

_FIGURES = {"throughput": "output_tokens_per_s", "latency": "ms_per_token"}
_KERNELS_SHOWN = 12


@dataclass(frozen=True)
class Reporting:
    """How often, and where to."""

    repeats: int
    output: Path | None
    plot: Path | None


def workload(num_prompts: int, input_len: str, output_len: str, temperature: float, seed: int) -> Workload:
    """The workload that options describe."""
    lengths = parse_range(input_len, "--input-len"), parse_range(output_len, "--output-len")
    return Workload(num_prompts, *lengths, temperature, seed)


def engine(
    work: Workload,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None,
    memory: float,
    eager: bool,
) -> dict[str, Any]:
    """Options that porter's LLM and vLLM's share."""
    return {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len or work.longest,
        "gpu_memory_utilization": memory,
        "enforce_eager": eager,
    }


def setup(
    model: str,
    port: Path | None,
    dtype: str,
    device: str,
    load_format: str,
    engine: dict[str, Any],
    vllm_python: str | None,
) -> Setup:
    """How to start the engines, with the port found before anything slow."""
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"load format {load_format!r} is unknown", "use auto or dummy")
    if port is not None and not port.exists():
        raise UsageError(f"{port} does not exist", "give a port's file or folder")
    return Setup(model, None if port is None else str(port.resolve()), dtype, device, load_format, engine, vllm_python)


def bench(kind: str, setup: Setup, work: Workload, against: list[str], reporting: Reporting) -> None:
    """`porter bench throughput` and `latency`."""
    for name in against:
        if name not in SIDES:
            raise UsageError(f"there is nothing to measure against called {name!r}", f"use {' or '.join(SIDES)}")
    if kind == "latency" and work.output_len[1] < 2:
        raise UsageError("one output token has no time a token", "give --output-len at least 2")
    names = ["porter", *dict.fromkeys(against)]
    with (
        console.progress("starting", len(names) * (reporting.repeats + 1)) as advance,
        started(names, setup) as sides,
    ):
        rows = compare(sides, throughput(work) if kind == "throughput" else latency(work), reporting.repeats, advance)
    found = report(kind, setup, work, rows)
    _print(kind, rows)
    _write_json(found, reporting.output)
    if reporting.plot is not None:
        from porter.bench.plot import bar_chart

        title = f"{found['model']} on {rows[0]['device']}"
        _write_text(bar_chart(title, rows, _FIGURES[kind]), reporting.plot)


def _print(kind: str, rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["figures"])
    lines = []
    for row in rows:
        figures = row["figures"]
        ratio = row.get("ratio_of_first", {}).get(_FIGURES[kind])
        told = [f"{figures[name]['median']:,.4g}" for name in names]
        spread = f"{figures[_FIGURES[kind]]['spread']:.1%}"
        lines.append(
            (row["side"], *told, spread, "" if ratio is None else f"{ratio:.2f}", f"{row['start_seconds']:.1f}")
        )
    console.table(kind, ("engine", *names, "spread", "porter / it", "start s"), lines)
    for row in rows:
        console.say(_memory(row))


def _memory(row: dict[str, Any]) -> str:
    """One line: peaks in GB (10^9 bytes), and how many tokens the KV cache holds."""
    places = [("host", row["peak_host_bytes"]), ("device", row.get("peak_device_bytes"))]
    peaks = ", ".join(f"{size / 1e9:.1f} GB on the {place}" for place, size in places if size)
    cache = f"; its KV cache holds {row['kv_tokens']:,} tokens" if row["kv_tokens"] else ""
    return f"{row['side']}: at most {peaks}{cache}"


def profile(setup: Setup, batch: int, context: int, output: Path | None) -> None:
    """`porter bench profile`."""
    with console.working("loading and measuring"):
        from porter.bench.profile import profile_decode
        from porter.runtime.engine import LLM

        engine = setup.engine | {"skip_tokenizer_init": True, "enable_prefix_caching": False}
        engine |= {"dtype": setup.dtype, "device": setup.device, "load_format": setup.load_format}
        found = profile_decode(LLM(setup.model, port=setup.port, **engine), batch, context)
    rows = [
        (kernel["name"][:60], f"{kernel['ms']:.3f}", f"{kernel['share']:.1%}", f"{kernel['calls']:.0f}")
        for kernel in found["kernels"][:_KERNELS_SHOWN]
    ]
    console.table(f"a decode step of {batch} at {context} tokens", ("kernel", "ms", "share", "calls"), rows)
    console.say(
        f"step {found['step_ms']:.3f} ms, kernels {found['kernel_ms']:.3f} ms, not covered by kernels "
        f"{found['host_share']:.1%}, floor {found['floor_ms']:.3f} ms (step / floor {found['step_over_floor']:.2f})"
    )
    _write_json(report("profile", setup, workload(batch, str(context), "256", 0.6, 0), [found]), output)


def _write_json(found: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        _write_text(json.dumps(found, indent=2) + "\n", output)


def _write_text(text: str, path: Path) -> None:
    write_files(path.parent, {path.name: text})
    console.say(f"written to {path}")

"""Where a decode step's time goes: by kernel, by the host, and how far it is from what memory and arithmetic allow."""

import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from porter.runtime.engine import LLM, SamplingParams
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding

_STEPS = 32
_WARM_UP = 4


@dataclass(frozen=True)
class Floors:
    """Milliseconds that a step needs at least: for the bytes it must read, and for its multiplications."""

    bytes_read: int
    flops: int
    bytes_per_s: float
    flops_per_s: float

    @property
    def ms(self) -> float:
        return max(self.bytes_read / self.bytes_per_s, self.flops / self.flops_per_s) * 1e3


def profile_decode(llm: LLM, batch: int, context: int) -> dict[str, Any]:
    """Profile decode steps of `batch` sequences of about `context` tokens."""
    engine = llm.llm_engine
    on_gpu = engine.config.device.type == "cuda"
    _fill(llm, batch, context)
    wall_ms = _timed_steps(llm, on_gpu)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        _timed_steps(llm, on_gpu)
    kernels = _kernel_ms(profiler, on_gpu)
    for request_id in list(engine._requests):
        engine.abort_request(request_id)
    while engine.has_unfinished_requests():
        engine.step()
    busy_ms = sum(ms for _, ms, _ in kernels)
    floors = _floors(llm, batch, context)
    return {
        "batch": batch,
        "context": context,
        "step_ms": wall_ms,
        "kernel_ms": busy_ms,
        "host_share": max(0.0, 1 - busy_ms / wall_ms),
        "floor_ms": floors.ms,
        "step_over_floor": wall_ms / floors.ms,
        "floors": asdict(floors),
        "kernels": [{"name": n, "ms": ms, "share": ms / wall_ms, "calls": calls} for n, ms, calls in kernels],
    }


def _fill(llm: LLM, batch: int, context: int) -> None:
    """Requests that decode for longer than is measured."""
    params = SamplingParams(temperature=0.6, max_tokens=4 * _STEPS, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    for i in range(batch):
        ids = [10 + (i + j) % (engine.vocab_size - 10) for j in range(context)]
        engine.add_request(f"profile-{i}", ids, params)
    while engine.scheduler.waiting or any(seq.num_output == 0 for seq in engine.scheduler.running):
        engine.step()
    for _ in range(_WARM_UP):
        engine.step()


def _timed_steps(llm: LLM, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_STEPS):
        llm.llm_engine.step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / _STEPS * 1e3


def _kernel_ms(profiler: Any, on_gpu: bool) -> list[tuple[str, float, float]]:
    """(kernel, ms a step, calls a step), the largest first."""
    if on_gpu:
        events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        spent = own_times([(event.name, event.time_range.start, event.time_range.end) for event in events])
        calls = Counter(event.name for event in events)
    else:
        averages = profiler.key_averages()
        spent = {event.key: event.self_cpu_time_total for event in averages}
        calls = Counter({event.key: event.count for event in averages})
    ranked = sorted(spent.items(), key=lambda item: -item[1])
    return [(name, us / 1e3 / _STEPS, calls[name] / _STEPS) for name, us in ranked if us > 0]


def own_times(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """(kernel, start, end) of one stream -> each kernel's time since the one before it ended.

    A kernel may start early and wait for the one before it: that is the other's time. The sum is the time in which
    any ran.
    """
    times: defaultdict[str, float] = defaultdict(float)
    latest = float("-inf")
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        times[name] += max(0.0, end - max(start, latest))
        latest = max(latest, end)
    return dict(times)


def _floors(llm: LLM, batch: int, context: int) -> Floors:
    """Every weight read once (of an embedding that is not also the head only a few rows), every cached key and value
    once; two operations a weight and sequence."""
    executor = llm.llm_engine.executor
    modules = list(executor.model.modules())
    heads = {id(module.weight) for module in modules if isinstance(module, ParallelLMHead)}
    embeddings = {id(module.weight) for module in modules if isinstance(module, VocabParallelEmbedding)}
    used = [p for p in executor.model.parameters() if id(p) not in embeddings - heads]
    per_token = sum(cache[:, 0, 0].numel() * cache.element_size() for cache in executor.kv_caches if cache is not None)
    bytes_read = sum(p.numel() * p.element_size() for p in used) + batch * context * per_token
    device, dtype = llm.llm_engine.config.device, llm.llm_engine.config.dtype
    return Floors(bytes_read, 2 * batch * sum(p.numel() for p in used), *_rates(device, dtype))


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a large product: measured."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device, dtype=dtype)
    copy = _best_seconds(lambda: target.copy_(source), device)
    product = _best_seconds(lambda: left @ left, device)
    return 2 * size / copy, 2 * side**3 / product


def _best_seconds(work: Any, device: torch.device) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

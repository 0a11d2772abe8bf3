"""What `/metrics` tells, in Prometheus' words: gauges are read when asked, the rest is counted as answers come."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from porter.serve.messages import EngineFacts, EngineStats, RequestDelta

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)


class Metrics:
    """Counts for one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests that were taken.")
        self.generated_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self.preemptions = self._counter("num_preemptions", "Samples that lost their blocks and were computed again.")
        self.aborted = self._counter("request_aborted", "Requests whose client went away, or that were cut off.")
        self.rejected = self._counter("request_rejected", "Requests turned away because the queue was full.")
        self.restarts = self._counter("engine_restarts", "Times that the engine died and was started again.")
        self._finished = Counter(
            "porter_request_success", "Samples that finished.", ["finished_reason"], registry=self.registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a sample.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self._preempted_before = 0

    def watch(self, stats: Callable[[], EngineStats], facts: Callable[[], EngineFacts | None]) -> None:
        """Read the gauges from here."""
        self._gauge("num_requests_running", "Samples in the batch.", lambda: stats().num_running)
        self._gauge("num_requests_waiting", "Samples that wait for a place.", lambda: stats().num_waiting)
        self._gauge("kv_cache_usage_perc", "Blocks in use, 0 to 1.", lambda: _usage(stats(), facts()))

    def on_stats(self, stats: EngineStats) -> None:
        """Count what grew since the last report; an engine that was started again begins at 0."""
        if stats.num_preemptions < self._preempted_before:
            self._preempted_before = 0
        self.preemptions.inc(stats.num_preemptions - self._preempted_before)
        self._preempted_before = stats.num_preemptions

    def on_delta(self, delta: RequestDelta, arrival_time: float, previous: float | None) -> float:
        """Count what is new of a request that came at `arrival_time` and gave its last news at `previous`
        (time.monotonic()); returns the time of this news."""
        now = time.monotonic()
        num_tokens = max((len(sample.token_ids) for sample in delta.samples.values()), default=0)
        self.generated_tokens.inc(sum(len(sample.token_ids) for sample in delta.samples.values()))
        if previous is None:
            first = delta.first_token_time or now
            self._first.observe(first - arrival_time)
            previous, num_tokens = first, num_tokens - 1
        for _ in range(num_tokens):
            self._between.observe((now - previous) / num_tokens)
        for sample in delta.samples.values():
            if sample.finish_reason is not None:
                self._finished.labels(sample.finish_reason).inc()
        if delta.finished:
            self._whole.observe(now - arrival_time)
        return now

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"porter_{name}", help, registry=self.registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"porter_{name}", help, buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        Gauge(f"porter_{name}", help, registry=self.registry).set_function(read)


def _usage(stats: EngineStats, facts: EngineFacts | None) -> float:
    return 0.0 if facts is None else 1 - stats.num_free_blocks / facts.num_blocks

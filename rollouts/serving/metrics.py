"""What the server counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rollouts.inference import Completion, EmbeddedEngine
from rollouts.serving.served_model import ServedModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("rollouts_requests", "Requests answered", ["path", "status"], registry=r)
        self.seconds = Histogram(
            "rollouts_request_seconds", "Time to the end of the answer", ["path"], buckets=SECONDS, registry=r
        )
        self.prompt_tokens = Counter("rollouts_prompt_tokens", "Prompt tokens", ["model"], registry=r)
        self.cached_tokens = Counter(
            "rollouts_cached_prompt_tokens", "Prompt tokens found in the cache", ["model"], registry=r
        )
        self.generated_tokens = Counter("rollouts_generated_tokens", "Tokens sampled", ["model"], registry=r)
        self.samples = Counter("rollouts_samples", "Samples that ended", ["model", "reason"], registry=r)

    def watch(self, models: Sequence[ServedModel]) -> None:
        """Read the models' engines whenever the metrics are asked for."""
        gauges: dict[str, tuple[str, Callable[[EmbeddedEngine], int]]] = {
            "running_samples": ("Samples that the engine computes now", lambda engine: engine.num_running),
            "waiting_samples": ("Samples that wait for a place in the engine", lambda engine: engine.num_waiting),
            "free_cache_pages": ("Pages that no running sample holds", lambda engine: engine.num_free_pages),
            "preemptions": ("Samples sent back to wait for lack of cache", lambda engine: engine.num_preemptions),
            "weight_version": ("Version of the served weights", lambda engine: engine.weight_version),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(f"rollouts_{name}", text, ["model"], registry=self.registry)
            for served in models:
                gauge.labels(served.name).set_function(partial(read, served.engine))

    def count_samples(self, model: str, num_prompt: int, completions: Sequence[Completion]) -> None:
        """Count one prompt and the samples of it."""
        self.prompt_tokens.labels(model).inc(num_prompt)
        self.cached_tokens.labels(model).inc(min((c.num_cached_tokens for c in completions), default=0))
        for completion in completions:
            self.generated_tokens.labels(model).inc(len(completion.token_ids))
            self.samples.labels(model, completion.stop_reason.value).inc()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

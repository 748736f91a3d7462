"""What Prometheus scrapes. Names follow its conventions, and SGLang's where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastldm.request import Result

if TYPE_CHECKING:
    from fastldm.server.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counted as requests come and go; what sessions know is read when it is asked for."""

    def __init__(self, models: Models) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fastldm_http_requests", "HTTP requests.", ["endpoint", "method", "status"], registry=registry
        )
        self._http_seconds = Histogram(
            "fastldm_http_request_duration_seconds",
            "From a request's header to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._errors = Counter("fastldm_errors", "Generations that failed.", ["model", "code"], registry=registry)
        self._images = Counter("fastldm_images", "Pictures that were made.", ["model"], registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, ["model"], buckets=buckets, registry=registry)

        self._queue = seconds("fastldm_queue_time_seconds", "From submission to the start.")
        self._text = seconds("fastldm_text_time_seconds", "Prompts, conditions and noise.")
        self._step = seconds("fastldm_step_time_seconds", "A step of the sampler.", _STEP_SECONDS)
        self._decode = seconds("fastldm_decode_time_seconds", "From latents to pictures.")
        self._encode = seconds("fastldm_encode_time_seconds", "From pictures to files.")
        self._all = seconds("fastldm_e2e_request_latency_seconds", "From submission to the pictures.")
        registry.register(_Sessions(models))

    def http(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""
        method = method if method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH") else "other"
        self._requests.labels(endpoint, method, str(status)).inc()
        self._http_seconds.labels(endpoint).observe(seconds)

    def done(self, model: str, queue: float, result: Result, encode: float) -> None:
        """A generation was answered. queue, encode: seconds in the queue, and of encoding its pictures."""
        timings = result.timings
        self._images.labels(model).inc(result.request.batch)
        self._queue.labels(model).observe(queue)
        self._text.labels(model).observe(timings.text)
        for step in timings.steps:
            self._step.labels(model).observe(step)
        self._decode.labels(model).observe(timings.decode)
        self._encode.labels(model).observe(encode)
        self._all.labels(model).observe(timings.total)

    def failed(self, model: str, code: str) -> None:
        """A generation failed, or was cancelled."""
        self._errors.labels(model, code).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Sessions:
    """The state of every session, when it is scraped."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "num_running_reqs": "Requests that have started and are not done.",
            "num_queue_reqs": "Requests that wait.",
            "batch_images": "Pictures that share steps at the moment.",
            "max_batch_images": "Pictures of one size that may share a step.",
            "resident_adapters": "Adapters that are loaded.",
            "captured_graphs": "CUDA graphs that are held.",
            "planned_memory_bytes": "Weights, buffers of the sizes in use, and copies for adapters.",
            "used_memory_bytes": "Of the device, or of this process on a CPU.",
        }
        families = {name: GaugeMetricFamily(f"fastldm_{name}", text, labels=["model"]) for name, text in gauges.items()}
        requests = CounterMetricFamily("fastldm_requests", "Requests that ended.", labels=["model", "outcome"])
        swaps = CounterMetricFamily("fastldm_adapter_swaps", "How often weights were changed.", labels=["model"])
        for model in self._models.loaded:
            if (session := model.session) is None:  # unloaded meanwhile
                continue
            stats, name = session.stats(), [model.name]
            values = {
                "num_running_reqs": stats.running,
                "num_queue_reqs": stats.waiting,
                "batch_images": stats.images,
                "max_batch_images": stats.max_batch,
                "resident_adapters": len(stats.adapters),
                "captured_graphs": stats.captures,
                "planned_memory_bytes": stats.memory_planned,
                "used_memory_bytes": stats.memory_used or 0,
            }
            for key, value in values.items():
                families[key].add_metric(name, value)
            for outcome in ("completed", "failed", "cancelled"):
                requests.add_metric([model.name, outcome], getattr(stats, outcome))
            swaps.add_metric(name, stats.adapter_swaps)
        yield from (*families.values(), requests, swaps)

"""Prometheus metrics of a server."""

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .errors import ServingError


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "openvla_stage_seconds", "Time of a request by stage", ["stage"], buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "openvla_batch_size",
            "Observations in the batch of a request",
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self.queue = Gauge("openvla_queue_length", "Requests that wait for a prediction", registry=self.registry)
        self.sessions = Gauge("openvla_sessions", "Open sessions", registry=self.registry)
        self.forward_passes = Counter(
            "openvla_forward_passes", "Passes of the language model, summed over requests", registry=self.registry
        )
        self.requests = Counter(
            "openvla_requests", "Requests for an action by their outcome", ["outcome"], registry=self.registry
        )
        self.requests.labels("ok")  # is 0 before the first request instead of missing

    @contextlib.contextmanager
    def count_errors(self) -> Iterator[None]:
        """Count a `ServingError` of the block, and pass it on."""
        try:
            yield
        except ServingError as error:
            self.requests.labels(error.kind).inc()
            raise

    def export(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


__all__ = ["Metrics"]

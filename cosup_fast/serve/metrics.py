"""What a server counts, for Prometheus; rates such as tokens/s are `rate()` of the counters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("requests_running", "requests in the batch")
        self.waiting = self._gauge("requests_waiting", "requests that wait for a place in the batch")
        self.refused = self._counter("requests_refused", "requests refused because the queue was full")
        self.answers = self._counter("answers", "answers by why they ended", ("stop_reason",))
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts")
        self.generated_tokens = self._counter("generated_tokens", "tokens chosen by Gen")
        self.inserted_tokens = self._counter("inserted_tokens", "tokens of passages given to Gen")
        self.retrievals = self._counter("retrievals", "passages retrieved during answers")
        self.first_token = self._histogram("first_token_seconds", "from a request's arrival to its first token")
        self.answer_seconds = self._histogram("answer_seconds", "from a request's arrival to the end of its answer")
        self.retrieval = self._histogram("retrieval_seconds", "one search of the index")
        self.step = self._histogram("step_seconds", "one forward for all requests of the batch")
        self.http = self._counter("http_responses", "responses by path and status", ("path", "status"))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"cosup_{name}", what, registry=self.registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"cosup_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"cosup_{name}", what, buckets=_SECONDS, registry=self.registry)

"""What Prometheus reads at /metrics. Names begin with ``vllm_deterministic_``."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_deterministic.service.schema import Verification

_ANSWER_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RUN_BUCKETS = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self, targets: list[str]) -> None:
        self._targets = targets
        self._registry = registry = CollectorRegistry()
        name = "vllm_deterministic_"
        self._runs = Counter(name + "runs", "Ended verifications.", ["target", "trigger", "status"], registry=registry)
        self._unique_outputs = Gauge(
            name + "unique_outputs",
            "Most distinct outputs that any one request got in the last verification; 1 is the promise.",
            ["target", "arm"],
            registry=registry,
        )
        self._unique_logprobs = Gauge(
            name + "unique_logprobs",
            "The same for outputs with their logprobs.",
            ["target", "arm"],
            registry=registry,
        )
        self._diverged = Gauge(
            name + "diverged",
            "1 where the last verification that came to a verdict, or got as far as a difference, found one.",
            ["target"],
            registry=registry,
        )
        self._divergences = Counter(
            name + "divergences",
            "Answers that differ from the usual answer to the same request.",
            ["target", "arm"],
            registry=registry,
        )
        self._replicas_diverged = Gauge(
            name + "replicas_diverged",
            "1 where the targets of the last verification of several answered differently.",
            registry=registry,
        )
        self._fingerprints = Gauge(
            name + "fingerprints",
            "Distinct system fingerprints in the last verification of several targets; 1 is expected.",
            registry=registry,
        )
        self._last_run = Gauge(
            name + "last_run_timestamp_seconds", "End of the last verification.", ["target"], registry=registry
        )
        self._last_success = Gauge(
            name + "last_success_timestamp_seconds",
            "End of the last verification that found no difference; 0: there was none.",
            ["target"],
            registry=registry,
        )
        self._tokens = Counter(name + "tokens_compared", "Output tokens received.", ["target"], registry=registry)
        self._answers = Histogram(
            name + "answer_duration_seconds",
            "From sending a compared request to its whole answer.",
            ["target", "arm"],
            buckets=_ANSWER_BUCKETS,
            registry=registry,
        )
        self._durations = Histogram(
            name + "run_duration_seconds",
            "Duration of verifications.",
            ["target"],
            buckets=_RUN_BUCKETS,
            registry=registry,
        )
        self.ready = Gauge(name + "target_ready", "1 where the target answers.", ["target"], registry=registry)
        self.queued = Gauge(name + "queued", "Verifications that wait.", registry=registry)
        self.running = Gauge(name + "running", "Verifications that run.", registry=registry)
        self.refused = Counter(name + "refused", "Verifications refused since the queue was full.", registry=registry)
        for target in targets:
            self._last_run.labels(target).set(0)
            self._last_success.labels(target).set(0)
            self._diverged.labels(target).set(0)

    def ended(self, verification: Verification, latencies: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Count an ended verification; ``latencies`` are seconds by target and arm."""
        self._remember(verification)
        for target in verification.targets:
            told = next((result.status for result in verification.results if result.target == target), None)
            status = verification.status if told is None or verification.status == "cancelled" else told
            self._runs.labels(target, verification.trigger, status).inc()
        for result in verification.results:
            self._durations.labels(result.target).observe(result.duration_s)
            for arm in result.arms:
                self._divergences.labels(result.target, arm.arm).inc(arm.divergent)
                self._tokens.labels(result.target).inc(arm.output_tokens)
                observe = self._answers.labels(result.target, arm.arm).observe
                for seconds in latencies.get(result.target, {}).get(arm.arm, []):
                    observe(seconds)

    def restore(self, history: list[Verification]) -> None:
        """Set what speaks of the last verification from the history, so that a restart silences no alert."""
        for verification in history:
            self._remember(verification)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)

    def _remember(self, verification: Verification) -> None:
        """Set the gauges, for targets that are still configured."""
        end = verification.finished_at.timestamp() if verification.finished_at else 0.0
        for result in verification.results:
            if result.target not in self._targets:
                continue
            self._last_run.labels(result.target).set(end)
            if result.status == "identical":
                self._last_success.labels(result.target).set(end)
            found = any(arm.status == "diverged" for arm in result.arms)
            if found or result.status == "identical":
                self._diverged.labels(result.target).set(found)
            for arm in result.arms:
                self._unique_outputs.labels(result.target, arm.arm).set(arm.unique_outputs)
                self._unique_logprobs.labels(result.target, arm.arm).set(arm.unique_logprobs)
        if verification.replicas is not None and verification.replicas.status != "incomplete":
            self._replicas_diverged.set(verification.replicas.status == "diverged")
            told = {tuple(result.fingerprints) for result in verification.results}
            self._fingerprints.set(len(told))

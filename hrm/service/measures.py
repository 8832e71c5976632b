"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hrm.service.engine import Engine
from hrm.service.memory import LocalMemory
from hrm.service.modules import Modules
from hrm.service.recorder import Recorder

_PATHS = (
    "/",
    "/infer",
    "/infer/L",
    "/infer/H",
    "/healthz",
    "/readyz",
    "/models",
    "/metrics",
    "/openapi.json",
)  # others count as one
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Measures:
    """Requests, their times, and the engine's work.

    Args:
        most_waiting: puzzles that may wait for a slot.
    """

    def __init__(self, engine: Engine, modules: Modules, recorder: Recorder | None, most_waiting: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files; on Linux
        self._requests = Counter(
            "hrm_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "hrm_request_seconds",
            "From a request's arrival to its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._errors = Counter("hrm_errors", "Requests that failed in the service itself", registry=self.registry)
        gauges = {
            "hrm_ready": ("Whether the model can compute", lambda: engine.failure is None),
            "hrm_slots": ("Puzzles that can be computed at a time", lambda: engine.slots),
            "hrm_slots_in_use": ("Puzzles being computed", lambda: engine.work.in_slots),
            "hrm_queue": ("Puzzles that wait for a slot", lambda: engine.work.waiting),
            "hrm_queue_limit": ("Puzzles that may wait for a slot", lambda: most_waiting),
            "hrm_memory_up": ("Whether the working memory answered last", lambda: modules.memory.is_up),
        }
        if recorder:
            gauges |= {
                "hrm_results_up": (
                    "Whether the results store works",
                    lambda: not recorder.is_failing,
                ),
                "hrm_results_waiting": ("Answers that are not in the results store yet", lambda: recorder.kept),
            }
        if isinstance(memory := modules.memory, LocalMemory):
            gauges["hrm_sessions"] = "Sessions in the working memory of this process", lambda: len(memory)
        for name, (meaning, value) in gauges.items():
            Gauge(name, meaning, registry=self.registry).set_function(value)
        self.registry.register(_Work(engine, modules, recorder))

    def count(self, path: str, status: int, seconds: float) -> None:
        """A request that has come to its end."""
        named = path if path in _PATHS else "/results" if path.startswith("/results/") else "other"
        self._requests.labels(named, str(status)).inc()
        self._seconds.labels(named).observe(seconds)
        if status == 500:
            self._errors.inc()


class _Work(Collector):
    """What others count themselves."""

    def __init__(self, engine: Engine, modules: Modules, recorder: Recorder | None) -> None:
        self._engine, self._modules, self._recorder = engine, modules, recorder

    def collect(self) -> list[CounterMetricFamily]:
        work = self._engine.work
        updates = CounterMetricFamily("hrm_module_updates", "Updates in sessions", labels=["level"])
        for level, count in self._modules.updates.items():
            updates.add_metric([level], count)
        failures = self._modules.memory.failures
        counts = [
            CounterMetricFamily("hrm_puzzles", "Puzzles answered, augmentations included", work.answered),
            CounterMetricFamily("hrm_act_steps", "ACT steps spent on them", work.act_steps),
            updates,
            CounterMetricFamily("hrm_memory_failures", "Times that the working memory did not answer", failures),
        ]
        if (recorder := self._recorder) is not None:
            counts += [
                CounterMetricFamily("hrm_results_recorded", "Answers in the results store", recorder.recorded),
                CounterMetricFamily("hrm_results_dropped", "Answers that were not recorded", recorder.dropped),
            ]
        return counts

"""What is counted, and how Prometheus is told. What happens is counted here; how things stand is asked of the pond when
somebody wants to know.

Label values are bounded: routes are those that the server knows, queues those that were used, up to a limit; what a
client makes up becomes no label.
"""

from __future__ import annotations

import asyncio
import logging
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from millpond.errors import LeaseLost, MillpondError
from millpond.pond import Pond
from millpond.server.families import BUCKETS, FAMILIES, QUEUE, Family
from millpond.server.observing import Done
from millpond.stores.base import Counts, QueueName

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Metrics(Protocol):
    """Counts."""

    timed: bool
    """Whether `request` wants to know how long a request took."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request to a known route is over."""


class NoMetrics:
    """Counts nothing."""

    timed = False

    def request(self, route: str, status: int, seconds: float) -> None:
        return None


OTHER = QueueName("", "(other)")
"""Where queues beyond the limit are counted together."""
OTHER_ROUTE = "(other)"

_STORE_FIGURES = {
    "commits": "millpond_store_commits_total",
    "ops": "millpond_store_operations_total",
    "commit_seconds": "millpond_store_commit_seconds_total",
    "largest_commit": "millpond_store_largest_commit_operations",
    "lock_wait_seconds": "millpond_store_lock_wait_seconds_total",
    "busy_errors": "millpond_store_busy_errors_total",
    "waiting_ops": "millpond_store_waiting_operations",
    "wal_bytes": "millpond_store_wal_bytes",
}
_OPERATIONS = {
    "enqueue": "millpond_messages_enqueued_total",
    "receive": "millpond_messages_delivered_total",
    "ack": "millpond_messages_acked_total",
    "nack": "millpond_messages_nacked_total",
    "defer": "millpond_messages_deferred_total",
    "extend": "millpond_leases_extended_total",
    "bury": "millpond_messages_buried_total",
}

Samples = Mapping[tuple[str, ...], float]


class _Histogram:
    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0


class _Events(logging.Handler):
    """Counts what the library warns of."""

    def __init__(self, metrics: ServerMetrics) -> None:
        super().__init__(logging.WARNING)
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        # Only names that are in the source: what uvicorn and others log is text with values in it.
        if record.msg.__class__ is str and record.msg.startswith("millpond.") and not record.args:
            self._metrics.events[(record.msg,)] += 1
            if record.msg == "millpond.message.dead_lettered":
                fields = vars(record)
                self._metrics.add(
                    "millpond_messages_dead_total", fields.get("namespace", ""), fields.get("queue", ""), 1
                )


class ServerMetrics:
    """The figures of a server."""

    timed = True

    def __init__(self, pond: Pond, *, queues: int = 1000, version: str = "") -> None:
        """``queues``: most queues with figures of their own."""
        self._pond = pond
        self._most = queues
        self._version = version
        self.routes: frozenset[str] = frozenset()
        """Those that may be labels."""
        self.gauges: dict[str, Callable[[], float]] = {}
        """Metrics without labels that are asked for when they are wanted."""
        self.more: dict[str, Callable[[], Samples]] = {}
        """The same with labels."""
        self.events: Counter[tuple[str, ...]] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._durations: dict[str, _Histogram] = {}
        self._queues: dict[str, Counter[tuple[str, str]]] = {
            family.name: Counter() for family in FAMILIES if family.labels == QUEUE and family.kind == "counter"
        }
        self._known: set[tuple[str, str]] = set()
        self._handler: _Events | None = None

    # Counting

    def start(self) -> None:
        """Count the library's warnings, too."""
        self._handler = _Events(self)
        logging.getLogger("millpond").addHandler(self._handler)

    def stop(self) -> None:
        """No more of them."""
        if self._handler is not None:
            logging.getLogger("millpond").removeHandler(self._handler)
            self._handler = None

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        if route not in self.routes:
            route = OTHER_ROUTE
        self._requests[route, status] += 1
        histogram = self._durations.get(route)
        if histogram is None:
            histogram = self._durations[route] = _Histogram()
        histogram.counts[bisect_left(BUCKETS, seconds)] += 1
        histogram.sum += seconds

    def add(self, name: str, namespace: str, queue: str, count: int) -> None:
        """So many more of a metric by queue."""
        if count:
            self._queues[name][self._label(namespace, queue)] += count

    def _label(self, namespace: str, queue: str) -> tuple[str, str]:
        key = (namespace, queue)
        if key not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(key)
        return key

    def began(self) -> None:
        """As `Observer`."""

    def ended(self, began: None, done: Done) -> None:
        """As `Observer`."""
        if done.number:
            self.add(_OPERATIONS[done.name], done.namespace, done.queue, done.number)
        if done.duplicates:
            self.add("millpond_messages_duplicate_total", done.namespace, done.queue, done.duplicates)
        if done.again:
            self.add("millpond_messages_redelivered_total", done.namespace, done.queue, done.again)
        if done.errors:
            lost = sum(isinstance(error, LeaseLost) for error in done.errors)
            self.add("millpond_leases_lost_total", done.namespace, done.queue, lost)

    # Telling

    async def expose(self, accept: str | None = None) -> tuple[bytes, str]:
        """All figures as text, and its content type: OpenMetrics where that is accepted. What the store cannot tell
        now is left out."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder

        queues: list[tuple[QueueName, Counts]] = []
        total: int | None = None
        # Where looking costs money nobody is to pay for each scrape.
        if not self._pond.store.capabilities.requests_cost_money:
            try:
                found = await self._pond.queues()
                total = len(found)
                for name in found[: self._most]:
                    queues.append((name, await self._pond.service.counts(*name)))
            except MillpondError:
                # It is in the log and in the counts of /readyz and of requests; the other figures are wanted now.
                total = None
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(_Snapshot(list(self._families(queues, total))))
        encoder, kind = choose_encoder(accept or "")
        # Nothing in it changes any more, and a thousand queues make text for a tenth of a second.
        return await asyncio.to_thread(encoder, registry), kind

    def _families(self, queues: Iterable[tuple[QueueName, Counts]], total: int | None) -> Iterator[Metric]:
        now = self._pond.clock.now_ms()
        store = self._pond.store
        build = (self._version, platform.python_version(), store.capabilities.name)
        messages: dict[tuple[str, ...], float] = {}
        sizes: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        for name, counts in queues:
            for state in ("ready", "delayed", "leased", "blocked", "dead"):
                messages[*name, state] = getattr(counts, state)
            sizes[name] = counts.bytes
            ages[name] = 0.0 if counts.oldest_due is None else max(0, now - counts.oldest_due) / 1000
        requests = self._pond.requests().total
        figures = store.statistics()
        samples: dict[str, Mapping[Any, float]] = {
            "millpond_build_info": {build: 1},
            "millpond_queue_messages": messages,
            "millpond_queue_bytes": sizes,
            "millpond_queue_oldest_ready_age_seconds": ages,
            "millpond_queues": {} if total is None else {(): total},
            "millpond_http_requests_total": {
                (route, str(status)): count for (route, status), count in self._requests.items()
            },
            "millpond_log_events_total": self.events,
            "millpond_store_requests_total": {
                (kind,): count for kind, count in _asdict(requests).items() if not kind.startswith("bytes_") and count
            },
            **self._queues,
            **{metric: {(): figures[figure]} for figure, metric in _STORE_FIGURES.items() if figure in figures},
            **{name: {(): read()} for name, read in self.gauges.items()},
            **{name: read() for name, read in self.more.items()},
        }
        for family in FAMILIES:
            if family.kind == "histogram":
                yield self._durations_family(family)
            elif found := samples.get(family.name):
                yield _family(family, found)

    def _durations_family(self, family: Family) -> Metric:
        from prometheus_client.core import HistogramMetricFamily

        made = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for route, histogram in self._durations.items():
            rising, so_far = [], 0
            for bound, count in zip([*map(str, BUCKETS), "+Inf"], histogram.counts, strict=True):
                so_far += count
                rising.append((bound, so_far))
            made.add_metric([route], rising, histogram.sum)
        return made


def _asdict(struct: Any) -> dict[str, Any]:
    import msgspec

    return msgspec.structs.asdict(struct)


def _family(family: Family, samples: Mapping[Any, float]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    made: CounterMetricFamily | GaugeMetricFamily
    if family.kind == "counter":
        made = CounterMetricFamily(family.name, family.help, labels=family.labels)
    else:
        made = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in samples.items():
        made.add_metric(labels, value)
    return made


class _Snapshot:
    """A collector that has been told everything already: asking the store takes an event loop."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)

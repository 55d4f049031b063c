"""The metrics that a server tells Prometheus, by name. docs/reference/metrics.md is made from this table."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One metric."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    labels: tuple[str, ...]
    help: str


QUEUE = ("namespace", "queue")
FAMILIES: tuple[Family, ...] = (
    Family("millpond_build_info", "gauge", ("version", "python", "store"), "1; what is running."),
    Family(
        "millpond_queue_messages",
        "gauge",
        (*QUEUE, "state"),
        "Messages in a queue: ready, delayed, leased, blocked, dead.",
    ),
    Family("millpond_queue_bytes", "gauge", QUEUE, "Bytes of payload in a queue, without its dead letters."),
    Family(
        "millpond_queue_oldest_ready_age_seconds",
        "gauge",
        QUEUE,
        "How long the longest-waiting ready message has been ready; 0 when none is.",
    ),
    Family("millpond_queues", "gauge", (), "Queues in the store."),
    Family("millpond_messages_enqueued_total", "counter", QUEUE, "Messages put in."),
    Family("millpond_messages_duplicate_total", "counter", QUEUE, "Enqueues answered with a message that was there."),
    Family("millpond_messages_delivered_total", "counter", QUEUE, "Messages handed out, each time."),
    Family("millpond_messages_redelivered_total", "counter", QUEUE, "Of these, those that had been handed out before."),
    Family("millpond_messages_acked_total", "counter", QUEUE, "Messages done."),
    Family("millpond_messages_nacked_total", "counter", QUEUE, "Messages given back as failed."),
    Family("millpond_messages_deferred_total", "counter", QUEUE, "Messages given back without a failure."),
    Family("millpond_messages_buried_total", "counter", QUEUE, "Messages that a consumer gave up."),
    Family("millpond_messages_dead_total", "counter", QUEUE, "Messages that became dead letters, for whatever reason."),
    Family("millpond_leases_extended_total", "counter", QUEUE, "Leases made longer."),
    Family(
        "millpond_leases_lost_total",
        "counter",
        QUEUE,
        "Answers that came when the lease was somebody else's, or nobody's.",
    ),
    Family(
        "millpond_producers_held_back", "gauge", (), "1 while the store has too much to do and producers are slowed."
    ),
    Family(
        "millpond_load_ratio",
        "gauge",
        ("sign",),
        "By backlog (operations that wait for a commit), lateness of the event loop, and stall (no commit): the part "
        "of that at which producers are slowed.",
    ),
    Family("millpond_producers_waiting", "gauge", (), "Producers that are being slowed now."),
    Family("millpond_producers_slowed_total", "counter", (), "Producers that had to wait for the load to go."),
    Family("millpond_producers_slowed_seconds_total", "counter", (), "For how long they waited, together."),
    Family(
        "millpond_producers_refused_total",
        "counter",
        ("reason",),
        "Producers that were answered 429: they had waited in vain, or too many were waiting (crowded).",
    ),
    Family("millpond_consumers_waiting", "gauge", (), "Consumers that wait for messages."),
    Family(
        "millpond_http_requests_total",
        "counter",
        ("route", "status"),
        "Requests, by route and status; 499: the client had gone.",
    ),
    Family(
        "millpond_http_request_duration_seconds",
        "histogram",
        ("route",),
        "From the head of a request to the end of its answer, waiting for messages included.",
    ),
    Family("millpond_http_connections", "gauge", (), "Open connections."),
    Family(
        "millpond_http_connections_ended_total",
        "counter",
        ("reason",),
        "Connections that were refused or ended by the server.",
    ),
    Family("millpond_auth_refused_total", "counter", (), "Requests from somebody unknown."),
    Family("millpond_auth_forbidden_total", "counter", (), "Requests for what their sender may not do."),
    Family("millpond_draining", "gauge", (), "1 while the server is about to stop."),
    Family("millpond_reloads_total", "counter", ("outcome",), "Files of tokens and certificates that were read again."),
    Family("millpond_log_events_total", "counter", ("event",), "Warnings and errors in the log, by event."),
    Family("millpond_store_commits_total", "counter", (), "Commits of the store."),
    Family("millpond_store_operations_total", "counter", (), "Operations in them; by commits, the mean size of one."),
    Family("millpond_store_commit_seconds_total", "counter", (), "Time spent in commits (SQLite)."),
    Family(
        "millpond_store_largest_commit_operations", "gauge", (), "Operations of the largest commit so far (SQLite)."
    ),
    Family("millpond_store_lock_wait_seconds_total", "counter", (), "Time spent waiting for other processes (SQLite)."),
    Family(
        "millpond_store_busy_errors_total",
        "counter",
        (),
        "Calls that failed because another process held the store (SQLite).",
    ),
    Family("millpond_store_waiting_operations", "gauge", (), "Operations that wait for a commit (SQLite)."),
    Family("millpond_store_wal_bytes", "gauge", (), "Size of the write-ahead log (SQLite)."),
    Family("millpond_store_requests_total", "counter", ("kind",), "Requests to a store that charges for them."),
)

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds. An answer from memory takes half a millisecond, a commit some, a waiting receive up to its wait."""

"""What requests cost, for ``stats --cost`` and ``work --cost``: what was measured, and what is only computed.

A store that charges nothing has no cost; one whose prices are unknown has counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from millpond.stores.objects import prices as price_list

if TYPE_CHECKING:
    from millpond.pond import Pond
    from millpond.requests import PondRequests
    from millpond.stores.objects.prices import Prices

KINDS = ("creates", "replaces", "reads", "deletes", "lists", "parts")
NOTHING_TO_PAY = "requests to this store cost nothing"


def prices(pond: Pond) -> dict[str, Any] | None:
    """The price list that applies; None where there is none."""
    found = _prices(pond)
    if found is None:
        return None
    return {
        "cloud": found.cloud,
        "what": found.what,
        "as_of": price_list.AS_OF,
        "source": found.source,
        "usd_per_million_requests": {
            "put": found.put,
            "list": found.list,
            "get": found.get,
            "delete": found.delete,
        },
    }


def _prices(pond: Pond) -> Prices | None:
    return price_list.prices_of(pond.capabilities.name)


def measured(pond: Pond, requests: PondRequests) -> dict[str, Any] | None:
    """What this process asked for, and what that costs; None where requests cost nothing."""
    if not pond.capabilities.requests_cost_money:
        return None
    total, acked, found = requests.total, requests.acknowledged, _prices(pond)
    return {
        "requests": {kind: getattr(total, kind) for kind in KINDS},
        "bytes_sent": total.bytes_sent,
        "bytes_received": total.bytes_received,
        "acknowledged": acked,
        "requests_per_message": requests.per_message,
        "usd": None if found is None else price_list.cost(total, found),
        "usd_per_million_messages": None if found is None else price_list.cost_per_million(total, acked, found),
    }


def computed(pond: Pond) -> dict[str, Any] | None:
    """What plain life cycles and waiting cost by design; None where prices are unknown."""
    found = _prices(pond)
    if found is None:
        return None
    result: dict[str, Any] = {}
    for name, other in (("consumed_where_enqueued", False), ("consumed_elsewhere", True)):
        million = price_list.life_cycle(other_process=other, per_listing=pond.config.thrifty_page_size)
        result[name] = {
            "requests_per_message": million.total / price_list.MILLION,
            "usd_per_million_messages": price_list.cost(million, found),
        }
    polls = 3600 / max(pond.config.poll_interval, pond.config.poll_max_interval)
    result["waiting"] = {
        "requests_per_hour": polls,
        "usd_per_month": price_list.idle_month(found, polls_an_hour=polls),
    }
    return result


def measured_lines(report: dict[str, Any], listed: dict[str, Any] | None) -> Iterator[str]:
    """`measured`, in words."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report["requests"].items() if count) or "no requests"
    per_message = report["requests_per_message"]
    ratio = "" if per_message is None else f"; {per_message:.2f} for each message acked ({report['acknowledged']:,})"
    yield f"measured: {counts}{ratio}"
    if listed is None:
        yield "there is no price list for this store"
        return
    million = report["usd_per_million_messages"]
    each = "" if million is None else f"; {_dollars(million)} for a million messages"
    yield f"measured: {_dollars(report['usd'])}{each}, {_by(listed)}"


def computed_lines(report: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    """`computed`, in words."""
    for name, text in (
        ("consumed_where_enqueued", "consumed by the process that enqueued it"),
        ("consumed_elsewhere", "consumed by another process"),
    ):
        one = report[name]
        yield (
            f"computed: {one['requests_per_message']:.2f} requests a message that is {text}, "
            f"{_dollars(one['usd_per_million_messages'])} for a million"
        )
    waiting = report["waiting"]
    yield (
        f"computed: about {waiting['requests_per_hour']:.0f} requests an hour for each process that waits on an empty "
        f"queue, {_dollars(waiting['usd_per_month'])} a month"
    )
    yield (
        f"computed for small payloads that are acked at their first delivery, without dedup or ordering key, "
        f"{_by(listed)}; check them: {listed['source']}"
    )


def _by(listed: dict[str, Any]) -> str:
    return f"by list prices of {listed['what']}, as of {listed['as_of']}"


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 1 or amount == 0 else f"${amount:.2g}"

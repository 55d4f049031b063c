"""What requests cost: list prices of the clouds, and sums. Nobody is asked for them; check before you rely on them.

Storage and traffic cost as well, and are not in it: a queue keeps little for long, and traffic within a cloud's region
is free. Requests are what a queue in a bucket costs.
"""

from __future__ import annotations

import msgspec

from millpond.stores.base import Requests

AS_OF = "2025-06"
"""The month as of which these prices are known. They have been the same for years, and may change on any day."""
MILLION = 1_000_000
HOURS_A_MONTH = 730


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Dollars per million requests of each kind."""

    cloud: str
    """As in the URL of a store: ``s3``, ``gs``, ``az``."""
    what: str
    put: float
    """Creating, replacing and uploading objects, and each part of a large one."""
    list: float
    get: float
    delete: float
    source: str
    """Where the cloud publishes them."""


# Published per 1,000 (Amazon, Google) or 10,000 (Azure) requests: Amazon's price page for us-east-1, Google's classes A
# (write, list) and B (read) of operations in its examples of bills, Azure's table in its guide to estimating costs.
# These are cheap regions. Others cost up to about twice as much; so do writing and listing in Google's multi-regions.
PRICES = {
    "s3": Prices(
        cloud="s3",
        what="Amazon S3 Standard, us-east-1",
        put=5.0,
        list=5.0,
        get=0.4,
        delete=0.0,
        source="https://aws.amazon.com/s3/pricing/",
    ),
    "gs": Prices(
        cloud="gs",
        what="Google Cloud Storage Standard, one region",
        put=5.0,
        list=5.0,
        get=0.4,
        delete=0.0,
        source="https://cloud.google.com/storage/pricing",
    ),
    "az": Prices(
        cloud="az",
        what="Azure Blob hot tier, LRS, East US",
        put=5.5,
        list=5.5,
        get=0.44,
        delete=0.0,
        source="https://azure.microsoft.com/pricing/details/storage/blobs/",
    ),
}


def prices_of(name: str) -> Prices | None:
    """The list prices for a store of this name (`Capabilities.name`); None where there are none."""
    return PRICES.get(name)


def cost(requests: Requests, prices: Prices) -> float:
    """Dollars for these requests."""
    puts = requests.creates + requests.replaces + requests.parts
    return (
        puts * prices.put
        + requests.lists * prices.list
        + requests.reads * prices.get
        + requests.deletes * prices.delete
    ) / MILLION


def cost_per_million(requests: Requests, messages: int, prices: Prices) -> float | None:
    """Dollars for a million life cycles, when these requests were those of ``messages`` of them; None when of none."""
    return cost(requests, prices) / messages * MILLION if messages else None


SAME_PROCESS = Requests(creates=1, replaces=1, deletes=1)
"""A life cycle by design, where the process that enqueues also consumes: create, lease, remove."""
OTHER_PROCESS = Requests(creates=1, replaces=1, reads=1, deletes=1)
"""As `SAME_PROCESS`, where another process consumes: it has to read the message first."""


def life_cycle(*, other_process: bool, per_listing: int) -> Requests:
    """What `MILLION` plain life cycles need by design. ``per_listing``: messages that a consumer finds by one listing.

    Plain: a small payload, no dedup key, no id of the caller's, no ordering key, acked at the first delivery."""
    one = OTHER_PROCESS if other_process else SAME_PROCESS
    counts = {name: getattr(one, name) * MILLION for name in Requests.__struct_fields__}
    return Requests(**(counts | {"lists": MILLION // per_listing}))


def idle_month(prices: Prices, *, polls_an_hour: float) -> float:
    """Dollars a month for one process that waits on one empty queue."""
    return polls_an_hour * HOURS_A_MONTH * prices.list / MILLION

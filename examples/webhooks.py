"""Web hook delivery: signed, retried, limited, and given up where no retry helps.

    millpond worker webhooks --app-dir examples                  delivers
    python examples/webhooks.py URL '{"event": "paid"}'          sends one, and waits for what became of it

The receiver checks ``X-Hook-Signature`` with the secret that both know (``WEBHOOK_SECRET``), and by ``X-Hook-Id``
recognises a hook that it has had already: a delivery whose answer was lost is made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import millpond

SECRET = os.environ.get("WEBHOOK_SECRET", "change me").encode()
AGAIN = {408, 425, 500, 502, 503, 504}
"""Answers that may be others later. Every other error is the receiver's last word."""

pond = millpond.connect(os.environ.get("MILLPOND_STORE", "sqlite:///webhooks.db"))


@pond.task(
    keep_result=3600,
    max_attempts=8,
    time_limit=30,
    retry=millpond.RetryPolicy(base=5, factor=4, longest=6 * 3600),
    gate=pond.limit("webhooks", concurrency=20, rate=100, per=1),
)
def deliver(url: str, event: dict[str, Any]) -> int:
    """Post an event to a URL; the status of the answer."""
    if not url.startswith(("https://", "http://")):
        raise millpond.GiveUp(f"{url} is no web address")
    body = json.dumps(event).encode()
    request = urllib.request.Request(
        url,
        body,
        {
            "Content-Type": "application/json",
            "X-Hook-Id": millpond.current_task().id,
            "X-Hook-Signature": "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest(),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 429:
            raise millpond.Retry(after=wait(error.headers.get("Retry-After"))) from error
        if error.code in AGAIN:
            raise
        raise millpond.GiveUp(f"{url} answered {error.code}") from error


def wait(said: str | None) -> float:
    """Seconds that a Retry-After asks for, by a number or a date (RFC 9110): a day at most, a minute if by neither."""
    try:
        seconds = float(said or 60)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(str(said)) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date; or one without a time zone
            seconds = 60.0
    return max(0.0, min(seconds, 86_400.0)) if math.isfinite(seconds) else 60.0


async def main(url: str, event: str) -> int:
    async with pond:
        hook = await deliver.send(url, json.loads(event))
        try:
            print(hook.id, "delivered, status", await hook.result())
        except millpond.TaskFailed as error:
            print(hook.id, "given up:", error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))

"""The workers of the chaos test, for `millpond worker`. The environment says where: CHAOS_URL, CHAOS_FOLDER."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import Any

from tests.e2e.chaos.journal import Journal

import millpond

URL = os.environ["CHAOS_URL"]
journal = Journal(os.environ["CHAOS_FOLDER"], "worker")
pond = millpond.connect(URL, timeout=3.0) if URL.startswith("http") else millpond.connect(URL)
chance = random.Random()


def _who(context: millpond.Context) -> dict[str, Any]:
    message = context.message
    return {"id": message.id, "token": message._delivery.token, "queue": message.queue}


class Books(millpond.Middleware):
    """Writes down what becomes of each message."""

    async def before(self, context: millpond.Context) -> None:
        journal.note("got", lease=context.message._delivery.lease_id, **_who(context))

    async def after(self, context: millpond.Context, result: Any) -> None:
        journal.note("ack", **_who(context), **context.values)

    async def error(self, context: millpond.Context, error: BaseException | None, outcome: Any) -> None:
        journal.note(f"worker:{outcome.kind}", **_who(context))

    async def settled(self, context: millpond.Context, kind: str) -> None:
        if kind == "ack":
            journal.note("ack:done", **_who(context), **context.values)
        elif kind == "lost":
            journal.note("ack:doubt", error="the worker lost the lease", **_who(context), **context.values)


@pond.consumer("work", concurrency=8, visibility=1.5, middleware=[Books()], retry=millpond.RetryPolicy(base=0.1))
async def work(payload: bytes, context: millpond.Context) -> None:
    body = json.loads(payload)
    journal.note("read", n=body["n"], kind=body["kind"], whole=0, **_who(context))
    context.values["n"] = body["n"]
    draw = chance.random()
    await asyncio.sleep(chance.uniform(0.0, 0.05) if draw < 0.9 else chance.uniform(0.0, 3.0))
    if draw > 0.97:
        raise millpond.Defer()
    if draw > 0.93:
        raise RuntimeError("chaos")
    if draw < 0.3:
        then = f"{body['n']}+{context.message._delivery.token}"
        context.values["then"] = then
        context.hand_off("next", json.dumps({"n": then, "kind": "next"}).encode(), max_attempts=0)

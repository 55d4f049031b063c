"""A process of the chaos test: producers and consumers on one pond, until it is killed.

python -m tests.e2e.chaos.client URL FOLDER SEED PACE

``PACE``: seconds between the steps of each of its tasks, about.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
from typing import Any

from tests.e2e.chaos.journal import CERTAIN, Journal

import millpond
from millpond.errors import MillpondError

LEASE = 1.5
"""Seconds."""
KINDS = ("plain", "keyed", "ordered", "chain", "state", "work", "ttl", "failing", "large")
LARGE = 100_000
"""Bytes of a payload that travels, and is stored, apart."""


class Player:
    """Producers and consumers of one process."""

    def __init__(self, pond: millpond.Pond, journal: Journal, chance: random.Random, pace: float) -> None:
        self.pond = pond
        self.journal = journal
        self.chance = chance
        self.pace = pace
        self.numbers = itertools.count()
        self.name = f"{os.getpid()}.{chance.randrange(1 << 40):x}"

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.uniform(0.0, 2 * self.pace))

    # Producing

    async def produce(self, kind: str) -> None:
        queue = self.pond.queue(kind)
        for number in itertools.count():
            name = f"{kind}:{self.name}:{next(self.numbers)}"
            body: dict[str, Any] = {"n": name, "kind": kind}
            options: dict[str, Any] = {"max_attempts": 0, "priority": self.chance.randrange(10)}
            if kind != "plain":
                options["dedup_key"] = name
                options["dedup_window"] = 3600.0
            if kind == "ordered":
                # One key is one task's, so that it knows the order.
                body |= {"key": self.name, "place": number}
                options |= {"ordering_key": self.name, "priority": self.chance.randrange(10)}
            if kind == "ttl":
                options["ttl"] = 1.0
            if kind == "failing":
                options["max_attempts"] = 3
            if kind == "large":
                body["filling"] = "x" * LARGE
            if self.chance.random() < 0.1:
                options["delay"] = self.chance.uniform(0.0, 0.5)
            await self.enqueue(queue, body, options)
            await self.pause()

    async def enqueue(self, queue: millpond.Queue, body: dict[str, Any], options: dict[str, Any]) -> None:
        name, note = body["n"], self.journal.note
        payload = json.dumps(body).encode()
        facts = {name: body[name] for name in ("kind", "key", "place") if name in body}
        note("enqueue", n=name, **facts)
        doubt = False
        while True:
            try:
                receipt = await queue.enqueue(payload, **options)
            except MillpondError as error:
                doubt |= not isinstance(error, CERTAIN)
                note("enqueue:failed", n=name, certain=not doubt, error=f"{type(error).__name__}: {error}")
                if "dedup_key" not in options:
                    return  # a repetition would be another message
                await asyncio.sleep(0.05)
            else:
                note("enqueue:done", n=name, id=receipt.message_id, duplicate=receipt.duplicate)
                return

    # Consuming

    async def consume(self, kind: str) -> None:
        queue = self.pond.queue(kind)
        while True:
            count = self.chance.choice((1, 1, 3, 8))
            try:
                messages = await queue.receive(
                    count, wait=self.chance.choice((0.0, 0.3, 1.0)), visibility=LEASE, owner=self.name
                )
            except MillpondError as error:
                self.journal.note("receive:failed", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.05)
                continue
            for message in messages:
                self.journal.note("got", id=message.id, token=message.lease.token, lease=message.lease.id, queue=kind)
            await asyncio.gather(*(self.handle(message) for message in messages))
            await self.pause()

    async def handle(self, message: millpond.Message) -> None:
        journal, chance = self.journal, self.chance
        who: dict[str, Any] = {"id": message.id, "token": message.lease.token, "queue": message.queue}
        try:
            body = json.loads(await message.read())
        except MillpondError as error:
            journal.note("unread", error=f"{type(error).__name__}: {error}", **who)
            return
        journal.note("read", n=body["n"], kind=body["kind"], whole=len(body.get("filling", "")), **who)
        who["n"] = body["n"]
        if body["kind"] == "state":
            await self.step(message, who)
        draw = chance.random()
        if body["kind"] == "failing":
            draw = 0.82 + draw / 5
        if draw < 0.03:
            return  # it forgets about it
        if draw < 0.08:
            await asyncio.sleep(LEASE * chance.uniform(0.8, 1.5))  # it is slow
        elif draw < 0.18:
            with journal.answer("extend", **who):
                await message.extend(chance.choice((0.2, LEASE, 2 * LEASE)))
            await asyncio.sleep(chance.uniform(0.0, 0.3))
        if draw > 0.85:
            if chance.random() < 0.6:
                with journal.answer("nack", **who):
                    await message.nack(error="chaos", delay=chance.choice((0.0, 0.2)))
            elif chance.random() < 0.8:
                with journal.answer("defer", **who):
                    await message.defer(delay=chance.choice((0.0, 0.2)))
            else:
                with journal.answer("bury", **who):
                    await message.bury("chaos")
            return
        for _ in range(3):  # an answer in doubt may be given again
            done = await self.ack(message, who, hand_off=body["kind"] == "chain")
            if done:
                return

    async def ack(self, message: millpond.Message, who: dict[str, Any], *, hand_off: bool) -> bool:
        journal = self.journal
        if hand_off:
            then = {"n": f"{who['n']}+{who['token']}", "kind": "next"}
            with journal.answer("ack", then=then["n"], **who):
                await message.ack(then=[("next", json.dumps(then).encode(), {"max_attempts": 0})])
            return True  # another try would have another successor
        errors: list[MillpondError] = []
        with journal.answer("ack", **who):
            try:
                await message.ack()
            except MillpondError as error:
                errors.append(error)
                raise
        return not errors or isinstance(errors[0], millpond.LeaseLost)

    async def step(self, message: millpond.Message, who: dict[str, Any]) -> None:
        journal = self.journal
        for step in range(self.chance.choice((1, 2, 4))):
            if not step:
                journal.note("state:load", **who)
                try:
                    value = await message.state.load()
                except MillpondError as error:
                    journal.note("state:unread", error=f"{type(error).__name__}: {error}", **who)
                    return
                journal.note("state:loaded", value=value, **who)
            value = [who["token"], step]
            with journal.answer("state:save", value=value, **who):
                await message.state.save(value)


async def main(url: str, folder: str, seed: str, pace: str) -> None:
    chance = random.Random(int(seed))
    journal = Journal(folder, "client")
    options: dict[str, Any] = {"timeout": 3.0} if url.startswith("http") else {}
    while True:
        pond = millpond.connect(url, **options)
        try:
            await pond.open()
            break
        except MillpondError as error:
            journal.note("open:failed", error=f"{type(error).__name__}: {error}")
            await pond.close()
            await asyncio.sleep(0.1)
    async with pond:
        player = Player(pond, journal, chance, float(pace))
        async with asyncio.TaskGroup() as group:
            for kind in KINDS:
                group.create_task(player.produce(kind))
            for kind in ("next", *(kind for kind in KINDS if kind != "work")):
                group.create_task(player.consume(kind))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

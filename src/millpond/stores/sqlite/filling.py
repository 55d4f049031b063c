"""Calls put into a transaction: each on its own, as many as it is to have."""

from __future__ import annotations

from collections import deque

import apsw

from millpond.errors import StoreFull
from millpond.stores.sqlite.calls import Batch, Call, blame, own
from millpond.stores.sqlite.failures import translate
from millpond.stores.sqlite.room import Room
from millpond.stores.sqlite.together import Singly, Together

MAX_BYTES = 16 * 1024 * 1024
"""Payload bytes after which a transaction takes no further call: about one WAL's worth."""


def fill(applier: Together, room: Room, path: str, source: deque[Call], limit: int) -> Batch:
    """Apply calls from ``source`` to the open transaction, until it has ``limit`` ops.

    A call that raises is left out: the transaction is rolled back, and the others are applied again without it. One
    whose ops cannot be written together is applied again singly.
    When the disk is full, those that need no more of it get another chance: acks make room.
    """
    batch = Batch()
    failed: list[Call] = []
    again: deque[Call] = deque()
    while True:
        calls: list[Call] = []
        ops = 0
        current: Call | None = None
        applier.begin()
        try:
            while again or (source and ops < limit and applier.volume < MAX_BYTES):
                current = again.popleft() if again else source.popleft()
                if current.future.done():
                    continue
                if room.refusal is not None and current.grows:
                    current.error = StoreFull(str(room.refusal))
                    failed.append(current)
                    continue
                current.outcomes = current.apply(current.request)
                calls.append(current)
                ops += current.size
            current = None
            batch.wrote = applier.finish()
            break
        except Exception as error:
            applier.roll_back()
            if current is not None:
                calls.append(current)
            calls += again
            if current is not None and current.singly is not None and isinstance(error, Singly):
                blamed = []
                current.apply, current.singly = current.singly, None
            else:
                blamed = blame(error, current, calls)
            for call in blamed:
                call.error = own(error, path)
            failed += blamed
            again = deque(call for call in calls if call.error is None)
            calls = []
            try:
                applier.execute("BEGIN IMMEDIATE")
            except apsw.Error as failure:
                for call in again:
                    call.error = translate(failure, path)
                failed += again
                break
    batch.calls = calls + failed
    batch.ops = ops
    batch.changed, batch.doomed, batch.tight = applier.changed, applier.doomed, room.tight
    return batch

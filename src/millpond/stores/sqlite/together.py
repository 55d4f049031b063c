"""Many plain ops of one call at once: fewer statements than rows.

A statement costs SQLite about as much again as its row (cursors, a savepoint of its own, the cache of statements). So
what comes in one call and is plain (no group, no blob, no unique key) is written by statements of `RUN` rows each. That
is a bet: that each op meets what it expects. Where one does not, such a statement cannot say which; then the whole call
is applied again op by op (`Singly`), in a transaction that begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import apsw

from millpond.stores.base import Box, Insert, Inserted, Mark, Op, Outcome, Remove, Removed, Update, Updated
from millpond.stores.sqlite.apply import (
    INSERT_PLAIN,
    KIND_BITS,
    REMOVE,
    REMOVED,
    UPDATE,
    Applier,
    Take,
    count_removed,
)
from millpond.stores.sqlite.schema import BUCKET, BYTES, FREE, INSERTED, LEASED

TOGETHER = 8
"""Ops of one call from which they are written together."""
RUN = 20
"""Rows of one statement where there are many: 1.1 µs a row instead of 1.7 to insert, 1.5 instead of 2.0 to remove."""
_INSERT_RUN = (
    "INSERT OR FAIL INTO message(seq,queue,lane,due,version,leased,box,expires,grp,size,external,stateful,id,priority,"
    "place,status)VALUES" + ",".join(["(?,?,?,?,1,0,0,NULL,NULL,?,0,0,?,?,NULL,?)"] * RUN)
)
"""FAIL: it is rolled back with its transaction, so SQLite need not keep what it needs to undo the statement alone."""
_REMOVE_RUN = f"DELETE FROM message WHERE version=? AND stateful=0 AND seq IN({','.join('?' * RUN)})"


class Singly(Exception):
    """Of ops that were written together not all met what they expected. The transaction has to be rolled back; what
    was asked for can be applied op by op (`write_singly`, `take_singly`)."""


class Together(Applier):
    """An `Applier` that writes plain ops of one call together."""

    def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """As `Applier.write`; raises `Singly`."""
        if len(ops) >= TOGETHER:
            kind = ops[0].__class__
            outcomes: list[Outcome] | None = None
            if kind is Insert:
                outcomes = self._insert_many(cast("Sequence[Insert]", ops))
            elif kind is Remove:
                outcomes = self._remove_many(cast("Sequence[Remove]", ops))
            if outcomes is not None:
                return outcomes
        return self.write_singly(ops)

    def write_singly(self, ops: Sequence[Op]) -> list[Outcome]:
        """`Applier.write`: one after another."""
        return super().write(ops)

    def take(self, take: Take) -> list[tuple[Any, Updated | Removed]]:
        """As `Applier.take`; raises `Singly`."""
        if take.limit < TOGETHER:
            return self.take_singly(take)
        updates: list[Update] = []
        taken = self._take(take, updates)
        if updates:
            self._update_many((take.namespace, take.queue), updates)
        return taken

    def take_singly(self, take: Take) -> list[tuple[Any, Updated | Removed]]:
        """`Applier.take`: one after another."""
        return super().take(take)

    def _insert_many(self, ops: Sequence[Insert]) -> list[Outcome] | None:
        """As `_insert` of each, if all are plain ones into one queue; None: they are not, and nothing was done."""
        first = ops[0].item
        namespace, name = first.namespace, first.queue
        for op in ops:
            if op.__class__ is not Insert or op.unique is not None or op.expires is not None:
                return None
            item = op.item
            if item.group is not None or item.external or item.queue is not name or item.namespace is not namespace:
                return None
        tally = self._tally
        if name is not self._name or namespace is not self._namespace:
            tally = self._turn(namespace, name)
        queue, counts = tally.queue, tally.counts
        serial = None
        for op in ops:
            if op.serial is not None and op.serial is not serial:
                serial = op.serial
                if self._pass(queue, serial) is not None:
                    raise Singly
        seq = self.number()
        self._sequence = seq + len(ops)
        values: list[Any] = []
        outcomes: list[Outcome] = []
        bodies = self._bodies
        mark = self._new_mark
        due = ops[0].due
        if mark.due != due or mark.expires is not None:
            mark = self._new_mark = Mark("1", due, False, None, Box.LIVE)
        free = (due // BUCKET << KIND_BITS) | FREE
        volume = size = many = 0
        for op in ops:
            item, payload = op.item, op.payload
            if op.due != due:
                due = op.due
                mark = self._new_mark = Mark("1", due, False, None, Box.LIVE)
                counts[free] = counts.get(free, 0) + many
                free, many = (due // BUCKET << KIND_BITS) | FREE, 0
            values += (seq, queue, item.priority, due, item.size, item.id, item.priority, op.status)
            bodies.append((seq, op.head, payload))
            many += 1
            volume += len(payload)
            size += item.size
            outcomes.append(Inserted(item, mark, seq))
            seq += 1
        try:
            width, at = 8 * RUN, 0
            while len(values) - at >= width:
                self._run(_INSERT_RUN, values[at : at + width])
                at += width
            for start in range(at, len(values), 8):
                seq_, queue_, lane, due_, size_, id, _, status = values[start : start + 8]
                self._run(INSERT_PLAIN, (seq_, queue_, lane, due_, size_, id, status))
        except apsw.ConstraintError as error:
            if cast(Any, error).extendedresult != apsw.SQLITE_CONSTRAINT_UNIQUE:
                raise
            raise Singly from error
        counts[free] = counts.get(free, 0) + many
        counts[BYTES] = counts.get(BYTES, 0) + size
        counts[INSERTED] = counts.get(INSERTED, 0) + len(ops)
        self.volume += volume
        tally.changed = True
        return outcomes

    def _update_many(self, key: tuple[str, str], ops: Sequence[Update]) -> None:
        """As `_update` of each: plain ones, live before and after, of one queue."""
        before = self._connection.total_changes()
        self._cursor.executemany(UPDATE, [(op.due, op.leased, op.status, op.item.key, op.mark.etag) for op in ops])
        if self._connection.total_changes() - before != len(ops):
            raise Singly
        tally = self._tallies.get(key) or self._turn(*key)
        counts = tally.counts
        # What is taken together mostly was due, and will be, within one bucket.
        last, moved = (-1, -1), 0
        for op in ops:
            mark, due, leased = op.mark, op.due, op.leased
            step = (
                (mark.due // BUCKET << KIND_BITS) | (LEASED if mark.leased else FREE),
                (due // BUCKET << KIND_BITS) | (LEASED if leased else FREE),
            )
            if step != last:
                _move(counts, last, moved)
                last, moved = step, 0
            moved += 1
            if not leased or due < mark.due:
                tally.changed = True
        _move(counts, last, moved)

    def _remove_many(self, ops: Sequence[Remove]) -> list[Outcome] | None:
        """As `_remove` of each, if all are plain ones; None: they are not, and nothing was done."""
        first = ops[0].item
        namespace, name = first.namespace, first.queue
        keys: list[Any] = []
        rest: list[tuple[int, str]] = []
        etag = ops[0].mark.etag
        for op in ops:
            if op.__class__ is not Remove:
                return None
            item = op.item
            if item.external or item.group is not None or item.queue != name or item.namespace != namespace:
                return None
            if op.mark.etag == etag:
                keys.append(item.key)
            else:
                rest.append((item.key, op.mark.etag))
        before = self._connection.total_changes()
        whole = len(keys) - len(keys) % RUN
        for at in range(0, whole, RUN):
            self._run(_REMOVE_RUN, [etag, *keys[at : at + RUN]])
        rest += [(key, etag) for key in keys[whole:]]
        if rest:
            self._cursor.executemany(REMOVE, rest)
        # Each took its body along, by the trigger.
        removed = (self._connection.total_changes() - before) // 2
        if removed != len(ops):
            return self._remove_rest(ops, removed)
        count_removed(self._tallies.get((namespace, name)) or self._turn(namespace, name), ops)
        return [REMOVED] * len(ops)

    def _remove_rest(self, ops: Sequence[Remove], removed: int) -> list[Outcome]:
        """After ``removed`` of them were removed together: do the others, which have a state or another version."""
        left = [bool(self._run("SELECT EXISTS(SELECT 1 FROM message WHERE seq=?)", (op.item.key,)).get) for op in ops]
        if removed + sum(left) != len(ops):
            raise Singly  # some were gone before, or stand here twice: who knows which
        tally = self._turn(ops[0].item.namespace, ops[0].item.queue)
        outcomes: list[Outcome] = []
        for op, there in zip(ops, left, strict=True):
            if there:
                outcomes.append(self._remove_full(op))
            else:
                count_removed(tally, (op,))
                outcomes.append(REMOVED)
        return outcomes


def _move(counts: dict[int, int], step: tuple[int, int], n: int) -> None:
    """``n`` records went from one kind and bucket to another."""
    if n:
        old, new = step
        counts[old] = counts.get(old, 0) - n
        counts[new] = counts.get(new, 0) + n

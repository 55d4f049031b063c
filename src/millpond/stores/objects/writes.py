"""Writes: each op of the protocol as conditional requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec

from millpond.errors import OutcomeUnknown, StoreCorrupt, StoreError, StoreMismatch
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    DropState,
    Insert,
    Inserted,
    Item,
    Mark,
    Op,
    Outcome,
    PutDocument,
    PutState,
    Remove,
    Removed,
    Reseal,
    StateWritten,
    Unique,
    Update,
    Updated,
)
from millpond.stores.objects import names, records
from millpond.stores.objects.blobs import Blobs
from millpond.stores.objects.deletes import TooLate
from millpond.stores.objects.documents import Documents
from millpond.stores.objects.engine import Engine, log
from millpond.stores.objects.find import Finder
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.index import Known, same
from millpond.stores.objects.markers import Claim, Markers
from millpond.stores.objects.moves import Moved, Moves, NewRecord
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Goal, Held, Intent, Marker, Record, Standing, Tombstone

SLACK = 1000
"""Milliseconds by which a message may be due before its name says so: ids are made a moment before or after the status,
and clocks are set back a little. Listings look so far ahead."""
TRIES = 64
"""Writes that keep losing to others who change the same object, but not the record's version."""
UUID7 = "7"
_MISSING, _STALE = Cause.MISSING, Cause.STALE


class Writer:
    """Applies ops."""

    def __init__(
        self, engine: Engine, markers: Markers, groups: Groups, moves: Moves, finder: Finder, blobs: Blobs
    ) -> None:
        self._engine = engine
        self._markers = markers
        self._groups = groups
        self._moves = moves
        self._finder = finder
        self._blobs = blobs
        self.documents = Documents(engine)

    @staticmethod
    def keys(op: Op) -> list[tuple[str, ...]]:
        """What an op works on, for taking turns."""
        if isinstance(op, PutDocument):
            return [("d", op.namespace, op.queue)]
        item = op.item
        keys: list[tuple[str, ...]] = [("i", item.namespace, item.queue, item.id)]
        if isinstance(op, Insert) and op.unique is not None:
            keys.append(("u", item.namespace, item.queue, op.unique.key))
        return keys

    async def apply(self, op: Op) -> Outcome:
        """Apply one op. Raises StoreError: it was not applied; OutcomeUnknown."""
        async with self._engine.turn(self.keys(op)):
            if isinstance(op, Update):
                return await self._update(op)
            if isinstance(op, Insert):
                return await self._insert(op)
            if isinstance(op, Remove):
                return await self._remove(op)
            if isinstance(op, Reseal):
                return await self._rewrite(op, lambda record: _resealed(op, record))
            if isinstance(op, PutDocument):
                return await self.documents.put(op)
            return await self._rewrite(op, lambda record: _with_state(op, record))

    # Records that are there

    async def _locate(self, item: Item, mark: Mark) -> Known | Conflict:
        """The record that an op is about, if it still is the version that the op expects."""
        engine = self._engine
        wanted = records.parse_etag(mark.etag)
        known = engine.index.by_id(item.namespace, item.queue, item.id)
        if wanted is None:
            there = await self._finder.find(item.namespace, item.queue, item.id)
            return Conflict(_MISSING if there is None else _STALE, item.id)
        if known is not None and known.record.birth == wanted.birth:
            if known.record.version == wanted.version:
                return known
            if known.record.version > wanted.version:
                return Conflict(_STALE, item.id)
        name = names.of_place(item.namespace, item.queue, wanted.place)
        found = None if engine.has_left(name.path) else await engine.fetch(name)
        if found is None or found.held.birth != wanted.birth:
            return Conflict(_MISSING, item.id)
        if found.known is None:
            held = found.held
            moved = isinstance(held, Intent) and any(target.birth == held.birth for target in held.targets)
            return Conflict(_STALE if moved else _MISSING, item.id)
        if found.known.record.version != wanted.version:
            return Conflict(_STALE, item.id)
        return found.known

    async def _update(self, op: Update) -> Outcome:
        engine = self._engine
        for _ in range(TRIES):
            known = await self._locate(op.item, op.mark)
            if isinstance(known, Conflict):
                return known
            self._check_doom(known)
            name, record = known.name, known.record
            takes_lead = op.leased and op.box is Box.LIVE and record.group is not None
            if takes_lead and record.box != Box.LIVE:
                return Conflict(Cause.BLOCKED, record.id)
            if takes_lead and not record.leased and not await self._groups.may_lead(name):
                return Conflict(Cause.BLOCKED, record.id)
            payload = record.payload if op.want_payload else None
            target = self._new_name(known, op)
            if target is not None and target.key != name.key:
                # Who looks for the message of its pending marker looks under the key that the marker tells.
                await self._redeem(known)
                record = known.record
            new = msgspec.structs.replace(
                record,
                write_id=engine.write_id(),
                version=record.version + 1,
                due=op.due,
                leased=op.leased,
                expires=op.expires,
                box=int(op.box),
                status=op.status,
            )
            if target is None:
                free = not record.leased or record.due <= engine.now()
                claims = op.leased and free
                # A claim that others have written over is over, whether it took place or not.
                written = await engine.swap_record(
                    known, new, claimed=op.leased and (known.claimed or free), void=claims
                )
                if isinstance(written, Known):
                    if claims:
                        engine.won_claim(name)
                    return Updated(records.mark(new, name), payload)
                if claims:
                    engine.lost_claim(name, written)
                continue
            new = msgspec.structs.replace(new, via=name.path)
            goals: list[Goal] = []
            if target.key != name.key:
                keys = (*record.keys, name.key.to_bytes(16))[-records.KEYS :]
                new = msgspec.structs.replace(new, keys=keys)
                goals.append(self._pointing(new, target))
            moved = await self._moves.move(known, [NewRecord(target, new)], goals, blob="")
            if isinstance(moved, Moved):
                return Updated(records.mark(new, target), payload)
        raise self._restless(op.item)

    def _new_name(self, known: Known, op: Update) -> Name | None:
        """The name that the record needs now; None: it keeps the one that it has."""
        name, record = known.name, known.record
        if op.box == record.box and not (name.lane and not name.group and op.due < name.time - SLACK):
            return None
        if op.box is Box.DEAD and op.box != record.box:
            return names.in_box(name, Box.DEAD, record.priority)
        return names.message(
            record.namespace,
            record.queue,
            op.box,
            key=self._engine.fresh_key(None if record.group is not None else op.due),
            id=record.id,
            priority=record.priority,
            size=record.size,
            expires=op.expires,
            group=record.group,
        )

    def _pointing(self, record: Record, name: Name) -> Goal:
        """The id marker that leads to a record whose key is not its id."""
        marker = Marker(
            records.FORMAT,
            self._engine.write_id(),
            Standing.CONFIRMED,
            record.birth,
            record.version,
            record.id,
            name.place,
            0,
            "",
        )
        return Goal(names.id_marker(name.namespace, name.queue, name.id), records.encode(marker), -1)

    async def _rewrite(
        self, op: Reseal | PutState | DropState, build: Callable[[Record], tuple[Record, Outcome | None] | Conflict]
    ) -> Outcome:
        """Replace bytes of a record that leave its ETag alone."""
        for _ in range(TRIES):
            known = await self._locate(op.item, op.mark)
            if isinstance(known, Conflict):
                return known
            built = build(known.record)
            if isinstance(built, Conflict):
                # What this process knows may be old, as far as the state goes: its ETag is not the record's.
                if await self._is_current(known):
                    return built
                continue
            new, outcome = built
            new = msgspec.structs.replace(new, write_id=self._engine.write_id())
            written = await self._engine.swap_record(known, new, claimed=known.claimed)
            if isinstance(written, Known):
                return outcome if outcome is not None else Updated(records.mark(new, known.name), None)
        raise self._restless(op.item)

    def _check_doom(self, known: Known) -> None:
        """Whoever is given the message now would lose it to a DELETE that is on its way."""
        if self._engine.is_doomed(known.name.path):
            raise OutcomeUnknown(
                f"message {known.record.id} is being removed, and whether that took place is not known: the bucket's "
                "replies got lost. Remove it again, or leave it until its lease is over"
            )

    async def _is_current(self, known: Known) -> bool:
        """Whether the object still is as it was known."""
        found = await self._engine.fetch(known.name)
        return found is not None and found.known is not None and same(found.tag, known.tag)

    async def _remove(self, op: Remove) -> Outcome:
        engine = self._engine
        unsure = False
        try:
            for _ in range(TRIES):
                known = await self._locate(op.item, op.mark)
                if isinstance(known, Conflict):
                    # A delete whose reply was lost has taken place after all: nobody else could have done it.
                    return Removed() if unsure and known.cause is _MISSING else known
                await self._redeem(known)
                path, record = known.name.path, known.record
                settled = await self._moves.settled(known)
                deleted = await self._delete_held(known) if settled else False
                if deleted:
                    engine.leave(path)
                else:
                    unsure = unsure or deleted is None
                    if await self._moves.bury(known) is not True:
                        continue
                    await self._tidy(path if settled else "", op)
                if record.blob:
                    await self._tidy(names.blobs_prefix(record.namespace, record.queue) + record.blob, op)
                return Removed()
            raise self._restless(op.item)
        except StoreError as error:
            if unsure and not isinstance(error, OutcomeUnknown):
                # What failed did not take place, but the delete before it may yet.
                raise _may_be_gone(op.item) from error
            raise

    async def _redeem(self, known: Known) -> None:
        """Confirm the unique key of a message that is about to leave its name. Raises StoreError: then it must stay, or
        who finds the marker pending would think that it never came, and let a second one in."""
        record = known.record
        if not record.pledge:
            return
        path = names.markers_prefix(record.namespace, record.queue, "u") + record.pledge
        try:
            await self._markers.redeem(path, record.birth)
        except (StoreCorrupt, StoreMismatch) as error:
            # Nobody else takes it over either; nor need a damaged marker hold up its message.
            log.warning(
                "millpond.objects.marker_unconfirmed",
                extra={"object": path, "message_id": record.id, "reason": str(error)},
            )
        except OutcomeUnknown as error:
            raise StoreError(
                f"nothing was done with message {record.id}: its unique key must be confirmed first, and the bucket's "
                "replies got lost; try again"
            ) from error
        self._redeemed(known)

    @staticmethod
    def _redeemed(known: Known) -> None:
        known.record = msgspec.structs.replace(known.record, pledge="")

    async def _tidy(self, path: str, op: Remove) -> None:
        """Delete what nobody needs any more. If that fails it is left to those who come across it."""
        if path:
            try:
                await self._engine.exchange.delete(path)
            except StoreError as error:
                log.warning(
                    "millpond.objects.left_behind",
                    extra={"object": path, "message_id": op.item.id, "reason": str(error)},
                )

    async def _delete_held(self, known: Known) -> bool | None:
        """Delete a message without a condition, which only its holder may do, and only while its lease runs for longer
        than the request can take: nobody else may have been given the message by then. False: it may not be done; None:
        it was tried, and the replies got lost."""
        engine, record, path = self._engine, known.record, known.name.path
        if engine.options.fenced_removals or not known.claimed or not record.leased:
            return False

        outcome: bool | None = False

        def lasts() -> bool:
            return record.due - engine.now() > engine.options.margin

        for attempt in range(3):
            try:
                # Asked when the request is sent: until then it may have to wait for others.
                await engine.exchange.delete_once(path, alone=attempt > 0, still=lasts)
                return True
            except TooLate:
                break
            except OutcomeUnknown:
                outcome = None
                engine.doom(path, record.due)
                await engine.exchange.pause(attempt)
                try:
                    if await engine.exchange.read(path) is None:
                        return True
                except OutcomeUnknown:
                    raise
                except StoreError as error:
                    raise _may_be_gone(records.item(record, known.name)) from error
            except StoreError:
                if outcome is False:
                    raise
                # This one did not take place, but the one before may yet: so the message has to go.
                break
        return outcome

    @staticmethod
    def _restless(item: Item) -> StoreError:
        return StoreError(f"message {item.id} keeps changing under this write; try again")

    # Records that are new

    def draft(self, op: Insert, via: str = "") -> tuple[NewRecord, list[tuple[str, Marker, Unique | None]]]:
        """The record of an insert, and the markers that it needs first."""
        engine, item = self._engine, op.item
        number = names.id_number(item.id)
        # The id tells when the message is due, or when it was put in: then its name can be found by it.
        direct = not op.chosen and (item.group is not None or number >> names.KEY_BITS <= op.due + SLACK)
        key = number if direct else engine.fresh_key(None if item.group is not None else op.due)
        if item.group is None:
            engine.last_key = key
        name = names.message(
            item.namespace,
            item.queue,
            Box.LIVE,
            key=key,
            id=item.id,
            priority=item.priority,
            size=item.size,
            expires=op.expires,
            group=item.group,
        )
        if item.group is not None:
            engine.met(name)
        record = Record(
            records.FORMAT,
            engine.write_id(),
            engine.ids.random(records.BIRTH_BYTES),
            1,
            item.namespace,
            item.queue,
            item.id,
            item.priority,
            item.group,
            item.size,
            item.external,
            op.due,
            False,
            op.expires,
            int(Box.LIVE),
            op.head,
            op.status,
            op.payload,
            op.blob if item.external else "",
            None,
            0,
            via,
            (),
            "" if via or op.unique is None else names.key_hash(op.unique.key),
        )
        wanted: list[tuple[str, Marker, Unique | None]] = []
        if not direct:
            until = op.serial.until if op.serial is not None and op.serial.fresh else 0
            wanted.append((*self._markers.of_id(name, record.birth, via, until), None))
        if op.unique is not None:
            wanted.append((*self._markers.of_unique(name, record.birth, op.unique, via), op.unique))
        return NewRecord(name, record), wanted

    async def acquire(
        self, op: Insert, new: NewRecord, wanted: list[tuple[str, Marker, Unique | None]]
    ) -> list[Claim] | Conflict:
        """Take the markers of an insert, or none of them."""
        claims: list[Claim] = []
        try:
            for path, marker, unique in wanted:
                claim = await self._markers.acquire(new.name, path, marker, unique)
                if isinstance(claim, Claim):
                    claims.append(claim)
                    conflict = await self._same_id(op) if unique is None else None
                else:
                    conflict = claim
                if conflict is not None:
                    await self.release(claims)
                    return conflict
        except StoreError:
            await self.release(claims)
            raise
        return claims

    async def _same_id(self, op: Insert) -> Conflict | None:
        """A chosen id may be that of a message which the queue had made the id for: such a one has no marker."""
        item = op.item
        if not op.chosen or item.id[14] != UUID7:
            return None
        there = await self._finder.direct(item.namespace, item.queue, item.id)
        return None if there is None else Conflict(Cause.EXISTS, item.id)

    async def release(self, claims: list[Claim]) -> None:
        """Give markers back. If that fails, others find out by themselves."""
        with suppress(StoreError):
            await self._markers.release(claims)

    async def _insert(self, op: Insert) -> Outcome:
        new, wanted = self.draft(op)
        name, record = new
        claims = await self.acquire(op, new, wanted)
        if isinstance(claims, Conflict):
            return claims
        try:
            written = await self._engine.create_record(name, record)
        except OutcomeUnknown:
            raise
        except StoreError:
            await self.release(claims)
            raise
        if not isinstance(written, Known):
            held = records.decode_held(written.data, name.path)
            if held.birth != record.birth:
                return await self._overtaken(name, record, claims, wanted, held)
            # It is this insert's, and somebody was fast.
        for claim, (_, _, unique) in zip(claims, wanted, strict=True):
            try:
                other = await self._markers.confirm(claim)
            except StoreError as error:
                # The message is in. Who meets the marker finds it and confirms, as does who removes it.
                log.warning(
                    "millpond.objects.marker_unconfirmed",
                    extra={"object": claim.path, "message_id": record.id, "reason": str(error)},
                )
                continue
            if other is not None and await self._moves.withdraw(name, record.birth):
                other = await self._markers.other(name, claim)
                if other is None:
                    # Perhaps nothing will come of the other one.
                    raise self._given_up(record)
                return Conflict(Cause.UNIQUE if unique is not None else Cause.EXISTS, other)
            present = self._engine.index.get(name.path)
            if unique is not None and other is None and present is not None and present.record.birth == record.birth:
                self._redeemed(present)
        self._blobs.used(record.namespace, record.queue, record.blob)
        return Inserted(records.item(record, name), records.mark(record, name))

    async def _overtaken(
        self,
        name: Name,
        record: Record,
        claims: list[Claim],
        wanted: list[tuple[str, Marker, Unique | None]],
        held: Held,
    ) -> Conflict:
        """The name of an insert is taken: by another's message, or by who took its marker over and fenced it off."""
        if isinstance(held, Tombstone):
            for claim, (_, _, unique) in zip(claims, wanted, strict=True):
                other = await self._markers.other(name, claim)
                if other is not None:
                    await self.release(claims)
                    return Conflict(Cause.EXISTS if unique is None else Cause.UNIQUE, other)
        await self.release(claims)
        if claims and isinstance(held, Tombstone):
            raise self._given_up(record)
        return Conflict(Cause.EXISTS, record.id)

    @staticmethod
    def _given_up(record: Record) -> StoreError:
        return StoreError(f"the insert of message {record.id} took so long that others gave it up; try again")

    async def in_the_way(self, op: Insert) -> Conflict | None:
        """What refuses an insert, whatever its payload."""
        item = op.item
        if await self._finder.find(item.namespace, item.queue, item.id) is not None:
            return Conflict(Cause.EXISTS, item.id)
        if op.unique is not None:
            path = names.unique_marker(item.namespace, item.queue, op.unique.key)
            content = await self._engine.exchange.read(path)
            if content is not None:
                marker = records.decode(Marker, content.data, path)
                if marker.standing == Standing.CONFIRMED and marker.until > op.unique.now:
                    return Conflict(Cause.UNIQUE, marker.id)
        return None

    # An ack with successors

    async def hand_off(self, removal: Remove, inserts: list[Insert]) -> list[Outcome]:
        """Remove a message and insert others, all or none in the end."""
        ops: list[Op] = [removal, *inserts]
        keys = [key for op in ops for key in self.keys(op)]
        async with self._engine.turn(keys):
            return await self._hand_off(removal, inserts)

    async def _hand_off(self, removal: Remove, inserts: list[Insert]) -> list[Outcome]:
        def refused(index: int, conflict: Conflict) -> list[Outcome]:
            outcomes: list[Outcome] = [Conflict(Cause.ABORTED)] * (len(inserts) + 1)
            outcomes[index] = conflict
            return outcomes

        known = await self._locate(removal.item, removal.mark)
        if isinstance(known, Conflict):
            return refused(0, known)
        self._check_doom(known)
        await self._redeem(known)
        brings: list[NewRecord] = []
        goals: list[Goal] = []
        all_claims: list[Claim] = []
        mine: dict[str, int] = {}
        """Marker → number of the insert that has it."""
        demands: dict[str, tuple[NewRecord, Marker, Unique | None]] = {}
        for index, op in enumerate(inserts):
            new, wanted = self.draft(op, known.name.path)
            conflict: Conflict | None = None
            for path, _, unique in wanted:
                if path in mine and conflict is None:
                    twin = inserts[mine[path]].item.id
                    conflict = Conflict(Cause.EXISTS if unique is None else Cause.UNIQUE, twin)
            claims = conflict or await self._acquire_or_release(op, new, wanted, all_claims)
            if isinstance(claims, Conflict):
                await self.release(all_claims)
                return refused(index + 1, claims)
            for claim, (path, marker, unique) in zip(claims, wanted, strict=True):
                mine[path] = index
                demands[path] = new, marker, unique
                goals.append(self._markers.goal(claim, index))
            all_claims += claims
            brings.append(new)
        for _ in range(TRIES):
            try:
                moved = await self._moves.move(known, brings, goals, blob=known.record.blob)
            except OutcomeUnknown:
                raise
            except StoreError:
                await self.release(all_claims)
                raise
            if isinstance(moved, Moved):
                break
            again = await self._locate(removal.item, removal.mark)
            if isinstance(again, Conflict):
                await self.release(all_claims)
                return refused(0, again)
            known = again
            lost = await self._renew(all_claims, demands)
            if lost is not None:
                path, conflict = lost
                await self.release(all_claims)
                return refused(mine[path] + 1, conflict)
        else:
            await self.release(all_claims)
            raise self._restless(removal.item)
        outcomes: list[Outcome] = [Removed()]
        for name, record in brings:
            self._blobs.used(record.namespace, record.queue, record.blob)
            outcomes.append(Inserted(records.item(record, name), records.mark(record, name)))
        return outcomes

    async def _renew(
        self, claims: list[Claim], demands: dict[str, tuple[NewRecord, Marker, Unique | None]]
    ) -> tuple[str, Conflict] | None:
        """See to it that the markers are still those of a hand-off whose message has changed: perhaps that was done by
        who takes one of them over. The marker that it cannot have any more, and why."""
        try:
            for index, claim in enumerate(claims):
                new, marker, unique = demands[claim.path]
                renewed: Claim | Conflict | None = await self._markers.renew(claim)
                if renewed is None:
                    renewed = await self._markers.acquire(new.name, claim.path, marker, unique)
                if isinstance(renewed, Conflict):
                    return claim.path, renewed
                claims[index] = renewed
        except StoreError:
            await self.release(claims)
            raise
        return None

    async def _acquire_or_release(
        self,
        op: Insert,
        new: NewRecord,
        wanted: list[tuple[str, Marker, Unique | None]],
        others: list[Claim],
    ) -> list[Claim] | Conflict:
        try:
            return await self.acquire(op, new, wanted)
        except StoreError:
            await self.release(others)
            raise


def _may_be_gone(item: Item) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"whether message {item.id} was removed is not known: the bucket's replies got lost. Remove it again, or leave "
        "it until its lease is over"
    )


def _resealed(op: Reseal, record: Record) -> tuple[Record, Outcome | None] | Conflict:
    state = record.state
    if op.state is not None:
        if state is None or str(record.state_version) != op.state.etag:
            return Conflict(Cause.STATE, record.id)
        state = op.state.data
    payload = record.payload if op.payload is None else op.payload
    return msgspec.structs.replace(record, head=op.head, status=op.status, payload=payload, state=state), None


def _with_state(op: PutState | DropState, record: Record) -> tuple[Record, Outcome | None] | Conflict:
    if op.expect != (None if record.state is None else str(record.state_version)):
        return Conflict(Cause.STATE, record.id)
    version = record.state_version + 1
    data = op.data if isinstance(op, PutState) else None
    new = msgspec.structs.replace(record, state=data, state_version=version)
    return new, StateWritten("" if data is None else str(version))

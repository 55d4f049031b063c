"""What must be true of everything that the processes of the chaos test were told, when all is over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

Event = dict[str, Any]


class Left(NamedTuple):
    """A message that was still there at the end."""

    id: str
    n: str
    queue: str
    token: int
    reason: str | None
    """Of a dead letter."""
    attempts: int = 0
    failures: int = 0


class Ledger:
    """Events, and what was left."""

    def __init__(self, events: Iterable[Event], left: Iterable[Left]) -> None:
        self.events = list(events)
        self.left = list(left)
        self.violations: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._name: dict[str, str] = {}
        """Id → what the producer called it."""
        self._ids: defaultdict[str, set[str]] = defaultdict(set)
        self._told: dict[str, Event] = {}
        self._asked: dict[str, Event] = {}
        self._tokens: defaultdict[str, dict[int, Event]] = defaultdict(dict)
        self._by: defaultdict[tuple[str, str, int], list[Event]] = defaultdict(list)
        """(verb, id, token) → events of that answer."""
        self._dead = {one.id: one for one in self.left if one.reason is not None}
        self._live = {one.id: one for one in self.left if one.reason is None}

    def _violate(self, text: str) -> None:
        self.violations.append(text)

    def check(self) -> list[str]:
        """All violations."""
        self._gather()
        self._acks()
        self._enqueues()
        self._order()
        self._hand_offs()
        self._states()
        self._dead_letters()
        return self.violations

    def _gather(self) -> None:
        for one in self.left:
            self._meet(one.id, one.n)
        leases: dict[tuple[str, int], str] = {}
        for event in self.events:
            kind = event["event"]
            self.kinds[f"{event['role']} {kind}"] += 1
            if kind == "enqueue":
                self._asked[event["n"]] = event
            elif kind == "enqueue:done":
                self._told[event["n"]] = event
                self._meet(event["id"], event["n"])
            elif kind == "got":
                place = (event["id"], event["token"])
                if place in leases:
                    self._violate(f"token {event['token']} of {event['id']} was given out twice: {event}")
                leases[place] = event["lease"]
                self._tokens[event["id"]][event["token"]] = event
            elif kind == "read":
                self._meet(event["id"], event["n"])
                if event["kind"] == "large" and event["whole"] != 100_000:
                    self._violate(f"a payload has another length: {event}")
            elif "token" in event:
                verb, _, end = (
                    kind.rpartition(":") if kind.endswith((":done", ":refused", ":doubt")) else (kind, "", "")
                )
                self._by[verb, event["id"], event["token"]].append({**event, "end": end})

    def _meet(self, id: str, name: str) -> None:
        if self._name.setdefault(id, name) != name:
            self._violate(f"message {id} is {name} and {self._name[id]}")
        self._ids[name].add(id)

    def _ends(self, verb: str, id: str, token: int) -> set[str]:
        """How that answer ended: done, refused, doubt, or (cut off) nothing."""
        ends = [event["end"] for event in self._by.get((verb, id, token), ())]
        begun, ended = ends.count(""), len(ends) - ends.count("")
        found = {end for end in ends if end}
        if begun > ended:
            found.add("doubt")
        return found

    def _acks(self) -> None:
        self.acked: dict[str, int] = {}
        self.maybe: defaultdict[str, set[int]] = defaultdict(set)
        for verb, id, token in self._by:
            if verb != "ack":
                continue
            ends = self._ends(verb, id, token)
            if "done" in ends:
                if id in self.acked:
                    self._violate(f"{self._name[id]} ({id}) was acked with tokens {self.acked[id]} and {token}")
                self.acked[id] = max(token, self.acked.get(id, 0))
            elif "doubt" in ends:
                self.maybe[id].add(token)
        for id, token in self.acked.items():
            newest = max(self._tokens[id], default=0)
            if newest > token:
                self._violate(f"{self._name[id]} ({id}) came back: acked with token {token}, then given with {newest}")
            for box in (self._live, self._dead):
                if id in box:
                    self._violate(f"{self._name[id]} ({id}) was acked with token {token} and is there still: {box[id]}")

    def gone_by_ack(self, id: str) -> bool:
        """It was acked, or may have been."""
        return id in self.acked or bool(self.maybe[id])

    def _enqueues(self) -> None:
        for name, ids in self._ids.items():
            if "+" not in name and name not in self._asked:
                self._violate(f"{name} was never enqueued: {ids}")
            if len(ids) > 1 and "+" not in name:
                self._violate(f"{name} became {len(ids)} messages: {ids}")
        for name, told in self._told.items():
            id = told["id"]
            if self.gone_by_ack(id) or id in self._live or id in self._dead or name.startswith("ttl:"):
                continue
            self._violate(f"{name} ({id}) is lost; its tokens: {sorted(self._tokens[id])}")
        certain: dict[str, bool] = {}
        for event in self.events:
            if event["event"] == "enqueue:failed":
                certain[event["n"]] = event["certain"]
        for name, sure in certain.items():
            if sure and name not in self._told and self._ids.get(name):
                self._violate(f"{name} was said not to be enqueued, and is {self._ids[name]}")

    def _order(self) -> None:
        """Within a key: whoever comes later is not given out before the ack (or end) of each before it."""
        keys: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
        for name, asked in self._asked.items():
            if "key" in asked:
                keys[asked["key"]].extend((asked["place"], id) for id in self._ids.get(name, ()))
        for key, messages in keys.items():
            latest, whose = 0, ""
            for place, id in sorted(messages):
                given = [event["at"] for event in self._tokens[id].values()]
                if given and min(given) < latest:
                    self._violate(f"{place} of key {key} ({id}) was given out before {whose} was done")
                if id in self.acked:
                    begun = [event["at"] for event in self._by["ack", id, self.acked[id]] if not event["end"]]
                    if begun and min(begun) > latest:
                        latest, whose = min(begun), id

    def _hand_offs(self) -> None:
        successors: defaultdict[str, set[str]] = defaultdict(set)
        for name, ids in self._ids.items():
            if "+" in name:
                if len(ids) > 1:
                    self._violate(f"successor {name} became {len(ids)} messages: {ids}")
                successors[name.partition("+")[0]].add(name)
        for first, found in successors.items():
            if len(found) > 1:
                self._violate(f"{first} has {len(found)} successors: {found}")
        for (verb, id, token), events in self._by.items():
            then = {event["then"] for event in events if "then" in event}
            if verb != "ack" or not then:
                continue
            ends, [name] = self._ends(verb, id, token), then
            exists = bool(self._ids.get(name))
            if "done" in ends and not exists:
                self._violate(f"the successor {name} of {id} is lost")
            if ends == {"refused"} and exists:
                self._violate(f"{id} was not handed on, and its successor {name} is there")
            if exists and (id in self._live or id in self._dead):
                self._violate(f"the successor {name} is there, and {id} too")

    def _states(self) -> None:
        saved: defaultdict[str, list[tuple[list[int], int, int | None]]] = defaultdict(list)
        """Per message: value, when it was begun, when it was confirmed."""
        for (verb, id, _), events in self._by.items():
            if verb != "state:save":
                continue
            begun: dict[tuple[int, ...], int] = {}
            for event in events:
                value = tuple(event["value"])
                if not event["end"]:
                    begun[value] = event["at"]
                    saved[id].append((event["value"], event["at"], None))
                elif event["end"] == "done":
                    saved[id].append((event["value"], begun[value], event["at"]))
        loads: dict[tuple[str, int], int] = {}
        for event in self.events:
            if event["event"] == "state:load":
                loads[event["id"], event["token"]] = event["at"]
            if event["event"] != "state:loaded":
                continue
            id, value = event["id"], event["value"] or [0, 0]
            before = loads[id, event["token"]]
            least = max((each for each, _, done in saved[id] if done is not None and done < before), default=[0, 0])
            tried = [each for each, at, _ in saved[id] if at < event["at"]]
            if event["value"] is not None and value not in tried:
                self._violate(f"the state of {id} is {value}, which nobody saved before: {event}")
            if value < least:
                self._violate(f"the state of {id} fell back to {value} after {least} had been saved: {event}")

    def _dead_letters(self) -> None:
        for id, one in self._dead.items():
            buried = any(
                "done" in (ends := self._ends("bury", id, token)) or "doubt" in ends for token in self._tokens[id]
            )
            if one.reason == "chaos" and not buried:
                self._violate(f"{one} was buried by nobody")
            elif one.reason == "expired" and not one.n.startswith("ttl:"):
                self._violate(f"{one} has no time to live")
            elif one.reason == "max_attempts_exceeded" and not one.n.startswith("failing:"):
                self._violate(f"{one} has no budget")
            if one.failures > one.token or one.attempts > one.token:
                self._violate(f"{one} has more failures or attempts than deliveries")

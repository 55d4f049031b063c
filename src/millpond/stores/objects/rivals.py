"""Who else takes messages of a queue, and which of them are left to whom.

Everybody sees the same head of a queue, so that those who all begin there read the same messages and race for them. No
server deals them out. But who loses a claim knows that he is not alone: from then on he says once a minute, by an
object beside the queue's messages, that he takes some, and looks who else does. Whoever took a message from him he
knows at once: each write id begins with a name of its process.

Those who know of each other share the messages by rendezvous: of a message's hashes, one with each process, the highest
says whose it is. Two who know of the same others agree about every message, and who comes or goes moves few of them.

It is a matter of thrift and of nothing else: anybody may take any message, and does when there are no others, when one
has been left lying by its process, and when that was not heard of any more.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from millpond.model.clock import Clock

NAME_BYTES = 6
"""Of a process, at the beginning of its write ids: chance, and a million processes hardly share one."""
SAID_AGAIN = 60.0
"""Seconds after which a process that takes messages says so again."""
ALIVE = 2.5 * SAID_AGAIN
"""Seconds for which messages are left to a process after it was heard of last."""
STRANGERS = 0.25
"""Seconds after a look at who is there until the next, for those who lose messages to somebody they do not know; twice
as many each time, up to `SAID_AGAIN`."""
RIVALRY = 8
"""Claims that have to go through before a lost one is forgotten."""
MOST_RIVALRY = 256
MOST_RIVALS = 64
"""Processes remembered of one queue: each costs a hash for each message of a listing."""
QUEUES = 1000
"""Queues of which rivals are remembered."""
_MASK = (1 << 64) - 1

Queue = tuple[str, str]


def mix(number: int) -> int:
    """64 bits of which each depends on all 64 of ``number``."""
    # The finalizer of splitmix64 (Steele, Lea and Flood 2014): each bit of the one is of influence on all of the other.
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


class Share(NamedTuple):
    """Which messages of a queue are this process's to take first. Processes are told by a number for each."""

    mine: int
    others: tuple[int, ...]

    def has(self, number: int) -> bool:
        """Whether a message, by a number that is the same for all, is this process's."""
        own = mix(self.mine ^ number & _MASK)
        return all(mix(other ^ number & _MASK) < own for other in self.others)


class _Met:
    """What is known of one queue."""

    __slots__ = ("claims", "looked", "lost", "others", "pause", "said", "stranger")

    def __init__(self) -> None:
        self.lost = 0
        """Claims lost to others lately; each that goes through takes one off."""
        self.claims = 0
        """Those that went through since this process said that it is there."""
        self.others: dict[bytes, float] = {}
        """Process → monotonic time at which it was heard of."""
        self.said: float | None = None
        self.looked: float | None = None
        self.stranger = True
        """A claim was lost, to nobody who was known."""
        self.pause = STRANGERS


class Rivals:
    """Those that this process, whose name is ``me``, has met."""

    def __init__(self, me: bytes, clock: Clock) -> None:
        self.me = me
        self._seed = mix(int.from_bytes(me))
        self._clock = clock
        self._queues: OrderedDict[Queue, _Met] = OrderedDict()

    def _of(self, queue: Queue) -> _Met:
        met = self._queues.get(queue)
        if met is None:
            met = self._queues[queue] = _Met()
            if len(self._queues) > QUEUES:
                self._queues.popitem(last=False)
        else:
            self._queues.move_to_end(queue)
        return met

    def lost(self, queue: Queue, to: bytes | None) -> None:
        """A claim was lost to this process, or to nobody knows whom."""
        met = self._of(queue)
        met.lost = min(met.lost + RIVALRY, MOST_RIVALRY)
        met.stranger |= to is None or to not in met.others
        if to is not None:
            self.heard(queue, to, 0.0)

    def won(self, queue: Queue) -> None:
        """A claim went through."""
        met = self._queues.get(queue)
        if met is not None:
            met.lost -= met.lost > 0
            met.claims += 1

    def heard(self, queue: Queue, name: bytes, ago: float) -> None:
        """A process took messages of the queue, so many seconds ago."""
        if name == self.me or ago >= ALIVE:
            return
        met = self._of(queue)
        at = self._clock.monotonic() - max(0.0, ago)
        met.others[name] = max(at, met.others.get(name, at))
        if len(met.others) > MOST_RIVALS:
            del met.others[min(met.others, key=met.others.__getitem__)]

    def _alive(self, met: _Met) -> list[bytes]:
        oldest = self._clock.monotonic() - ALIVE
        if any(at <= oldest for at in met.others.values()):
            met.others = {name: at for name, at in met.others.items() if at > oldest}
        return sorted(met.others)

    def met(self, queue: Queue) -> bool:
        """Whether others take messages of the queue, as far as this process knows."""
        met = self._queues.get(queue)
        return met is not None and bool(met.lost or self._alive(met))

    def share(self, queue: Queue) -> Share | None:
        """How the queue is shared; None while nobody else is known by name."""
        met = self._queues.get(queue)
        others = [] if met is None else self._alive(met)
        return Share(self._seed, tuple(mix(int.from_bytes(name)) for name in others)) if others else None

    # Saying so

    def wants_to_say(self, queue: Queue) -> bool:
        """Whether it is time to say that this process is there; it counts as said. Not who has taken nothing since."""
        met, now = self._of(queue), self._clock.monotonic()
        if met.said is not None and (now - met.said < SAID_AGAIN or not met.claims):
            return False
        met.said, met.claims = now, 0
        return True

    def wants_to_look(self, queue: Queue) -> bool:
        """Whether it is time to see who else is there; it counts as seen."""
        met, now = self._of(queue), self._clock.monotonic()
        if met.looked is not None:
            if now - met.looked < (met.pause if met.stranger else SAID_AGAIN):
                return False
            met.pause = min(met.pause * 2, SAID_AGAIN) if met.stranger else STRANGERS
        met.looked, met.stranger = now, False
        return True

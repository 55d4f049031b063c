"""Requests to servers and what comes back: connections, failover, time-outs, and when to send something again.

Invariants: nothing is sent twice unless whoever asked said that it may be (``repeat``); who asked is told whether an
earlier try may have been carried out (`Attempt.unsure`); a body that cannot be made again is never sent again once its
first byte has been given away; and no try outlives the call's time-out. What an answer means is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from millpond.client.address import Address
from millpond.client.lane import CLOSED, CONNECT_TIMEOUT, Answer, Connection, Lane
from millpond.errors import (
    InvalidInput,
    LeaseLost,
    MessageNotFound,
    MillpondError,
    OutcomeUnknown,
    StateConflict,
    StoreClosed,
    StoreError,
    StoreUnreachable,
)
from millpond.model.clock import Clock, TimerHandle
from millpond.model.ids import IdSource
from millpond.wire import faults

TRIES_PER_TIMEOUT = 3
"""Of a call's time-out each try has a third at most: a server that hangs must leave time for the next one."""
CONNECTIONS = 128
"""Calls under way at a time, but for those that wait for messages."""
STREAMS = 64
"""Payloads that are streamed at a time."""
FIRST_PAUSE = 0.05
"""Seconds before a call is sent again to the only server there is; it doubles, and half of it is chance."""
LONGEST_PAUSE = 2.0
FIRST_REST = 1.0
"""Seconds for which a server that failed comes last; it doubles with each failure in a row."""
LONGEST_REST = 30.0
MAX_ANSWER = 256 * 1024 * 1024
"""No answer that is read as a whole is larger."""
_WITHOUT_A_WORD = frozenset({CLOSED, os.strerror(errno.ECONNRESET).lower()})
NO_TLS = "does it speak TLS? then its URL begins with https://"
NO_CERTIFICATE = "does it want a client certificate? then give cert= and key="
_SERVER_AWAY = frozenset({"node_passive", "shutdown_draining"})
"""Codes by which a server sends everybody to another one; nothing was done."""
_LATER = frozenset({"throttled"})
"""Codes by which a server puts off this one call; nothing was done."""
_OF_THE_CALL = (InvalidInput, LeaseLost, MessageNotFound, StateConflict)
"""Refusals that stand, whatever became of an earlier try."""
_PROXY = frozenset({502, 503, 504})
"""What a proxy answers of its own when the server behind it does not; something may have been done."""


class Link:
    """The connection that a try goes over, once it has one."""

    __slots__ = ("connection", "cut_off")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.cut_off = False
        """We ended it: it took too long, or nobody wants it any more."""

    def cut(self) -> None:
        """End the connection; who waits for an answer on it is told."""
        self.cut_off = True
        if self.connection is not None:
            self.connection.abort()

    def hang_up(self) -> None:
        """Say that nothing more comes, and still read what is on its way."""
        self.cut_off = True
        if self.connection is not None:
            self.connection.hang_up()


class Attempt:
    """One call, over all its tries."""

    __slots__ = ("given_up", "link", "unsure")

    def __init__(self, unsure: bool = False) -> None:
        self.unsure = unsure
        """It was sent before, and no answer came: it may have been carried out."""
        self.given_up = False
        self.link: Link | None = None
        """Of the try that is under way."""

    def give_up(self) -> None:
        """Nobody waits for it any more: no further try, and the server is to know."""
        self.given_up = True
        if self.link is not None:
            self.link.hang_up()


class _Trouble(Exception):
    """A try that came to nothing."""

    def __init__(self, text: str, *, sent: bool, ours: bool = False) -> None:
        super().__init__(text)
        self.sent = sent
        """The server may have seen it."""
        self.ours = ours
        """It says nothing of the server, which was not asked."""


class Endpoint:
    """A server, and how it has done lately."""

    __slots__ = ("failures", "lane", "rests_until", "trouble", "url")

    def __init__(self, url: str) -> None:
        self.url = url
        self.lane: Lane | None = None
        """Its connections, from its first call on."""
        self.failures = 0
        self.rests_until = float("-inf")
        self.trouble = ""

    def well(self) -> None:
        """It answers."""
        if self.failures:
            self.failures, self.rests_until, self.trouble = 0, float("-inf"), ""

    def failed(self, now: float, trouble: str, rest: float | None = None) -> None:
        """It does not, so that it comes last for a while."""
        self.failures += 1
        own = min(LONGEST_REST, FIRST_REST * 2 ** min(self.failures - 1, 10))
        self.rests_until = now + (own if rest is None else min(rest, LONGEST_REST))
        self.trouble = trouble


class Transport:
    """The way to the servers of one store."""

    def __init__(self, address: Address, clock: Clock, ids: IdSource) -> None:
        """Opens nothing. Raises InvalidInput for certificates that are none."""
        self._address = address
        self._clock = clock
        self.io_clock = clock
        """What tries and pauses are timed by. A test whose clock stands still while bytes travel sets another."""
        self._ids = ids
        self._tls = address.tls()
        self.endpoints = [Endpoint(url) for url in address.endpoints]
        self._current = self.endpoints[0]
        self._headers: dict[str, str] = {}
        if address.token is not None:
            self._headers["Authorization"] = f"Bearer {address.token}"
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._streams = asyncio.Semaphore(STREAMS)
        self._opened = self._closed = False
        self.requests = self.failures = self.repeats = self.under_way = 0
        """Tries made, those that came to nothing, those that followed one, and those that wait for their answer."""

    @property
    def where(self) -> str:
        """The servers, for people."""
        return ", ".join(endpoint.url for endpoint in self.endpoints)

    @property
    def current(self) -> str:
        """The server that is asked first."""
        return self._current.url

    async def open(self) -> None:
        """Be ready to connect; connects to nothing."""
        self._opened = True

    async def close(self) -> None:
        """Close every connection. Safe to repeat."""
        self._closed = True
        for endpoint in self.endpoints:
            if endpoint.lane is not None:
                endpoint.lane.close()

    # Calls

    async def call(
        self,
        path: str,
        body: Callable[[], bytes] | bytes,
        *,
        attempt: Attempt | None = None,
        wait: float = 0.0,
        repeat: bool = True,
        changes: bool = True,
        within: float | None = None,
    ) -> bytes:
        """The body of a successful answer. ``wait``: seconds that the server may take before it answers. ``repeat``: it
        may be sent again when no answer came. ``changes``: something may have been done then. ``within``: seconds, in
        place of the time-out. Raises what the server's fault stands for, StoreUnreachable, and OutcomeUnknown when
        nothing more can be tried and it may have been done."""
        a_try = self._address.timeout / TRIES_PER_TIMEOUT + wait

        async def once(endpoint: Endpoint, link: Link, left: float) -> Answer:
            if wait:
                return await self._ask(endpoint, path, body, link, min(a_try, left))
            # At most so many at once; more only queue up in the server. Waits are not counted, so that answers never
            # stand behind them.
            began = self.io_clock.monotonic()
            await self._place(left)
            try:
                left = max(0.001, left - (self.io_clock.monotonic() - began))
                return await self._ask(endpoint, path, body, link, min(a_try, left))
            finally:
                self._places.release()

        return await self._persist(once, attempt or Attempt(), wait=wait, repeat=repeat, changes=changes, within=within)

    async def upload(
        self,
        path: str,
        content_type: str,
        body: Callable[[], AsyncIterator[bytes]],
        *,
        again: bool,
        attempt: Attempt,
    ) -> bytes:
        """As `call`, with a body in chunks. ``again``: the body can be made again; otherwise nothing is sent again
        after its first chunk. How long it takes is the source's to say: only an answer has a time-out."""
        given = 0
        wrong: BaseException | None = None
        limit = self._address.timeout / TRIES_PER_TIMEOUT
        timers: list[TimerHandle] = []

        def watch(link: Link) -> None:
            while timers:
                timers.pop().cancel()
            timers.append(self.io_clock.call_later(limit, link.cut))

        async def chunks(link: Link) -> AsyncGenerator[bytes, None]:
            nonlocal given, wrong
            source = body()
            try:
                async for chunk in source:
                    given += 1
                    watch(link)
                    yield chunk
                    timers.pop().cancel()
                watch(link)
            except BaseException as error:
                # A file's OSError is no trouble of the connection.
                wrong = error
                raise
            finally:
                close = getattr(source, "aclose", None)
                if close is not None:
                    await close()

        async def once(endpoint: Endpoint, link: Link, left: float) -> Answer:
            async def send(lane: Lane, connection: Connection) -> Answer:
                return await lane.upload(connection, path, content_type, chunks(link))

            try:
                async with self._streams:
                    # One that was kept may have ended meanwhile, which shows too late for what cannot be sent again.
                    return await self._use(endpoint, link, None, send, fresh=not again)
            except _Trouble as trouble:
                if isinstance(wrong, Exception):
                    raise wrong from None
                if given and not again:
                    raise OutcomeUnknown(
                        f"the payload broke off on its way to {endpoint.url} ({trouble}), and cannot be sent again "
                        "from its beginning: enqueue it anew, with the same message_id or dedup_key if you gave one"
                    ) from None
                raise
            finally:
                while timers:
                    timers.pop().cancel()

        return await self._persist(once, attempt)

    async def download(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The body of an answer in chunks. Raises as `call`; StoreUnreachable when it breaks off."""
        async with self._streams, contextlib.aclosing(self._body(path, body, None)) as chunks:
            async for chunk in chunks:
                yield chunk

    def listen(self, path: str, body: bytes, silence: float) -> AsyncGenerator[bytes, None]:
        """As `download`, for an answer that has no end; ``silence``: seconds without a byte after which it counts as
        broken off."""
        return self._body(path, body, silence)

    async def rest(self, times: int) -> None:
        """Wait as long as a call does that has failed so many times."""
        await self._sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(times, 10)))

    @property
    def closed(self) -> bool:
        """It was closed."""
        return self._closed

    async def _body(self, path: str, body: bytes, silence: float | None) -> AsyncGenerator[bytes, None]:
        limit = self._address.timeout / TRIES_PER_TIMEOUT
        patience = limit if silence is None else silence
        opened: list[tuple[Endpoint, Link]] = []

        async def once(endpoint: Endpoint, link: Link, left: float) -> Answer:
            async def send(lane: Lane, connection: Connection) -> Answer:
                answer = await connection.ask(lane.request(path, body), stream=True)
                if answer.status == 200:
                    opened.append((endpoint, link))
                return answer

            return await self._use(endpoint, link, min(limit, left), send, leave=True)

        await self._persist(once, Attempt(), changes=False)
        [(endpoint, link)] = opened
        connection, lane = link.connection, endpoint.lane
        assert connection is not None
        assert lane is not None
        received = 0
        try:
            while True:
                timer = self.io_clock.call_later(patience, link.cut)
                try:
                    chunk = await connection.chunk()
                finally:
                    timer.cancel()
                if not chunk:
                    return
                received += len(chunk)
                yield chunk
        except OSError as error:
            self._check_open()
            text = "nothing comes any more" if link.cut_off else _words(error)
            what = "payload" if silence is None else "stream"
            raise StoreUnreachable(
                f"the {what} broke off after {received} bytes from {endpoint.url} ({text}); read it again"
            ) from error
        finally:
            if not connection.whole:
                connection.abort()  # what is still on its way would be taken for the next answer
            lane.put_back(connection)

    async def _persist(
        self,
        once: Callable[[Endpoint, Link, float], Awaitable[Answer]],
        attempt: Attempt,
        *,
        wait: float = 0.0,
        repeat: bool = True,
        changes: bool = True,
        within: float | None = None,
    ) -> bytes:
        clock, now = self._clock, self._clock.monotonic()
        timeout = self._address.timeout if within is None else min(within, self._address.timeout)
        end = now + timeout + wait
        tries = 0
        waited = ""
        while True:
            endpoint = self._choose(now)
            attempt.link = link = Link()
            self.requests += 1
            later: float | None = None
            refusal: MillpondError | None = None
            try:
                answer = await self._counted(once(endpoint, link, max(0.001, end - now)))
            except _Trouble as trouble:
                self.failures += 1
                attempt.unsure |= trouble.sent
                if trouble.ours:
                    waited = str(trouble)
                else:
                    endpoint.failed(clock.monotonic(), str(trouble))
                if trouble.sent and not repeat:
                    raise OutcomeUnknown(
                        f"{endpoint.url} was asked, and no answer came ({trouble}): it may have been done; look, and "
                        "ask again if it was not"
                    ) from None
            else:
                if answer.status == 200:
                    endpoint.well()
                    return answer.data
                later = _seconds(answer.retry_after)
                fault = faults.decode(answer.data)
                if fault is None:
                    proxy = f"status {answer.status} without a word of a Millpond server"
                    if answer.status not in _PROXY:
                        raise StoreError(f"{endpoint.url} answers with {proxy}: is it one?")
                    attempt.unsure = True
                    endpoint.failed(clock.monotonic(), proxy, later)
                    if not repeat:
                        raise OutcomeUnknown(f"{endpoint.url} answers with {proxy}: it may have been done")
                else:
                    refusal = faults.exception(answer.status, fault.error, fault.detail)
                    if fault.error in _SERVER_AWAY:
                        endpoint.failed(clock.monotonic(), fault.error, later)
                        refusal = None
                    elif fault.error not in _LATER and not (attempt.unsure and changes and refusal.retryable):
                        # (Who asks again soon may yet learn what became of an earlier try.)
                        endpoint.well()
                        raise self._refused(refusal, endpoint, attempt.unsure and changes)
            self._check_wanted(attempt)
            now = clock.monotonic()
            pause = self._pause(now, tries, later, refusal is not None)
            tries += 1
            if now + pause >= end:
                unsure = attempt.unsure and changes
                if refusal is not None:
                    raise self._refused(refusal, endpoint, unsure)
                raise self._exhausted(timeout, unsure, waited)
            if pause:
                await self._sleep(pause)
                now = clock.monotonic()
            self._check_wanted(attempt)
            self.repeats += 1

    async def _place(self, within: float) -> None:
        """One of the places for calls, to be released. Raises _Trouble when none becomes free in time: a server that
        hangs holds each for as long as a try may take, and a call's time-out is also for those who wait behind."""
        if not self._places.locked():
            await self._places.acquire()
            return
        try:
            async with asyncio.timeout(None) as limit:
                # By our own clock, not the loop's.
                timer = self.io_clock.call_later(within, lambda: limit.reschedule(0.0))
                try:
                    await self._places.acquire()
                finally:
                    timer.cancel()
        except TimeoutError:
            text = f"{CONNECTIONS} other calls were under way all the time"
            raise _Trouble(text, sent=False, ours=True) from None

    async def _counted(self, call: Awaitable[Answer]) -> Answer:
        self.under_way += 1
        try:
            return await call
        finally:
            self.under_way -= 1

    def _check_wanted(self, attempt: Attempt) -> None:
        if attempt.given_up or self._closed:
            raise StoreClosed("the pond was closed, or the call cancelled, while it was under way")

    def _choose(self, now: float) -> Endpoint:
        current = self._current
        if current.rests_until > now:
            # The first that does not rest, in the order given; else the one whose rest ends first.
            current = self._current = min(self.endpoints, key=lambda each: max(each.rests_until, now))
        return current

    def _pause(self, now: float, tries: int, later: float | None, put_off: bool) -> float:
        """Seconds until the next try. None at all where there is another server to go to; ``put_off``: the server is
        well, and wants this call later."""
        if not put_off and any(endpoint.rests_until <= now for endpoint in self.endpoints):
            return 0.0
        if not tries and later is None:
            return 0.0  # a connection that was kept may have ended meanwhile, with nothing wrong
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries, 10))
        least = pause / 2 if later is None else later
        return least + pause / 2 * self._ids.below(1001) / 1000

    def _exhausted(self, timeout: float, unsure: bool, waited: str) -> StoreError:
        seconds = f"{timeout:g} s"
        troubles = [f"{each.url}: {each.trouble}" for each in self.endpoints if each.trouble]
        said = "; ".join([*troubles, waited] if waited else troubles)
        if any(each.trouble in _WITHOUT_A_WORD for each in self.endpoints):
            # What a server does that wants TLS, or a certificate, is all that can be seen of it.
            said += f"; {NO_CERTIFICATE if self._address.secure else NO_TLS}" if self._address.cert is None else ""
        if unsure:
            return OutcomeUnknown(f"no answer came within {seconds}, and it may have been done ({said})")
        return StoreUnreachable(f"no server could do it within {seconds} ({said})")

    @staticmethod
    def _refused(refusal: MillpondError, endpoint: Endpoint, unsure: bool) -> MillpondError:
        """What a refusal means to the caller: of this try it says that nothing was done, but not of one before it that
        got no answer. What is wrong with the call itself was so then as well."""
        if not unsure or isinstance(refusal, _OF_THE_CALL):
            return refusal
        return OutcomeUnknown(
            f"{endpoint.url} refuses it now ({refusal}), but an earlier try got no answer, and may have been carried "
            "out; look, and ask again if it was not"
        )

    async def _sleep(self, seconds: float) -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.io_clock.call_later(seconds, lambda: None if over.done() else over.set_result(None))
        try:
            await over
        finally:
            timer.cancel()

    # One try

    def _check_open(self) -> None:
        if not self._opened or self._closed:
            raise StoreClosed("this pond is not open; use it with `async with`")

    async def _ask(
        self, endpoint: Endpoint, path: str, body: Callable[[], bytes] | bytes, link: Link, limit: float
    ) -> Answer:
        """A call: send it, and read the answer. Raises _Trouble."""

        async def send(lane: Lane, connection: Connection) -> Answer:
            return await connection.ask(lane.request(path, body if isinstance(body, bytes) else body()))

        return await self._use(endpoint, link, limit, send)

    async def _use(
        self,
        endpoint: Endpoint,
        link: Link,
        limit: float | None,
        send: Callable[[Lane, Connection], Awaitable[Answer]],
        *,
        fresh: bool = False,
        leave: bool = False,
    ) -> Answer:
        """A try on a connection to the server, which is kept if all went well; ``leave``: that of a success is left to
        the caller, who puts it back. Raises _Trouble."""
        self._check_open()
        lane = endpoint.lane
        if lane is None:
            lane = endpoint.lane = Lane(endpoint.url, self._tls, self._headers, MAX_ANSWER)
        connection: Connection | None = None
        timer: TimerHandle | None = None
        try:
            within = CONNECT_TIMEOUT if limit is None else limit
            connection = link.connection = await lane.connection(fresh=fresh, within=within)
            if limit is not None:
                timer = self.io_clock.call_later(limit, link.cut)
            answer = await send(lane, connection)
        except BaseException as error:
            if connection is not None:
                connection.abort()  # its answer would be taken for the next one's
                lane.put_back(connection)
            if not isinstance(error, OSError):
                raise
            if self._closed:
                raise StoreClosed("the pond was closed while this call was under way") from None
            text = "no answer in time" if link.cut_off else _words(error)
            raise _Trouble(text, sent=connection is not None) from error
        finally:
            if timer is not None:
                timer.cancel()
        if not (leave and answer.status == 200):
            # From here on it is another call's, and nothing that becomes of this one may end it.
            link.connection = None
            lane.put_back(connection)
        return answer


def _seconds(value: str | None) -> float | None:
    """A Retry-After in seconds; None for none, and for a date, which no server of ours sends."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return min(max(0.0, float(value)), 3600.0)
    return None


def _words(error: BaseException) -> str:
    """What went wrong with a connection, without addresses, which are said beside it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__

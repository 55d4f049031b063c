"""The life cycle: every row of the table, stale leases, budget and time to live, and what always holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from millpond import lifecycle
from millpond.errors import InvalidInput, LeaseLost
from millpond.lifecycle import (
    REASON_EXHAUSTED,
    REASON_EXPIRED,
    RESET,
    TABLE,
    Bury,
    Change,
    Deliver,
    Discard,
    Event,
    LeaseRule,
    NotPossible,
    State,
    Wait,
)
from millpond.model.message import HEAD_FORMAT, DeadLetter, Head, Lease, Status

NOW = 1_750_000_000_000
VISIBILITY = 30_000


def head(**changes: Any) -> Head:
    made = Head(
        HEAD_FORMAT, "0197a3c2-0000-7000-8000-000000000001", "default", "q", NOW, 5, 3, VISIBILITY, None,
        None, None, None, None, None, 0, False,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(lifecycle.new_status(NOW - 1000, 0, None), **changes)


LEASE = Lease("lease-7", 7, NOW + 500, "owner", "txn")
_USED = {"attempts": 4, "failures": 1, "token": 7, "last_error": "earlier"}


def example(state: State) -> Status:
    """A message that stands so at NOW."""
    if state is State.DELAYED:
        return status(visible_at=NOW + 1, **_USED)
    if state is State.READY:
        return status(visible_at=NOW, **_USED)
    if state is State.LEASED:
        return status(visible_at=NOW + 500, lease=LEASE, **_USED)
    if state is State.LAPSED:
        return status(visible_at=NOW, lease=msgspec.structs.replace(LEASE, until=NOW), **_USED)
    assert state is State.DEAD
    return status(visible_at=NOW, dead=DeadLetter("why", NOW - 1), **_USED)


def apply(event: Event, before: Status, now: int = NOW) -> Status | State:
    """What the function for ``event`` makes of a message; State.GONE when it may go. Raises NotPossible."""
    long_suffering = head(max_attempts=0)
    if event is Event.DELIVER:
        verdict = lifecycle.deliver(long_suffering, before, now, visibility=None, lease_id="new")
        if isinstance(verdict, Wait):
            raise NotPossible(lifecycle.state_of(before, now), event)
        assert isinstance(verdict, Deliver)
        return verdict.status
    if event is Event.ACK:
        lifecycle.ack(before, "lease-7", 7)
        return State.GONE
    if event is Event.NACK:
        after = lifecycle.nack(long_suffering, before, now, "lease-7", 7, delay=250)
        assert isinstance(after, Status)
        return after
    if event is Event.DEFER:
        return lifecycle.defer(before, now, "lease-7", 7, delay=250)
    if event is Event.EXTEND:
        return lifecycle.extend(before, now, "lease-7", 7, extension=900)
    if event is Event.EXHAUST:
        if before.lease is not None:
            given_up = lifecycle.nack(head(max_attempts=1), before, now, "lease-7", 7, delay=250)
        else:
            verdict = lifecycle.deliver(head(max_attempts=1), before, now, visibility=None, lease_id="new")
            if isinstance(verdict, Wait):
                raise NotPossible(lifecycle.state_of(before, now), event)
            assert not isinstance(verdict, Deliver)
            given_up = verdict
        assert isinstance(given_up, Bury)
        return given_up.status
    if event is Event.EXPIRE:
        outcome = lifecycle.expire(msgspec.structs.replace(before, expires_at=now), now, bury=True)
        if isinstance(outcome, Wait):
            raise NotPossible(lifecycle.state_of(before, now), event)
        assert isinstance(outcome, Bury)
        return outcome.status
    if event is Event.BURY:
        return lifecycle.bury(before, now, "by hand")
    if event is Event.DELETE:
        if not lifecycle.deletable(before, now):
            raise NotPossible(lifecycle.state_of(before, now), event)
        return State.GONE
    assert event is Event.REDRIVE
    return lifecycle.redrive(long_suffering, before, now)


LIVE_STATES = [state for state in State if state is not State.GONE]
PAIRS = [(state, event) for state in LIVE_STATES for event in Event]


def name(value: object) -> str:
    return value.value if isinstance(value, State | Event) else repr(value)


@pytest.mark.parametrize("state", LIVE_STATES, ids=name)
def test_examples_stand_where_they_say(state: State) -> None:
    assert lifecycle.state_of(example(state), NOW) is state


@pytest.mark.parametrize(("state", "event"), [pair for pair in PAIRS if pair in TABLE], ids=name)
def test_every_row_of_the_table(state: State, event: Event) -> None:
    change, before = TABLE[state, event], example(state)
    after = apply(event, before)
    if change.to is State.GONE:
        assert after is State.GONE
        return
    assert isinstance(after, Status)
    assert lifecycle.state_of(after, NOW) is change.to
    assert after.attempts == (0 if change.attempts == RESET else before.attempts + change.attempts)
    assert after.failures == (0 if change.failures == RESET else before.failures + change.failures)
    assert after.updated_at == NOW
    assert after.last_error == "earlier"
    assert (after.dead is not None) == (change.to is State.DEAD)
    if change.lease is LeaseRule.GRANT:
        assert after.lease == Lease("new", 8, NOW + VISIBILITY)
        assert after.token == 8
    elif change.lease is LeaseRule.RENEW:
        assert after.lease == msgspec.structs.replace(LEASE, until=NOW + 900)
        assert after.token == 7
    else:
        assert after.lease is None
        assert after.token == 7
    visible = {
        "now + visibility": NOW + VISIBILITY,
        "now + delay": NOW + 250,
        "now + extension": NOW + 900,
        "now": NOW,
    }
    if change.visible in visible:
        assert after.visible_at == visible[change.visible]
    else:
        assert change.to is State.DEAD
        assert after.visible_at == NOW


@pytest.mark.parametrize(("state", "event"), [pair for pair in PAIRS if pair not in TABLE], ids=name)
def test_every_pair_outside_the_table_is_refused(state: State, event: Event) -> None:
    # Where there is no lease, who answers under one is told so before the table is asked.
    with pytest.raises((NotPossible, LeaseLost)):
        apply(event, example(state))


@pytest.mark.parametrize(("state", "event"), [pair for pair in PAIRS if pair not in TABLE], ids=name)
def test_the_table_itself_refuses(state: State, event: Event) -> None:
    with pytest.raises(NotPossible, match=f"a {state.value} message cannot {event.value}") as refusal:
        lifecycle._apply(event, example(state), NOW)
    assert (refusal.value.state, refusal.value.event) == (state, event)


def test_the_table_is_closed() -> None:
    assert all(isinstance(change, Change) for change in TABLE.values())
    assert {state for state, _ in TABLE} == set(LIVE_STATES)
    assert {event for _, event in TABLE} == set(Event)
    assert not any(state is State.GONE for state, _ in TABLE)
    assert {change.to for change in TABLE.values()} == set(State) - {State.LAPSED}


# The design's table


def test_enqueue() -> None:
    made = lifecycle.new_status(NOW, 1500, 60_000)
    assert (made.attempts, made.failures, made.token) == (0, 0, 0)
    assert (made.updated_at, made.visible_at, made.expires_at) == (NOW, NOW + 1500, NOW + 60_000)
    assert (made.lease, made.dead, made.last_error) == (None, None, None)
    assert lifecycle.new_status(NOW, 0, None).expires_at is None
    assert lifecycle.state_of(made, NOW + 1499) is State.DELAYED
    assert lifecycle.state_of(made, NOW + 1500) is State.READY
    assert lifecycle.due(made) == NOW + 1500


def delivered(before: Status, now: int = NOW, **options: Any) -> Status:
    options.setdefault("visibility", None)
    options.setdefault("lease_id", "L")
    verdict = lifecycle.deliver(options.pop("head", head()), before, now, **options)
    assert isinstance(verdict, Deliver), verdict
    return verdict.status


def test_delivery_of_a_free_message() -> None:
    after = delivered(status(), visibility=5000, owner="me", txn_id="t")
    assert (after.attempts, after.failures, after.token) == (1, 0, 1)
    assert after.visible_at == NOW + 5000
    assert after.lease == Lease("L", 1, NOW + 5000, "me", "t")


def test_delivery_after_an_unanswered_lease_costs_a_failure() -> None:
    first = delivered(status(), visibility=1000)
    second = delivered(first, NOW + 1000)
    assert (second.attempts, second.failures, second.token) == (2, 1, 2)
    assert second.lease == Lease("L", 2, NOW + 1000 + VISIBILITY)


def test_nack_is_exact_to_the_millisecond_and_keeps_the_error() -> None:
    held = delivered(status())
    after = lifecycle.nack(head(), held, NOW + 3, "L", 1, delay=777, error={"code": 5})
    assert isinstance(after, Status)
    assert (after.attempts, after.failures, after.visible_at) == (1, 1, NOW + 780)
    assert after.lease is None
    assert after.last_error == {"code": 5}
    again = delivered(after, NOW + 780)
    assert (again.attempts, again.failures) == (2, 1)
    silent = lifecycle.nack(head(), again, NOW + 800, "L", 2, delay=0)
    assert isinstance(silent, Status)
    assert silent.last_error == {"code": 5}


def test_defer_costs_no_failure() -> None:
    current = status()
    for turn in range(1, 20):
        current = delivered(current, NOW + turn)
        current = lifecycle.defer(current, NOW + turn, "L", turn, delay=1)
    assert (current.attempts, current.failures, current.token) == (19, 0, 19)
    assert current.visible_at == NOW + 20
    assert current.lease is None


def test_extend_keeps_the_lease_with_a_new_end() -> None:
    held = delivered(status(), owner="me", txn_id="t")
    longer = lifecycle.extend(held, NOW + 10, "L", 1, extension=90_000)
    assert longer.lease == Lease("L", 1, NOW + 90_010, "me", "t")
    assert longer.visible_at == NOW + 90_010
    assert (longer.attempts, longer.failures) == (1, 0)
    shorter = lifecycle.extend(longer, NOW + 20, "L", 1, extension=1)
    assert shorter.visible_at == NOW + 21
    lifecycle.ack(shorter, "L", 1)


@pytest.mark.parametrize("extension", [0, -1, -30_000])
def test_extension_of_nothing_is_refused(extension: int) -> None:
    with pytest.raises(InvalidInput, match="longer than 0"):
        lifecycle.extend(delivered(status()), NOW, "L", 1, extension=extension)


def test_a_lease_length_never_becomes_the_messages_visibility() -> None:
    held = delivered(status(), visibility=1)
    given_back = lifecycle.nack(head(), held, NOW, "L", 1, delay=99_999)
    assert isinstance(given_back, Status)
    again = delivered(given_back, NOW + 99_999)
    assert again.lease is not None
    assert again.lease.until == NOW + 99_999 + VISIBILITY


# Budget


def test_nack_with_the_last_failure_buries_at_once() -> None:
    held = delivered(status(failures=2))
    given_up = lifecycle.nack(head(max_attempts=3), held, NOW, "L", 1, delay=5000, error="boom")
    assert isinstance(given_up, Bury)
    after = given_up.status
    assert (after.failures, after.attempts, after.token, after.lease) == (3, 1, 1, None)
    assert after.dead == DeadLetter(REASON_EXHAUSTED, NOW)
    assert after.last_error == "boom"
    assert lifecycle.state_of(after, NOW + 10**9) is State.DEAD


def test_nack_with_the_last_failure_discards_where_the_policy_says_so() -> None:
    held = delivered(status(failures=2))
    given_up = lifecycle.nack(head(max_attempts=3), held, NOW, "L", 1, delay=0, bury_exhausted=False)
    assert given_up == Discard(REASON_EXHAUSTED)


def test_no_limit_means_none() -> None:
    held = delivered(status(failures=10**6), head=head(max_attempts=0))
    after = lifecycle.nack(head(max_attempts=0), held, NOW, "L", 1, delay=0)
    assert isinstance(after, Status)
    assert after.failures == 10**6 + 1


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_a_poison_message_dies_after_as_many_crashes_as_it_may(budget: int) -> None:
    current, now, deliveries = status(last_error="kept"), NOW, 0
    while True:
        verdict = lifecycle.deliver(head(max_attempts=budget), current, now, visibility=None, lease_id="L")
        if not isinstance(verdict, Deliver):
            break
        current, deliveries, now = verdict.status, deliveries + 1, now + VISIBILITY
    assert isinstance(verdict, Bury)
    assert deliveries == budget
    assert verdict.status.failures == budget
    assert verdict.status.attempts == budget
    assert verdict.status.dead == DeadLetter(REASON_EXHAUSTED, now)
    assert verdict.status.last_error == "kept"
    assert verdict.status.lease is None


def test_crashes_and_nacks_share_one_budget() -> None:
    crashed = delivered(status(), visibility=10)
    held = delivered(crashed, NOW + 10)
    given_up = lifecycle.nack(head(max_attempts=2), held, NOW + 11, "L", 2, delay=0)
    assert isinstance(given_up, Bury)


def test_a_spent_budget_is_seen_at_hand_out() -> None:
    verdict = lifecycle.deliver(head(max_attempts=2), status(failures=2), NOW, visibility=None, lease_id="L")
    assert isinstance(verdict, Bury)
    assert verdict.status.failures == 2
    verdict = lifecycle.deliver(
        head(max_attempts=2), status(failures=2), NOW, visibility=None, lease_id="L", bury_exhausted=False
    )
    assert verdict == Discard(REASON_EXHAUSTED)


# Time to live


def test_an_expired_message_is_not_delivered() -> None:
    fresh = status(expires_at=NOW)
    options: dict[str, Any] = {"visibility": None, "lease_id": "L"}
    assert isinstance(lifecycle.deliver(head(), fresh, NOW - 1, **options), Deliver)
    assert lifecycle.deliver(head(), fresh, NOW, **options) == Discard(REASON_EXPIRED)
    verdict = lifecycle.deliver(head(), fresh, NOW, bury_expired=True, **options)
    assert isinstance(verdict, Bury)
    assert verdict.status.dead == DeadLetter(REASON_EXPIRED, NOW)
    assert verdict.status.failures == 0


def test_expiry_is_judged_before_the_budget() -> None:
    verdict = lifecycle.deliver(
        head(max_attempts=1), status(expires_at=NOW, failures=5), NOW, visibility=None, lease_id="L"
    )
    assert verdict == Discard(REASON_EXPIRED)


def test_a_leased_message_is_left_to_its_holder() -> None:
    held = delivered(status(expires_at=NOW + 10), visibility=1000)
    late = NOW + 500
    assert lifecycle.expired(held, late)
    assert lifecycle.expire(held, late, bury=True) == Wait(NOW + 1000)
    lifecycle.ack(held, "L", 1)
    assert lifecycle.extend(held, late, "L", 1, extension=1000).visible_at == late + 1000
    given_back = lifecycle.nack(head(), held, late, "L", 1, delay=0)
    assert isinstance(given_back, Status)
    assert lifecycle.expire(given_back, late, bury=False) == Discard(REASON_EXPIRED)
    lapsed = lifecycle.expire(held, NOW + 1000, bury=True)
    assert isinstance(lapsed, Bury)


def test_the_collector_leaves_the_living_alone() -> None:
    assert lifecycle.expire(status(), NOW, bury=True) == Wait(NOW - 1000)
    assert lifecycle.expire(status(expires_at=NOW + 1), NOW, bury=True) == Wait(NOW - 1000)
    assert not lifecycle.expired(status(), NOW)


@pytest.mark.parametrize("bury", [True, False])
def test_dead_letters_do_not_expire(bury: bool) -> None:
    dead = msgspec.structs.replace(example(State.DEAD), expires_at=NOW - 5)
    with pytest.raises(NotPossible):
        lifecycle.expire(dead, NOW, bury=bury)


# Not now


@pytest.mark.parametrize(("state", "due"), [(State.DELAYED, NOW + 1), (State.LEASED, NOW + 500)], ids=name)
def test_what_is_not_due_waits(state: State, due: int) -> None:
    verdict = lifecycle.deliver(head(), example(state), NOW, visibility=None, lease_id="L")
    assert verdict == Wait(due)


def test_a_dead_letter_is_never_delivered() -> None:
    with pytest.raises(NotPossible):
        lifecycle.deliver(head(), example(State.DEAD), NOW + 10**9, visibility=None, lease_id="L")


# Stale leases

ANSWERS: dict[str, Callable[[Status | None, str, int], object]] = {
    "ack": lifecycle.ack,
    "nack": lambda seen, lease, token: lifecycle.nack(head(), seen, NOW, lease, token, delay=0),
    "defer": lambda seen, lease, token: lifecycle.defer(seen, NOW, lease, token, delay=0),
    "extend": lambda seen, lease, token: lifecycle.extend(seen, NOW, lease, token, extension=1),
    "check": lifecycle.check_lease,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize(
    ("seen", "lease", "token", "why"),
    [
        (None, "lease-7", 7, "^the message is gone: it was acked, removed, or never in this queue; nothing"),
        (example(State.READY), "lease-7", 7, r"^lease lease-7 \(token 7\) is over: the message was given back"),
        (
            example(State.DELAYED),
            "lease-7",
            7,
            "given back, or redriven, and nobody holds it now; nothing was",
        ),
        (example(State.READY), "lease-6", 6, r"is over: the message has been delivered again since \(token 7\)"),
        (example(State.READY), "lease-8", 8, r"token 8\) was never given for this message: its last token is 7;"),
        (status(), "lease-1", 1, r"token 1\) was never given for this message: it was not delivered yet;"),
        (
            example(State.DEAD),
            "lease-7",
            7,
            r"^the message is a dead letter \(why\), which nobody holds",
        ),
        (example(State.DEAD), "lease-6", 6, "is a dead letter"),
        (example(State.LEASED), "lease-6", 6, r"is over: the message has been delivered again since \(token 7\)"),
        (example(State.LEASED), "lease-7", 6, "delivered again since"),
        (example(State.LEASED), "lease-7", 8, r"was never given for this message: its last token is 7;"),
        (example(State.LEASED), "guessed", 7, "lease guessed .* was never given: token 7 belongs to another lease id;"),
        (example(State.LAPSED), "lease-6", 6, "delivered again since"),
        (example(State.LAPSED), "guessed", 7, "belongs to another lease id"),
        (example(State.LEASED), "", 7, "belongs to another lease id"),
    ],
)
def test_stale_answers_get_lease_lost(
    answer: Callable[[Status | None, str, int], object], seen: Status | None, lease: str, token: int, why: str
) -> None:
    with pytest.raises(LeaseLost, match=why):
        answer(seen, lease, token)


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("state", [State.LEASED, State.LAPSED], ids=name)
def test_the_last_holder_may_answer_even_late(
    answer: Callable[[Status | None, str, int], object], state: State
) -> None:
    answer(example(state), "lease-7", 7)


def test_a_late_answer_counts_one_failure_not_two() -> None:
    held = delivered(status(), visibility=10)
    late = lifecycle.nack(head(), held, NOW + 50, "L", 1, delay=0)
    assert isinstance(late, Status)
    assert delivered(late, NOW + 50).failures == 1


# Dead letters


def test_bury_by_hand_keeps_everything_else() -> None:
    before = example(State.LEASED)
    after = lifecycle.bury(before, NOW, "not wanted")
    assert after.dead == DeadLetter("not wanted", NOW)
    assert (after.attempts, after.failures, after.token) == (before.attempts, before.failures, before.token)
    assert after.last_error == "earlier"
    assert lifecycle.bury(before, NOW, "why", error="newer").last_error == "newer"


def test_redrive_gives_a_new_budget_and_life() -> None:
    dead = msgspec.structs.replace(example(State.DEAD), expires_at=NOW - 10)
    later = NOW + 5000
    after = lifecycle.redrive(head(ttl=60_000), dead, later)
    assert (after.attempts, after.failures) == (0, 0)
    assert after.token == 7
    assert (after.visible_at, after.expires_at, after.updated_at) == (later, later + 60_000, later)
    assert after.dead is None
    assert after.last_error == "earlier"
    again = delivered(after, later)
    assert again.token == 8
    assert lifecycle.redrive(head(), example(State.DEAD), later).expires_at is None


@pytest.mark.parametrize(
    ("state", "may"),
    [(State.READY, True), (State.DELAYED, True), (State.LAPSED, True), (State.DEAD, True), (State.LEASED, False)],
    ids=name,
)
def test_purge_spares_what_is_held(state: State, may: bool) -> None:
    assert lifecycle.deletable(example(state), NOW) is may


def test_annotate_changes_the_error_alone() -> None:
    for state in LIVE_STATES:
        before = example(state)
        after = lifecycle.annotate(before, NOW, "noted")
        assert after == msgspec.structs.replace(before, updated_at=NOW, last_error="noted")


# The clock goes back


def test_a_clock_that_goes_back_delays_and_loses_nothing() -> None:
    held = delivered(status(), visibility=1000)
    earlier = NOW - 60_000
    assert lifecycle.deliver(head(), held, earlier, visibility=None, lease_id="X") == Wait(NOW + 1000)
    assert lifecycle.state_of(held, earlier) is State.LEASED
    renewed = lifecycle.extend(held, earlier, "L", 1, extension=5000)
    assert renewed.lease == Lease("L", 1, earlier + 5000)
    back = lifecycle.nack(head(), held, earlier, "L", 1, delay=100)
    assert isinstance(back, Status)
    assert (back.visible_at, back.failures) == (earlier + 100, 1)
    lifecycle.ack(held, "L", 1)


def test_a_lapsed_lease_may_run_again_when_the_clock_goes_back() -> None:
    held = delivered(status(), visibility=1000)
    assert lifecycle.state_of(held, NOW + 1000) is State.LAPSED
    assert lifecycle.state_of(held, NOW + 999) is State.LEASED


# What always holds


@given(
    st.sampled_from(LIVE_STATES),
    st.integers(-2000, 2000),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.integers(-1000, 1000)),
)
def test_hand_out_gives_exactly_one_verdict(
    state: State, shift: int, budget: int, bury_exhausted: bool, bury_expired: bool, ttl: int | None
) -> None:
    before = msgspec.structs.replace(example(state), expires_at=None if ttl is None else NOW + ttl)
    now = NOW + shift
    options: dict[str, Any] = {"bury_exhausted": bury_exhausted, "bury_expired": bury_expired}
    at = lifecycle.state_of(before, now)
    if at is State.DEAD:
        with pytest.raises(NotPossible):
            lifecycle.deliver(head(max_attempts=budget), before, now, visibility=10, lease_id="L", **options)
        return
    verdict = lifecycle.deliver(head(max_attempts=budget), before, now, visibility=10, lease_id="L", **options)
    spent = bool(budget) and before.failures + (at is State.LAPSED) >= budget
    if at in {State.LEASED, State.DELAYED}:
        assert verdict == Wait(before.visible_at)
    elif lifecycle.expired(before, now):
        assert isinstance(verdict, Bury if bury_expired else Discard)
    elif spent:
        assert isinstance(verdict, Bury if bury_exhausted else Discard)
    else:
        assert isinstance(verdict, Deliver)
        assert verdict.status.token == before.token + 1


class OneMessage(RuleBasedStateMachine):
    """One message through any history, with a clock that moves both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.head = head(max_attempts=3, ttl=None)
        self.status: Status = lifecycle.new_status(NOW, 0, None)
        self.tokens: list[int] = []
        self.failures_seen = 0

    def become(self, after: Status, *, reset: bool = False) -> None:
        before = self.status
        if not reset:
            assert after.attempts >= before.attempts
            assert after.failures >= before.failures
        assert after.token >= before.token
        assert after.expires_at == before.expires_at
        self.status = after

    @property
    def state(self) -> State:
        return lifecycle.state_of(self.status, self.now)

    @rule(step=st.integers(-50_000, 100_000))
    def time_moves(self, step: int) -> None:
        self.now += step

    @precondition(lambda self: self.status.dead is None)
    @rule(visibility=st.one_of(st.none(), st.integers(1, 60_000)))
    def deliver(self, visibility: int | None) -> None:
        state = self.state
        verdict = lifecycle.deliver(
            self.head, self.status, self.now, visibility=visibility, lease_id=f"lease-{self.status.token + 1}"
        )
        if isinstance(verdict, Wait):
            assert verdict.due > self.now
            assert state in {State.LEASED, State.DELAYED}
        elif isinstance(verdict, Deliver):
            assert state in {State.READY, State.LAPSED}
            self.become(verdict.status)
            assert verdict.status.lease is not None
            assert all(verdict.status.lease.token > token for token in self.tokens)
            self.tokens.append(verdict.status.lease.token)
        else:
            assert isinstance(verdict, Bury)
            self.become(verdict.status)

    @precondition(lambda self: self.status.lease is not None)
    @rule(delay=st.integers(0, 10_000), how=st.sampled_from(["nack", "defer", "extend"]))
    def holder_answers(self, delay: int, how: str) -> None:
        lease = self.status.lease
        assert lease is not None
        failures = self.status.failures
        if how == "nack":
            after = lifecycle.nack(self.head, self.status, self.now, lease.id, lease.token, delay=delay)
            assert not isinstance(after, Discard)
            self.become(after.status if isinstance(after, Bury) else after)
            assert self.status.failures == failures + 1
        elif how == "defer":
            self.become(lifecycle.defer(self.status, self.now, lease.id, lease.token, delay=delay))
            assert self.status.failures == failures
        else:
            extended = lifecycle.extend(self.status, self.now, lease.id, lease.token, extension=delay + 1)
            self.become(extended)
            assert self.status.failures == failures

    @rule(which=st.integers(0, 20))
    def former_holder_answers(self, which: int) -> None:
        current = None if self.status.lease is None else self.status.lease.token
        stale = [token for token in self.tokens if token != current]
        if not stale:
            return
        token = stale[which % len(stale)]
        for answer in ANSWERS.values():
            with pytest.raises(LeaseLost):
                answer(self.status, f"lease-{token}", token)

    @precondition(lambda self: self.status.dead is not None)
    @rule()
    def redrive(self) -> None:
        self.become(lifecycle.redrive(self.head, self.status, self.now), reset=True)
        assert (self.status.attempts, self.status.failures) == (0, 0)
        assert self.state is State.READY

    @invariant()
    def holds(self) -> None:
        current = self.status
        assert current.failures <= self.head.max_attempts
        assert current.failures <= current.attempts
        assert (current.failures == self.head.max_attempts) <= (current.dead is not None)
        assert current.lease is None or current.dead is None
        if current.lease is not None:
            assert (current.lease.until, current.lease.token) == (current.visible_at, current.token)
        assert len(set(self.tokens)) == len(self.tokens)


TestOneMessage = OneMessage.TestCase


@pytest.mark.parametrize("state", [State.LEASED, State.LAPSED])
def test_no_answer_counts_as_a_delivery(state: State) -> None:
    """Said apart from the table, which could not contradict itself."""
    before = example(state)
    for after in (
        lifecycle.nack(head(max_attempts=0), before, NOW, "lease-7", 7, delay=0),
        lifecycle.defer(before, NOW, "lease-7", 7, delay=0),
        lifecycle.extend(before, NOW, "lease-7", 7, extension=1),
        lifecycle.bury(before, NOW, "why"),
    ):
        assert isinstance(after, Status)
        assert (after.attempts, after.token) == (before.attempts, before.token)


def test_verdicts_cannot_be_changed() -> None:
    for verdict, field in ((Deliver(status()), "status"), (Bury(status()), "status"), (Wait(1), "due")):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(verdict, field, None)
    with pytest.raises(AttributeError, match="immutable"):
        Discard("why").reason = "another"  # type: ignore[misc]

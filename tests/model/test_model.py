"""What was acknowledged is never lost, what was acked never comes back, a stale lease changes nothing: tried with
random steps on two ponds that share a store, beside a model.

MILLPOND_MODEL_EXAMPLES sets how many sequences of steps are tried on each store, with fresh chance; without it a fixed
set, the same in each run. What fails is told as it was found; MILLPOND_MODEL_SHRINK=1 looks for the shortest sequence
that fails, which takes minutes.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.model.faulty import FaultyDeletingMachine, FaultyObjectsMachine
from tests.model.machine import (
    CandidatesMachine,
    DeletingObjectsMachine,
    EncryptedMemoryMachine,
    EncryptedObjectsMachine,
    EncryptedSqliteMachine,
    Machine,
    ObjectsMachine,
    SqliteMachine,
)

SHRINK = [Phase.shrink] if os.environ.get("MILLPOND_MODEL_SHRINK") else []
LONG = int(os.environ.get("MILLPOND_MODEL_EXAMPLES", "0"))


def _settings(examples: int) -> settings:
    return settings(
        max_examples=LONG or examples,
        stateful_step_count=60 if LONG else 40,
        derandomize=not LONG,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, *SHRINK],
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize(
    ("machine", "examples"),
    [
        (Machine, 70),
        (CandidatesMachine, 50),
        (EncryptedMemoryMachine, 25),
        (SqliteMachine, 40),
        (EncryptedSqliteMachine, 10),
        (ObjectsMachine, 40),
        (DeletingObjectsMachine, 40),
        (EncryptedObjectsMachine, 10),
        (FaultyObjectsMachine, 8),
        (FaultyDeletingMachine, 8),
    ],
    ids=[
        "memory",
        "memory-candidates",
        "memory-encrypted",
        "sqlite",
        "sqlite-encrypted",
        "objects-fenced",
        "objects",
        "objects-encrypted",
        "objects-faulty",
        "objects-faulty-deleting",
    ],
)
def test_queue_does_what_its_model_does(machine: type[Machine], examples: int) -> None:
    run_state_machine_as_test(machine, settings=_settings(examples))
    assert issubclass(machine, Machine)

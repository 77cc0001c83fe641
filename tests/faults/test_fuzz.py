"""Damaged input is refused or read correctly. `python -m benchmarks fuzz` tries millions."""

import pytest
from memkv_testbed.fuzz import TARGETS, Target, fuzz
from memkv_testbed.fuzz_plans import PLAN_TARGETS

INPUTS = 20_000


@pytest.mark.parametrize("target", [*TARGETS, *PLAN_TARGETS], ids=lambda target: target.name)
def test_damaged_input(target: Target) -> None:
    outcome = fuzz(target, INPUTS)
    assert 0 < outcome.taken < outcome.inputs

"""Speed estimates match observations, stay plausible and expire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.engine.speed import MAX_HALF_LIFE, MIN_HALF_LIFE, TierSpeed
from memkv_sglang.time_model import TimeModel

WORK = st.floats(1, 1e4)
COST = st.floats(1e-6, 10)
OBSERVATION = st.tuples(WORK, WORK, st.floats(0, 100))


@given(st.lists(st.tuples(WORK, WORK), min_size=2, max_size=12), COST, COST)
def test_linear_cost_is_predicted(work: list[tuple[float, float]], a: float, b: float) -> None:
    model = TimeModel()
    for x, y in [*work, (1, 1000), (1000, 1)]:  # the last two make x and y independent
        model.observe(x, y, a * x + b * y)
    assert model.predict(70, 90) == pytest.approx(a * 70 + b * 90, rel=1e-3)


@given(st.lists(OBSERVATION, min_size=1, max_size=20), OBSERVATION)
def test_more_work_never_takes_less_time(
    seen: list[tuple[float, float, float]], more: tuple[float, float, float]
) -> None:
    model = TimeModel()
    for observation in seen:
        model.observe(*observation)
    little, much = model.predict(10, 10), model.predict(10 + more[0], 10 + more[1])
    assert little is not None
    assert much is not None
    assert 0 <= little <= much


@given(WORK, WORK, st.floats(0.001, 100), st.floats(1, 50))
def test_one_observation_is_not_extrapolated(
    x: float, y: float, seconds: float, times: float
) -> None:
    """It is unknown whether calls or bytes took the time, so the cheaper interpretation applies."""
    model = TimeModel()
    model.observe(x, y, seconds)
    assert model.predict(x, y) == pytest.approx(seconds)
    assert model.predict(x, times * y) == pytest.approx(seconds)
    assert model.predict(x, y / times) == pytest.approx(seconds / times)


@given(COST, st.floats(0.05, 20))
def test_change_of_speed_is_learnt_quickly(cost: float, change: float) -> None:
    model = TimeModel()
    for size in (10, 20, 30) * 20:
        model.observe(1, size, cost * size)
    for size in (10, 20, 30) * 10:
        model.observe(1, size, change * cost * size)
    assert model.predict(1, 20) == pytest.approx(change * cost * 20, rel=0.05 * max(1, 1 / change))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def observed(clock: Clock, speed: TierSpeed, size: int, seconds: float) -> None:
    speed.begin(size)
    clock.now += seconds
    speed.end(size, size)


def test_unknown_speed_estimates_zero() -> None:
    assert TierSpeed().seconds(8, 1 << 30) == 0


def test_latency_and_bandwidth_are_separated() -> None:
    clock = Clock()
    speed = TierSpeed(clock)
    for size in (1_000, 50_000, 100_000):
        observed(clock, speed, size, 0.1 + size / 1e6)
    assert speed.seconds(1, 10_000_000) == pytest.approx(10.1)
    assert speed.seconds(100, 1_000) == pytest.approx(10.001)


def test_load_in_flight_adds_to_the_estimate() -> None:
    clock = Clock()
    speed = TierSpeed(clock)
    for size in (1_000, 100_000):
        observed(clock, speed, size, 0.1 + size / 1e6)
    speed.begin(3_000_000)
    assert speed.seconds(1, 1_000_000) == pytest.approx(4.1)


def test_concurrent_loads_share_the_medium() -> None:
    """Four concurrent loads that take four times as long are as fast as four in sequence."""
    clock = Clock()
    speed = TierSpeed(clock)
    for size in (1_000_000, 2_000_000) * 5:
        for _ in range(4):
            speed.begin(size)
        clock.now += 4 * size / 1e6
        for _ in range(4):
            speed.end(size, size)
    assert speed.seconds(1, 10_000_000) == pytest.approx(10)


def test_loads_without_idle_gaps_are_measured() -> None:
    clock = Clock()
    speed = TierSpeed(clock)
    speed.begin(500_000)
    for _ in range(20):
        clock.now += 0.5
        speed.begin(500_000)
        speed.end(500_000, 500_000)
    known = speed.seconds(2, 500_000)
    assert known == pytest.approx(1, rel=0.5), "half a million bytes, and as many in flight"


def test_slow_estimate_decays() -> None:
    clock = Clock()
    speed = TierSpeed(clock)
    observed(clock, speed, 1_000_000, 64)
    clock.now += 6 * MIN_HALF_LIFE
    assert speed.seconds(1, 1_000_000) == pytest.approx(1)
    # One caller measures again; until it has finished, others get the old estimate.
    speed.begin(1_000_000)
    assert speed.seconds(1, 1_000_000) == pytest.approx(64)
    clock.now += 0.5
    speed.end(1_000_000, 1_000_000)
    assert speed.seconds(1, 1_000_000) == pytest.approx(0.5)


def test_confirmed_estimates_decay_more_slowly() -> None:
    """A tier that stays slow is tried less and less often, and normally again as soon as it is
    fast.
    """
    clock = Clock()
    speed = TierSpeed(clock)

    def trusted() -> float:
        """Return the time until the predicted load time has halved."""
        known, begin = speed.seconds(1, 1_000_000), clock.now
        while speed.seconds(1, 1_000_000) > known / 2:
            clock.now += 1
        return clock.now - begin

    waits = []
    for _ in range(10):
        observed(clock, speed, 1_000_000, 64)
        waits.append(trusted())
    assert waits[0] == pytest.approx(MIN_HALF_LIFE, abs=1)
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(MAX_HALF_LIFE, abs=1)
    observed(clock, speed, 1_000_000, 1)
    assert trusted() == pytest.approx(MIN_HALF_LIFE, abs=1)


def test_loads_without_data_do_not_affect_the_estimate() -> None:
    """Neither missing pages nor a server that is down say anything about the speed."""
    clock = Clock()
    speed = TierSpeed(clock)
    observed(clock, speed, 1_000_000, 10)
    speed.begin(1_000_000)
    speed.end(1_000_000, 0)
    assert speed.seconds(1, 1_000_000) == pytest.approx(10)


def test_timed_out_load_is_extrapolated() -> None:
    """On a link that has become slow no call succeeds; failed calls must not make it look fast."""
    clock = Clock()
    speed = TierSpeed(clock)
    for size in (10_000_000, 60_000_000):
        observed(clock, speed, size, size / 20e6)
    speed.begin(60_000_000)
    clock.now += 5
    speed.end(60_000_000, 3_000_000, cut_short=True)
    assert speed.seconds(1, 60_000_000) == pytest.approx(100)

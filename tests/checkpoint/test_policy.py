"""When a checkpoint is due: a pure object with its clock."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from ktrdr_async.checkpoint.policy import CheckpointPolicy
from ktrdr_async.errors import ParameterError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_defaults() -> None:
    policy = CheckpointPolicy()
    assert (policy.unit_interval, policy.time_interval_seconds, policy.max_overhead) == (10_000, 300, 0.05)


@pytest.mark.parametrize("overhead", [None, 0.05])
def test_due_after_n_bars(clock: Clock, overhead: float | None) -> None:
    policy = CheckpointPolicy(100, 300, overhead, clock)
    due = [bar for bar in range(99) if policy.should_checkpoint(bar)]
    assert due == []
    assert policy.should_checkpoint(99)  # bars 0..99 are a hundred
    assert policy.should_checkpoint(150)  # and stays due until it is recorded
    policy.record_checkpoint(150)
    assert not policy.should_checkpoint(249)
    assert policy.should_checkpoint(250)


def test_due_after_m_seconds_of_monotonic_time(clock: Clock) -> None:
    policy = CheckpointPolicy(10_000, 300, None, clock)
    clock.now += 299.9
    assert not policy.should_checkpoint(5)
    clock.now += 0.1
    assert policy.should_checkpoint(5)
    policy.record_checkpoint(5, 2.0)
    assert not policy.should_checkpoint(6)


def test_a_run_that_starts_in_the_middle_counts_from_there(clock: Clock) -> None:
    policy = CheckpointPolicy(100, 300, None, clock)
    clock.now += 1000
    policy.start(123_456)
    assert not policy.should_checkpoint(123_456)
    assert not policy.should_checkpoint(123_555)
    assert policy.should_checkpoint(123_556)
    other = CheckpointPolicy(100, 300, None, clock)
    other.record_checkpoint(123_456)
    assert not other.should_checkpoint(123_555)
    assert other.should_checkpoint(123_556)


def test_force_says_yes_always(clock: Clock) -> None:
    policy = CheckpointPolicy(100, 300, 0.05, clock)
    policy.record_checkpoint(10, 60.0)
    assert policy.should_checkpoint(10, force=True)


@pytest.mark.parametrize("overhead", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("save", [0.0005, 0.01, 3.0])
def test_saves_take_no_more_than_their_share(clock: Clock, overhead: float, save: float) -> None:
    """At 50 M bars a second 10,000 bars are 0.2 ms: a save each would be most of the run."""
    policy = CheckpointPolicy(10_000, 300, overhead, clock)
    spent, lost, last = 0.0, 0.0, clock.now
    bar, began = -1, clock.now
    for _ in range(20_000):
        bar += 100_000
        clock.now += save / 50
        lost = max(lost, clock.now - last)
        if policy.should_checkpoint(bar):
            clock.now += save
            spent += save
            policy.record_checkpoint(bar, save)
            last = clock.now
    assert spent > save
    assert spent - save <= overhead * (clock.now - began)
    assert lost <= max(save / 50, save / overhead) + save / 49


def test_what_is_expected_to_take_long_waits_the_first_save_too(clock: Clock) -> None:
    policy = CheckpointPolicy(100, 300, 0.05, clock)
    policy.expect(0.01)
    assert not policy.should_checkpoint(99)
    clock.now += 0.19
    policy.expect(0.01)
    assert not policy.should_checkpoint(199)
    clock.now += 0.02
    policy.expect(0.01)
    assert policy.should_checkpoint(299)
    policy.expect(0.02)
    assert not policy.should_checkpoint(299)
    policy.record_checkpoint(299, 0.05)  # it took longer: that counts as well
    clock.now += 0.9
    policy.expect(0.01)
    assert not policy.should_checkpoint(399)
    clock.now += 0.2
    policy.expect(0.01)
    assert policy.should_checkpoint(399)


def test_after_its_time_a_save_is_due_whatever_it_is_expected_to_take(clock: Clock) -> None:
    policy = CheckpointPolicy(100, 300, 0.05, clock)
    clock.now += 299
    policy.expect(100.0)
    assert not policy.should_checkpoint(10_000)
    clock.now += 1
    policy.expect(100.0)
    assert policy.should_checkpoint(10_000)
    plain = CheckpointPolicy(100, 300, None, clock)
    plain.expect(100.0)
    assert plain.should_checkpoint(99)


@pytest.mark.parametrize("dear", [0.0, 1e-6, 4e-6, 6e-6, 1e-4])
def test_saves_whose_cost_grows_with_what_is_new_keep_the_share(clock: Clock, dear: float) -> None:
    """`dear`: seconds that saving a bar takes; computing it takes 0.1 ms. Above the share none is due."""
    policy = CheckpointPolicy(10_000, 1e9, 0.05, clock)
    spent, last, began = 0.0, -1, clock.now
    for bar in range(99, 3_000_000, 100):
        clock.now += 0.01
        takes = 0.005 + dear * (bar - last)
        policy.expect(takes)
        if policy.should_checkpoint(bar):
            clock.now += takes
            spent += takes
            policy.record_checkpoint(bar, takes)
            last = bar
    assert spent <= 0.05 * (clock.now - began)
    assert (spent > 0) == (dear < 5e-6)


def test_the_plain_rule_saves_however_long_it_takes(clock: Clock) -> None:
    policy = CheckpointPolicy(100, 300, None, clock)
    policy.record_checkpoint(99, 1000.0)
    assert policy.should_checkpoint(199)


def test_the_share_holds_the_time_rule_back_too(clock: Clock) -> None:
    policy = CheckpointPolicy(10_000, 10, 0.1, clock)
    policy.record_checkpoint(99, 5.0)
    clock.now += 49
    assert not policy.should_checkpoint(100)
    clock.now += 1
    assert policy.should_checkpoint(100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit_interval": 0}, {"unit_interval": -5}, {"unit_interval": 1.5}, {"unit_interval": True},
        {"time_interval_seconds": 0}, {"time_interval_seconds": math.nan}, {"time_interval_seconds": -1},
        {"max_overhead": 0}, {"max_overhead": 1.1}, {"max_overhead": -0.1}, {"max_overhead": math.nan},
    ],
)  # fmt: skip
def test_arguments_are_validated(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        CheckpointPolicy(**wrong)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_recorded_durations_are_validated(seconds: float) -> None:
    with pytest.raises(ParameterError):
        CheckpointPolicy().record_checkpoint(1, seconds)


def test_asking_is_cheap() -> None:
    policy = CheckpointPolicy()
    best = math.inf
    for _ in range(20):
        started = time.perf_counter()
        for bar in range(1_000):
            policy.should_checkpoint(bar)
        best = min(best, time.perf_counter() - started)
    assert best / 1_000 < 5e-6  # a hundred bars of compiled code are 2 us; of Python code 100

"""The meter of a training's speed, with a clock that the test winds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from latentclip.meter import WINDOW_SECONDS, Meter, peak_memory


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def batches(clock: Clock, seconds: float) -> Iterator[int]:
    while True:
        clock.now += seconds
        yield 0


def steps(meter: Meter, clock: Clock, count: int, wait: float, work: float) -> None:
    source = batches(clock, wait)
    for _ in range(count):
        meter.next(source)
        clock.now += work
        meter.step()


def test_nothing_is_claimed_before_the_first_step() -> None:
    meter = Meter(Clock())
    assert (meter.steps_per_second, meter.data_wait) == (0, 0)


def test_speed_and_waiting_are_those_of_the_window() -> None:
    clock = Clock()
    meter = Meter(clock)
    steps(meter, clock, 10, wait=3.0, work=1.0)
    assert meter.steps_per_second == pytest.approx(1 / 4)
    assert meter.data_wait == pytest.approx(3 / 4)
    steps(meter, clock, int(WINDOW_SECONDS / 0.5), wait=0.125, work=0.375)
    assert meter.steps_per_second == pytest.approx(2)
    assert meter.data_wait == pytest.approx(1 / 4)


def test_a_step_that_is_longer_than_the_window_is_shown_alone() -> None:
    clock = Clock()
    meter = Meter(clock)
    steps(meter, clock, 50, wait=0.0, work=0.1)
    steps(meter, clock, 1, wait=0.0, work=2 * WINDOW_SECONDS)
    assert meter.steps_per_second == pytest.approx(1 / (2 * WINDOW_SECONDS))


def test_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = bytearray(b"x") * (before + 2**26)
    assert peak_memory(torch.device("cpu")) > len(held)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda", 0)
    held = torch.zeros(2**26, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= held.numel()

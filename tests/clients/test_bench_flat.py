"""What the memory benchmark calls flat, on rows that were made up."""

import pathlib
import random
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "bench"))

import flat  # noqa: E402

MIB = 1 << 20
# As in a run of ten minutes: 49 samples after the warm-up, 1,740 requests.
REQUESTS = [36 * at for at in range(49)]


def judged(row):
    return flat.judge(REQUESTS, row, step=16 * MIB, hourly=8 * MIB)


def noisy(leak, noise=3 * MIB, seed=1):
    """200 MiB, and so many bytes more with every request."""
    dice = random.Random(seed)
    return [200 * MIB + leak * done + dice.gauss(0, noise) for done in REQUESTS]


def test_a_line_has_its_slope_whatever_lies_beside_it():
    xs = [0, 10, 20, 30, 40, 50, 60, 70]
    assert flat.slope(xs, [3 * x + 5 for x in xs]) == 3
    assert flat.slope(xs, [5, 1000, 65, 95, 125, -400, 185, 215]) == 3
    # Nothing was done between two samples, or at all.
    assert flat.slope([0, 0, 10], [1, 1, 21]) == 2
    assert flat.slope([4, 4], [1, 9]) == 0


def test_180_mebibytes_in_an_hour_are_not_flat():
    # 3 MiB a minute, for eight minutes. The middles of the thirds are 16 MiB apart.
    row = [200 * MIB + at * 24 * MIB / 48 for at in range(49)]
    found = judged(row)
    assert found["last"] - found["first"] <= 16.5 * MIB
    assert not found["flat"] and found["hourly"] == pytest.approx(24 * MIB / 1.728)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_flat_and_ten_kibibytes_a_request_are_not(seed):
    assert judged(noisy(0, seed=seed))["flat"]
    assert judged(noisy(-10_000, seed=seed))["flat"]
    assert not judged(noisy(12_000, seed=seed))["flat"]


def test_a_peak_is_flat_and_a_jump_that_stays_is_not():
    peak = noisy(0)
    peak[20] += 90 * MIB
    assert judged(peak)["flat"] and judged(peak)["highest"] > 280 * MIB
    jump = [value + (20 * MIB if at > 36 else 0) for at, value in enumerate(noisy(0))]
    assert not judged(jump)["flat"]

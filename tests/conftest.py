"""Fixtures: servers that leave nothing behind."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "clients"))

import harness  # noqa: E402


def pytest_configure(config):
    if not (harness.SWAPD and harness.MLXWORKER and harness.MLX_BENCH):
        raise pytest.UsageError("SWAPD, MLXWORKER and MLX_BENCH name the programs to test; tests/run sets them")
    # Ended from outside, the tests still end what they have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One swapd with the demonstration model, for all tests that leave it as it is."""
    swapd = harness.Swapd(tmp_path_factory.mktemp("server"), {"models": {"demo": harness.demo(aliases=["tiny"])}})
    try:
        yield swapd
        assert swapd.stop() == 0, swapd.written()
        assert not swapd.left()
    finally:
        swapd.close()


@pytest.fixture
def start_swapd(tmp_path):
    """Starts swapd with a registry of the test's own; what the test has not ended itself must end properly."""
    started = []

    def start(registry, env=None):
        directory = tmp_path / f"swapd{len(started)}"
        directory.mkdir()
        started.append(harness.Swapd(directory, registry, env))
        return started[-1]

    try:
        yield start
        for swapd in started:
            if swapd.process.poll() is None:
                assert swapd.stop() == 0, swapd.written()
            harness.eventually(lambda: not swapd.left(), f"processes left behind: {swapd.left()}", 2)
    finally:
        for swapd in started:
            swapd.close()


@pytest.fixture
def launch(tmp_path):
    """Starts any program; ended with the test."""
    started = []

    def start(kind, command, env=None):
        started.append(kind(command, tmp_path, env))
        return started[-1]

    try:
        yield start
    finally:
        for program in started:
            program.close()

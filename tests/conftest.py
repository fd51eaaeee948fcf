"""What all tests share: the device that they run on."""

from __future__ import annotations

import signal

import pytest

from nitinol.runtime import NAMES, set_device

# A shell starts programs in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C would
# wait for an interrupt that cannot come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=NAMES, help="where kernels, arrays and models run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: about the CPU target or driver itself; skipped with another --device")
    config.addinivalue_line("markers", "float64: needs 64-bit floats, which Apple GPUs do not have")
    set_device(config.getoption("device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("device")
    if name != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason=f"about the CPU, and these tests run on {name}"))
            if item.get_closest_marker("float64") and name == "metal":
                item.add_marker(pytest.mark.skip(reason="Apple GPUs have no 64-bit floats"))


@pytest.fixture
def device_name(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")

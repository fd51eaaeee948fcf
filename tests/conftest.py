"""What all tests share: the device that they run on."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import sys
from importlib import metadata
from typing import Any

import pytest

import nitinol
from nitinol.runtime import NAMES, get_device, set_device
from nitinol.runtime.device import DeviceError

# A shell starts programs in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C would
# wait for an interrupt that cannot come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="of sampled tests all cases, not some for each run")
    parser.addoption("--device", default="cpu", choices=NAMES, help="where kernels, arrays and models run")


# Files whose tests run on any device; all others are about something else, or about one device.
ANY_DEVICE = ("test_array.py", "test_compile.py", "test_frontend.py", "test_kernels_*.py", "test_training.py",
              "test_triton_kernels.py", "transform/test_*.py")  # fmt: skip
# On a Mac `import Metal` is the real thing, so what tests the software device itself is left out.
SOFTWARE = ["softmetal", "runtime/test_metal_driver.py", "compiler/test_metal_target.py",
            "models/test_metal_traffic.py", "compiler/test_metal_validation.py"]  # fmt: skip
MISSING = pytest.StashKey[str]()  # why the device is not there; all tests are skipped then
collect_ignore = SOFTWARE if sys.platform == "darwin" else []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sampled(n): of the test's cases so many, others in each run (see --all-cases)")
    config.addinivalue_line("markers", "cpu: about the CPU target or driver itself; skipped with another --device")
    config.addinivalue_line("markers", "float64: needs 64-bit floats, which Apple GPUs do not have")
    config.addinivalue_line("markers", "metal: about the Metal target, driver or software device (set by file name)")
    try:
        set_device(config.getoption("device"))
    except DeviceError as error:
        config.stash[MISSING] = str(error)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With another device than the CPU, what runs is the tests for any device and those about that device."""
    name = config.getoption("device")
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        metal = item.path.name.startswith("test_metal_") or item.path.parent.name == "softmetal"
        if metal:
            item.add_marker("metal")
        if name == "cpu":
            chosen.append(item)
            continue
        any_device = any(item.path.match(pattern) for pattern in ANY_DEVICE)
        about_it = metal if name == "metal" else item.path.name.startswith(f"test_{name}_")
        # The interpreter is the same wherever its results go.
        interpreted = "interpreter" in getattr(getattr(item, "callspec", None), "params", {}).values()
        (chosen if about_it or (any_device and not interpreted) else others).append(item)
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason=f"about the CPU, and these tests run on {name}"))
        if item.get_closest_marker("float64") and name == "metal":
            item.add_marker(pytest.mark.skip(reason="Apple GPUs have no 64-bit floats"))
        if MISSING in config.stash:
            item.add_marker(pytest.mark.skip(reason=config.stash[MISSING]))
    if not config.getoption("all_cases"):
        left = sampled_out(chosen)
        chosen, others = [i for i in chosen if i not in left], [*others, *left]
    items[:] = chosen
    if others:
        config.hook.pytest_deselected(items=others)


def sampled_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of tests marked `sampled` that this run leaves out: large kernels compile for seconds each. All workers
    of a run choose the same ones."""
    choose = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for cases in tests.values():
        (count,) = cases[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        left.update(choose.sample(cases, max(0, len(cases) - count)))
    return left


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What a report of a run on a GPU should say; pytest's closing line comes after it."""
    if config.getoption("device") != "cpu" and not hasattr(config, "workerinput"):
        if MISSING in config.stash:
            terminalreporter.section("no test has run", sep="-")
            terminalreporter.write_line(config.stash[MISSING])
            return
        terminalreporter.section("where this ran: please report these lines and the next ones", sep="-")
        terminalreporter.write_line(f"device    {get_device().description}")
        terminalreporter.write_line(f"system    {platform.platform()}, {platform.machine()}")
        versions = [f"Python {platform.python_version()}", f"Nitinol {nitinol.__version__}"]
        for package in ("pyobjc-framework-Metal", "cuda-bindings", "nvidia-cuda-nvrtc-cu12", "ziglang", "numpy"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions.append(f"{package} {metadata.version(package)}")
        terminalreporter.write_line(f"versions  {', '.join(versions)}")


@pytest.fixture
def device_name(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")

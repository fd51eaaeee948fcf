"""Ctrl-C at any moment of an evaluation: an update in place happens once, results are right when they are asked for
again, and the device goes on working."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

HEAD = """
import random, signal
import numpy as np
import nitinol

class Interrupt(BaseException):
    pass

class Timer:
    '''Raises Interrupt in this thread at random moments while armed: once, or again and again.'''

    def __init__(self, most, again=0.0):
        self.armed, self.most, self.again, self.raised = False, most, again, 0
        signal.signal(signal.SIGALRM, self.ring)

    def ring(self, *_):
        if self.armed:
            self.raised += 1
            raise Interrupt

    def evaluate(self, *arrays):
        return self.call(nitinol.evaluate, *arrays)

    def call(self, function, *arguments):
        '''Whether it came to its end.'''
        try:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, self.most), self.again)
                function(*arguments)
            finally:
                self.armed = False  # no call: nothing can come in between
        except Interrupt:
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return True

seed = int.from_bytes(np.random.bytes(4), "little")
print("seed", seed)
random.seed(seed)
"""


def run(program: str) -> str:
    text = HEAD + textwrap.dedent(program)
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize("size", [10, 100_000])
def test_an_interrupted_update_happens_once(size: int) -> None:
    """Updates are counted in place; the interrupts fall between recording and noting, at all places over the rounds."""
    run(f"""
    x = nitinol.zeros({size}).copy()
    x.evaluate()
    timer = Timer(most=150e-6)
    for count in range(1, 3001):
        y = x * 2  # the old contents
        x[:] = x + 1
        z = x + 5
        timer.evaluate(x, z)
        if random.random() < 0.3:
            assert (z.numpy() == count + 5).all(), (count, z)
            assert (y.numpy() == 2 * (count - 1)).all(), (count, y)
            assert (x.numpy() == count).all(), (count, x)
    assert (x.numpy() == 3000).all(), x
    print(timer.raised)
    assert timer.raised > 200, timer.raised
    assert nitinol.get_device().counters.bytes_in_use < 64e6
    """)


def test_interrupts_that_keep_coming() -> None:
    """Also into what an interrupted evaluation leaves to the next one."""
    run("""
    x = nitinol.zeros(1000).copy()
    x.evaluate()
    timer = Timer(most=300e-6, again=250e-6)
    for count in range(1, 1501):
        x[:] = x + 1
        y = x.sum()
        if count == 1:
            y.evaluate()  # compiling takes longer than any pause between two interrupts
        for _ in range(1000):
            if timer.evaluate(x, y):
                break
        else:
            raise AssertionError("it never ends")
        assert y.item() == count * 1000, (count, y)
    assert (x.numpy() == 1500).all()
    print(timer.raised)
    assert timer.raised > 100, timer.raised
    """)


def test_a_failed_run_keeps_its_updates_and_fails_again() -> None:
    """An error of a kernel is told whenever its result is asked for, but updates beside it are not repeated."""
    run("""
    from nitinol.runtime.device import DeviceError
    x = nitinol.zeros(4).copy()
    x.evaluate()
    x[:] = x + 1
    wrong = nitinol.take(nitinol.array([1.0, 2.0]), nitinol.array([5]), 0)
    for _ in range(3):
        try:
            nitinol.evaluate(x, wrong)
        except DeviceError as error:
            assert "out of range" in str(error)
        else:
            raise AssertionError("no error")
    assert (x.numpy() == 1).all(), x
    """)


def test_compiled_functions_and_launches_that_are_interrupted(tmp_path: Path) -> None:
    """Each runs at most once a call, and the next one is right."""
    (tmp_path / "kernels.py").write_text(textwrap.dedent("""
    import nitinol
    import nitinol.language as tl

    @nitinol.jit
    def count(x, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + 1)
    """))
    run(f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    from kernels import count
    x, launched = (nitinol.zeros(8).copy() for _ in range(2))
    nitinol.evaluate(x, launched)

    @nitinol.compile
    def step(y):
        x[:] = x + 1
        return y * 2 + x

    y = nitinol.array(np.arange(8, dtype=np.float32))
    step(y)
    count[(1,)](launched, 8)
    timer = Timer(most=60e-6)
    for _ in range(3000):
        before, launches = x.numpy()[0], launched.numpy()[0]
        timer.call(step, y)
        timer.call(count[(1,)], launched, 8)
        nitinol.get_device().synchronize()
        assert x.numpy()[0] - before in (0, 1) and launched.numpy()[0] - launches in (0, 1)
    now = x.numpy()
    assert (now == now[0]).all()
    assert np.array_equal(step(y).numpy(), y.numpy() * 2 + now + 1)
    print(timer.raised)
    assert timer.raised > 200, timer.raised
    device = nitinol.get_device()
    device.synchronize()
    assert not device._in_flight
    """)

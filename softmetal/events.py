"""Events, shared events, fences."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from softmetal import objects
from softmetal.objects import Labelled

if TYPE_CHECKING:
    from softmetal.device import Device


class Event(Labelled):
    _protocol = "MTLEvent"

    def __init__(self, device: Device) -> None:
        self._device, self._value = device, 0
        self._changed = threading.Condition()
        self._listeners: list[tuple[int, Callable[..., None]]] = []

    def _signal(self, value: int) -> None:
        with self._changed:
            self._value = max(self._value, value)
            self._changed.notify_all()
            due = [x for x in self._listeners if x[0] <= self._value]
            self._listeners = [x for x in self._listeners if x[0] > self._value]
        for at, block in due:
            block(self, at)

    def _wait(self, value: int, seconds: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._value >= value, seconds)


class SharedEvent(Event):
    _protocol = "MTLSharedEvent"

    def signaledValue(self) -> int:
        return self._value

    def setSignaledValue_(self, value: int) -> None:
        with self._changed:
            self._value = 0
        self._signal(int(value))

    def waitUntilSignaledValue_timeoutMS_(self, value: int, milliseconds: int) -> bool:
        return self._wait(int(value), min(int(milliseconds) / 1000, 1e6))

    def notifyListener_atValue_block_(self, listener: Any, value: int, block: Callable[..., None]) -> None:
        with self._changed:
            if self._value < value:
                self._listeners.append((int(value), block))
                return
        block(self, value)

    def newSharedEventHandle(self) -> SharedEvent:
        return self


class SharedEventListener(objects.Descriptor):
    """An MTLSharedEventListener; blocks run on the thread that signals."""

    def initWithDispatchQueue_(self, queue: Any) -> SharedEventListener:
        return self

    @classmethod
    def sharedListener(cls) -> SharedEventListener:
        return cls()


class Fence(Labelled):
    _protocol = "MTLFence"

    def __init__(self, device: Device) -> None:
        self._device = device

"""`python -m nitinol` and the `nitinol` script: Ctrl-C gives exit code 130 from the first import to the last moment."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from nitinol.commands import STOPPED


class Stopped(KeyboardInterrupt):
    """Ctrl-C. Not a plain KeyboardInterrupt: where one has passed through exec() of a string, as at every dataclass,
    Python lets the process die of the signal in the end, however well it was handled."""


def main() -> int:
    """The exit code of the command line. Ctrl-C raises while there is work to be put down in order; before, after
    and the second time it ends the process at once. Where the parent ignores it (`nitinol ... &`), so do we."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
        sys.unraisablehook = _unraisable
    from nitinol import cli

    if not ours:
        return cli.main()
    try:
        signal.signal(signal.SIGINT, _raise)
        return cli.main()
    except Stopped:  # outside of what the command line handles itself
        _leave()
    finally:
        signal.signal(signal.SIGINT, _leave)


def _raise(*_: Any) -> NoReturn:
    signal.signal(signal.SIGINT, _leave)  # for who is not patient
    raise Stopped


def _leave(*_: Any) -> NoReturn:
    try:
        os.write(2, b"\nnitinol: stopped\n")
    finally:
        os._exit(STOPPED)


def _unraisable(found: Any) -> None:
    """Raised where Python can only go on, as in a destructor, Ctrl-C would be lost."""
    if issubclass(found.exc_type, Stopped):
        _leave()
    sys.__unraisablehook__(found)


if __name__ == "__main__":
    sys.exit(main())

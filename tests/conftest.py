"""What all tests share."""

from __future__ import annotations

import signal

# A shell starts programs in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C would
# wait for an interrupt that cannot come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

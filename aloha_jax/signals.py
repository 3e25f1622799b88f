"""SIGTERM and Ctrl-C: the first asks a run to save and end, the second leaves at once."""

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which the same signal is no second one. What a process group is sent, by `timeout` or a batch system, comes twice to
# a program under `uv run`, which passes on its own.
ECHO = 0.5


class Interrupted(Exception):
    """A signal ended the run in good order; the message says how to go on.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum

    @property
    def status(self) -> int:
        """Exit status by the shell's convention."""
        return 128 + self.signum


class StopRequest:
    """Context in which SIGINT and SIGTERM set `signum` instead of ending the process; a second, after `ECHO`, ends it at once.

    Python runs signal handlers between two bytecodes of the main thread, which may be inside a compilation or an update for
    minutes. So a thread of its own reads the signals as they arrive, from Python's wake-up file descriptor.

    Attributes:
        signum: the first signal that came, or None.
        nothing_to_save: while True, the first one ends the process at once, too.
        farewell: what is written to stderr when the process is ended at once,
        early_farewell: and what instead while `nothing_to_save`.
    """

    def __init__(self, farewell: str, early_farewell: str | None = None) -> None:
        self.signum: int | None = None
        self.nothing_to_save = True
        self.farewell, self.early_farewell = farewell, early_farewell or farewell

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._old_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._old_descriptor)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _watch(self) -> None:
        came = 0.0
        while byte := self._receiver.recv(1):
            echo = byte[0] == self.signum and time.monotonic() - came < ECHO
            if byte[0] not in SIGNALS or echo:  # the former of another handler
                continue
            if self.nothing_to_save or self.signum is not None:
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
                farewell = self.early_farewell if self.nothing_to_save else self.farewell
                os.write(2, f"{show_cursor}error: {farewell}\n".encode())
                os._exit(128 + byte[0])
            came, self.signum = time.monotonic(), byte[0]

"""Stopping when asked: SIGTERM and SIGINT are noted, and the run ends at the next step's end."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


class StopSignals:
    """Notes SIGTERM and SIGINT while it is open, instead of letting them end the process.

    A context manager. Python runs signal handlers in the main thread only, so that elsewhere it notes nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            logger.info("%s: saving and stopping after this step", self.received)

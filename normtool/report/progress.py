"""Progress on stderr, for steps that take over a second, where a person is looking."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds that a step may take before it is shown.
DELAY = 1.0


class Progress:
    """Shows the current step; says nothing at all when it is over in time, or when `visible` is False."""

    def __init__(self, visible: bool) -> None:
        self._visible = visible
        self._label = ""
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def running(self) -> Iterator["Progress"]:
        """Show progress while the block runs."""
        timer = threading.Timer(DELAY, self._show)
        timer.daemon = True
        if self._visible:
            timer.start()
        try:
            yield self
        finally:
            timer.cancel()
            if self._bar is not None:
                self._bar.stop()

    def step(self, label: str) -> None:
        """A new step, of unknown length."""
        self._label = label
        if self._bar is not None:
            self._bar.update(self._task, description=label, total=None, completed=0)

    def count(self, done: int, total: int) -> None:
        """The current step has done `done` of `total`."""
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = bar.add_task(self._label, total=None)
        bar.start()
        self._bar = bar

"""Log lines on the terminal."""

import logging
import sys
from typing import Any, TextIO


class StdoutHandler(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at the time, so that lines land above a live progress bar, not through it."""

    def __init__(self, stream: Any = None):
        super().__init__(sys.stdout)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """The base class sets one; it is not kept."""

"""What Ray's compiled parts write to standard error below Python: kept from the terminal where we say it in our own words."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

_STANDARD_ERROR = 2


@contextlib.contextmanager
def kept_from_terminal(note: Callable[[str], None]) -> Iterator[None]:
    """Hand what the block, or a library in it, writes to the standard error of this process to `note`, if it is anything."""
    with contextlib.ExitStack() as stack:
        try:
            terminal = os.dup(_STANDARD_ERROR)
        except OSError:  # there is none
            yield
            return
        stack.callback(os.close, terminal)
        kept = stack.enter_context(tempfile.TemporaryFile())
        sys.stderr.flush()
        os.dup2(kept.fileno(), _STANDARD_ERROR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, _STANDARD_ERROR)
            kept.seek(0)
            if said := kept.read().decode(errors="replace").strip():
                note(said)

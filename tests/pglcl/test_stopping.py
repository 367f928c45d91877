"""Requests to stop. test_train has tests of what a training does with them."""

from __future__ import annotations

import signal

import pytest
from pglcl import stopping


def test_an_interrupt_that_a_library_swallows_stops_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that catches every exception takes Ctrl-C with it."""
    monkeypatch.setattr(stopping, "_interrupts", [])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopping.remember_interrupts()
        assert not stopping.StopRequest().asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stopping.StopRequest().asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """Shells start background jobs with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopping.remember_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

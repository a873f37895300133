"""Fixtures for the tests of the benchmark."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture
def process_as_it_was():
    """Threads, and the handler of SIGTERM, which the command lines set."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)

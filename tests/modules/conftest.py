"""Fixtures for the tests of modules and of their conversion."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture
def no_stray_warnings():
    """Conversion warns of foreign subclasses only; any other warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield

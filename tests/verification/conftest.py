"""Fixtures for the tests of `verify`."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def hidden_again(compiled: None) -> None:
    """`verify` loads the compiled tier; the tests of other rooms don't see it."""

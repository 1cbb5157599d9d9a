"""Trials in two sizes: a slice that every test run makes, and the whole campaign: pytest -m campaign."""

from __future__ import annotations

import pytest


def sized(name: str, *, ci: int, whole: int, minutes: float = 30) -> pytest.MarkDecorator:
    """Parametrizes a test with how many trials it makes: `ci` in every run, `whole` in the campaign.

    Args:
        name: the test's argument.
        ci: trials of the slice.
        whole: trials of the campaign.
        minutes: how long the whole may take.
    """
    marks = [pytest.mark.campaign, pytest.mark.timeout(minutes * 60)]
    return pytest.mark.parametrize(name, [pytest.param(ci, id="slice"), pytest.param(whole, id="whole", marks=marks)])


class Figures:
    """What a campaign's tests have reached, for the table at the end of the run."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, what: str, reached: str) -> None:
        """One row: what was tried, and what came out."""
        self.rows.append((what, reached))

"""The request: one value a meaning, whatever type it was written in, and errors that name the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ktrdr_async as kt


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"initial_capital": 50_000}, {"initial_capital": 50_000.0}),
        ({"commission": 0, "slippage": 0}, {"commission": 0.0, "slippage": 0.0}),
        ({"lot_size": np.float64(0.5)}, {"lot_size": 0.5}),
        ({"seed": np.int64(7)}, {"seed": 7}),
        ({"symbols": ["A", "B"]}, {"symbols": ("A", "B")}),
    ],
)
def test_a_field_has_its_declared_type(fields: dict[str, Any], plain: dict[str, Any]) -> None:
    made, expected = kt.BacktestRequest(**fields), kt.BacktestRequest(**plain)
    assert made == expected
    for name in fields:
        assert type(getattr(made, name)) is type(getattr(expected, name))
    assert kt.BacktestRequest.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initial_capital", True), ("initial_capital", "50000"), ("initial_capital", float("nan")),
        ("initial_capital", -1.0), ("commission", 1.0), ("slippage", -0.1), ("lot_size", 0), ("min_trade", 1),
        ("seed", 3.5), ("seed", -1), ("seed", 2**64),
        ("force_close", 1), ("timestamps", "middle"), ("symbols", "EURUSD"), ("parameters", [1]), ("data", 5),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(kt.ParameterError, match=field):
        kt.BacktestRequest(**{field: value})

"""A pure-asyncio, actor-style backtesting engine whose runs survive cancels, deploys and crashes bit for bit.

Everything public is here; modules below are private. Names are imported when they are first asked for, so that a
program
pays only for what it uses.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrdr_async.backtesting.checkpoint_builder import (
        build_backtest_checkpoint_state as build_backtest_checkpoint_state,
    )
    from ktrdr_async.backtesting.engine import BacktestingEngine as BacktestingEngine
    from ktrdr_async.backtesting.engine import Block as Block
    from ktrdr_async.backtesting.request import BacktestRequest as BacktestRequest
    from ktrdr_async.backtesting.results import BacktestResults as BacktestResults
    from ktrdr_async.backtesting.tiers import load_compiled as load_compiled
    from ktrdr_async.checkpoint.policy import CheckpointPolicy as CheckpointPolicy
    from ktrdr_async.checkpoint.schemas import DEFAULT_CHECKPOINT_BAR_INTERVAL as DEFAULT_CHECKPOINT_BAR_INTERVAL
    from ktrdr_async.checkpoint.schemas import DEFAULT_EQUITY_SAMPLE_INTERVAL as DEFAULT_EQUITY_SAMPLE_INTERVAL
    from ktrdr_async.checkpoint.schemas import BacktestCheckpointState as BacktestCheckpointState
    from ktrdr_async.checkpoint.schemas import CheckpointType as CheckpointType
    from ktrdr_async.checkpoint.service import CheckpointService as CheckpointService
    from ktrdr_async.errors import AlreadyClaimedError as AlreadyClaimedError
    from ktrdr_async.errors import CancellationError as CancellationError
    from ktrdr_async.errors import CheckpointConflictError as CheckpointConflictError
    from ktrdr_async.errors import CheckpointCorruptedError as CheckpointCorruptedError
    from ktrdr_async.errors import CheckpointError as CheckpointError
    from ktrdr_async.errors import CheckpointMismatchError as CheckpointMismatchError
    from ktrdr_async.errors import CheckpointTooLargeError as CheckpointTooLargeError
    from ktrdr_async.errors import CodeNotAllowedError as CodeNotAllowedError
    from ktrdr_async.errors import DatabaseError as DatabaseError
    from ktrdr_async.errors import DataError as DataError
    from ktrdr_async.errors import DataNotAllowedError as DataNotAllowedError
    from ktrdr_async.errors import EmbeddedServerError as EmbeddedServerError
    from ktrdr_async.errors import InputError as InputError
    from ktrdr_async.errors import InvalidTransitionError as InvalidTransitionError
    from ktrdr_async.errors import KtrdrError as KtrdrError
    from ktrdr_async.errors import OperationConflictError as OperationConflictError
    from ktrdr_async.errors import OperationError as OperationError
    from ktrdr_async.errors import OperationFailedError as OperationFailedError
    from ktrdr_async.errors import OperationNotFoundError as OperationNotFoundError
    from ktrdr_async.errors import OrderError as OrderError
    from ktrdr_async.errors import OwnershipLostError as OwnershipLostError
    from ktrdr_async.errors import ParameterError as ParameterError
    from ktrdr_async.errors import SaveTimeoutError as SaveTimeoutError
    from ktrdr_async.errors import SchemaVersionError as SchemaVersionError
    from ktrdr_async.errors import StrategyError as StrategyError
    from ktrdr_async.errors import UndeclaredStateError as UndeclaredStateError
    from ktrdr_async.errors import UnknownStrategyError as UnknownStrategyError
    from ktrdr_async.market.bars import Bars as Bars
    from ktrdr_async.operations.lifecycle import Operation as Operation
    from ktrdr_async.operations.lifecycle import Status as Status
    from ktrdr_async.operations.service import OperationsService as OperationsService
    from ktrdr_async.storage.database import Database as Database
    from ktrdr_async.strategies import indicators as indicators
    from ktrdr_async.strategies.async_reversion import AsyncReversion as AsyncReversion
    from ktrdr_async.strategies.bar import Bar as Bar
    from ktrdr_async.strategies.bar import Fill as Fill
    from ktrdr_async.strategies.bar import TradeClosed as TradeClosed
    from ktrdr_async.strategies.base import AsyncStrategy as AsyncStrategy
    from ktrdr_async.strategies.base import Strategy as Strategy
    from ktrdr_async.strategies.base import WeightStrategy as WeightStrategy
    from ktrdr_async.strategies.buy_and_hold import BuyAndHold as BuyAndHold
    from ktrdr_async.strategies.changes import on_change as on_change
    from ktrdr_async.strategies.donchian_breakout import DonchianBreakout as DonchianBreakout
    from ktrdr_async.strategies.momentum_rotation import MomentumRotation as MomentumRotation
    from ktrdr_async.strategies.rsi_reversion import RsiReversion as RsiReversion
    from ktrdr_async.strategies.signals import Signals as Signals
    from ktrdr_async.strategies.sma_cross import SmaCross as SmaCross
    from ktrdr_async.supervision.local import backtest as backtest
    from ktrdr_async.supervision.local import backtest_sync as backtest_sync
    from ktrdr_async.supervision.mailbox import Progress as Progress
    from ktrdr_async.supervision.worker import BacktestWorker as BacktestWorker
    from ktrdr_async.supervision.worker import OperationHandle as OperationHandle
    from ktrdr_async.verification.certificate import Certificate as Certificate
    from ktrdr_async.verification.certificate import VerificationError as VerificationError
    from ktrdr_async.verification.verify import verify as verify
    from ktrdr_async.verification.verify import verify_sync as verify_sync

__version__ = "0.1.0"

_HOMES = {
    "backtesting.checkpoint_builder": ("build_backtest_checkpoint_state",),
    "backtesting.engine": ("BacktestingEngine", "Block"),
    "backtesting.request": ("BacktestRequest",),
    "backtesting.results": ("BacktestResults",),
    "backtesting.tiers": ("load_compiled",),
    "checkpoint.policy": ("CheckpointPolicy",),
    "checkpoint.schemas": (
        "BacktestCheckpointState", "CheckpointType", "DEFAULT_CHECKPOINT_BAR_INTERVAL",
        "DEFAULT_EQUITY_SAMPLE_INTERVAL",
    ),
    "checkpoint.service": ("CheckpointService",),
    "errors": (
        "AlreadyClaimedError", "CancellationError", "CheckpointConflictError", "CheckpointCorruptedError",
        "CheckpointError",
        "CheckpointMismatchError", "CheckpointTooLargeError", "CodeNotAllowedError", "DataError", "DataNotAllowedError",
        "DatabaseError", "EmbeddedServerError", "InputError", "InvalidTransitionError", "KtrdrError",
        "OperationConflictError",
        "OperationError", "OperationFailedError", "OperationNotFoundError", "OrderError", "OwnershipLostError",
        "ParameterError",
        "SaveTimeoutError", "SchemaVersionError", "StrategyError", "UndeclaredStateError", "UnknownStrategyError",
    ),
    "market.bars": ("Bars",),
    "operations.lifecycle": ("Operation", "Status"),
    "operations.service": ("OperationsService",),
    "storage.database": ("Database",),
    "strategies.async_reversion": ("AsyncReversion",),
    "strategies.bar": ("Bar", "Fill", "TradeClosed"),
    "strategies.base": ("AsyncStrategy", "Strategy", "WeightStrategy"),
    "strategies.buy_and_hold": ("BuyAndHold",),
    "strategies.changes": ("on_change",),
    "strategies.donchian_breakout": ("DonchianBreakout",),
    "strategies.momentum_rotation": ("MomentumRotation",),
    "strategies.rsi_reversion": ("RsiReversion",),
    "strategies.signals": ("Signals",),
    "strategies.sma_cross": ("SmaCross",),
    "supervision.local": ("backtest", "backtest_sync"),
    "supervision.mailbox": ("Progress",),
    "supervision.worker": ("BacktestWorker", "OperationHandle"),
    "verification.certificate": ("Certificate", "VerificationError"),
    "verification.verify": ("verify", "verify_sync"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__", "indicators"])


def __getattr__(name: str) -> Any:
    if name == "indicators":
        value: Any = importlib.import_module(f"{__name__}.strategies.indicators")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""The engine against backtesting.py and backtrader, trade by trade: equal, or a row in the table of differences.

The campaign: pytest -m campaign tests/backtesting/test_against_peers.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from campaigns import Figures, sized
from oracle import DAY_NS, Decision, Decisions, Market, Terms
from peer_jobs import BUILT_INS, by_position, by_script, once, random_job, real_job
from peers import Fill, Job, Outcome, backtesting_py, backtrader_, differing, ours
from scripted import Script, Scripted

import ktrdr_async as kt

pytestmark = pytest.mark.anyio

REAL = tuple(
    (kind, name, peer, beside)
    for kind, name, (peer, beside) in product(
        ("sma_cross", "script", *BUILT_INS[1:]),
        ("GOOG.csv", "EURUSD.csv"),
        (("backtesting.py", False), ("backtrader", False), ("backtrader", True)),
    )
    if (kind, peer) != ("buy_and_hold", "backtesting.py")  # see the table
)


def theirs(job: Job, peer: str) -> Outcome:
    return backtrader_(job) if peer == "backtrader" else backtesting_py(job)[0]


def random_of(peer: str, seed: int) -> tuple[str, Job]:
    """Its kind and a job that the peer can do whole: backtesting.py has one symbol, and no slippage at exits."""
    return random_job(seed) if peer == "backtrader" else random_job(seed, symbols=1, slippage=False, first=1)


@pytest.mark.parametrize("peer", ["backtesting.py", "backtrader"])
@sized("jobs", ci=10, whole=400, minutes=15)
async def test_random_jobs_come_out_equal(peer: str, jobs: int, campaign_seed: int, figures: Figures) -> None:
    seen: Counter[str] = Counter()
    for number in range(jobs):
        seed = campaign_seed * 1_000 + number
        (kind, job), (_, again) = random_of(peer, seed), random_of(peer, seed)
        mine, results = await ours(job, matched=peer == "backtesting.py")
        found = differing(mine, theirs(again, peer), job.terms.initial_capital)
        assert not found, f"job {seed}, {kind}: {len(found)} differences, first: {found[0]}"
        parts = Counter((f.bar, f.symbol) for f in mine.fills)
        seen["fills"] += len(mine.fills)
        seen["trades"] += len(mine.trades)
        seen[kind] += 1
        seen["jobs with commission"] += bool(mine.fills) and job.terms.commission > 0
        seen["with slippage"] += bool(mine.fills) and job.terms.slippage > 0
        seen["with shorts"] += any(t.side < 0 for t in mine.trades)
        seen["with flips"] += max(parts.values(), default=0) > 1
        seen["with several symbols"] += len({f.symbol for f in mine.fills}) > 1
        seen["with missing bars while held"] += bool(results.stale_bars)
        gaps = np.abs(job.market.open[1:] / job.market.close[:-1] - 1) > 0.005
        seen["with opening gaps"] += bool(gaps.any())
        seen["with orders left over"] += bool(mine.waiting)
    if jobs >= 300:
        only = {"with slippage", "with several symbols", "with missing bars while held", "buy_and_hold"}
        reached = {"jobs with commission", "with shorts", "with flips", "with opening gaps", "with orders left over"}
        reached |= {"script", "momentum_rotation", *BUILT_INS} | only
        missing = {name for name in reached if not seen[name]}
        assert missing == (only if peer == "backtesting.py" else set())
    figures.add(f"random jobs against {peer}", f"{jobs} equal: " + ", ".join(f"{n:,} {w}" for w, n in seen.items()))


@sized("jobs", ci=4, whole=len(REAL), minutes=15)
async def test_real_data_come_out_equal(jobs: int, campaign_seed: int, figures: Figures) -> None:
    fills: Counter[str] = Counter()
    for kind, name, peer, beside in REAL[:jobs]:

        def job(kind: str = kind, name: str = name, peer: str = peer, beside: bool = beside) -> Job:
            slippage = 0.0005 if peer == "backtrader" else 0.0
            return real_job(name, kind, np.random.default_rng(campaign_seed), beside=beside, slippage=slippage)

        mine, _ = await ours(job(), matched=peer == "backtesting.py")
        found = differing(mine, theirs(job(), peer), job().terms.initial_capital)
        assert not found, f"{kind} on {name}, {peer}: {len(found)} differences, first: {found[0]}"
        assert mine.fills
        fills[peer] += len(mine.fills)
    figures.add("EURUSD and GOOG against both", f"{jobs} jobs equal, fills: {dict(fills)}")


@pytest.mark.parametrize("name", ["GOOG.csv", "EURUSD.csv"])
async def test_drawdown_and_return_are_those_of_backtesting_py(name: str) -> None:
    def job() -> Job:
        return real_job(name, "sma_cross", np.random.default_rng(1), beside=False, slippage=0.0)

    _, results = await ours(job())
    _, stats = backtesting_py(job())
    assert len(results.trade_records) == stats["# Trades"] > 30
    assert results.metrics.max_drawdown == pytest.approx(stats["Max. Drawdown [%]"] / 100, rel=1e-9)
    assert results.metrics.total_return == pytest.approx(stats["Return [%]"] / 100, rel=1e-9)


# What differs, and is accepted. All prices and rates of these small markets are exact in binary.


def market_of(*closes: list[float], opens: list[list[float]] | None = None) -> Market:
    """Daily bars, a list a symbol; each opens at its close unless `opens` says where."""
    close = np.array(closes, dtype=np.float64).T
    open_ = close if opens is None else np.array(opens, dtype=np.float64).T
    stamps = np.int64(1_577_836_800_000_000_000) + np.arange(len(close), dtype=np.int64) * DAY_NS
    return Market(stamps, open_, np.maximum(open_, close), np.minimum(open_, close), close)


def targets(market: Market, at: dict[int, dict[int, float]], capital: float, **terms: Any) -> Callable[[], Job]:
    """Makes the job of going to a few targets: bar -> symbol -> units."""
    rows: list[Decisions] = [
        {j: Decision("quantity", units) for j, units in at.get(t, {}).items()} for t in range(len(market.close))
    ]
    terms.setdefault("force_close", False)
    return lambda: Job(market, Terms(capital, **terms), Scripted(Script(rows)), by_script(rows))


def plain(fills: list[Fill]) -> list[tuple[int, int, float, float]]:
    return [(f.bar, f.symbol, f.quantity, f.price) for f in fills]


async def both(make: Callable[[], Job], peer: str, **options: Any) -> tuple[Outcome, Outcome]:
    mine, _ = await ours(make(), matched=peer == "backtesting.py")
    other = backtrader_(make(), **options) if peer == "backtrader" else backtesting_py(make(), **options)[0]
    assert differing(mine, other, make().terms.initial_capital), "the difference occurs no more"
    return mine, other


async def first_decision(peer: str) -> None:
    market = market_of([8, 9, 10, 11, 12])
    mine, other = await both(
        lambda: Job(market, Terms(1024.0, force_close=False), kt.BuyAndHold(2.0), by_position(once, 1, 2.0)), peer
    )
    assert (plain(mine.fills), plain(other.fills)) == ([(1, 0, 2.0, 9.0)], [(2, 0, 2.0, 10.0)])
    assert mine[1::2] == other[1::2] == ([], {})


async def slippage_at_exits(peer: str) -> None:
    make = targets(market_of([8, 16, 16, 16, 16]), {1: {0: 4}, 2: {0: 0}}, 1024.0, slippage=1 / 64)
    mine, other = await both(make, peer)
    assert (plain(mine.fills), plain(other.fills)) == (
        [(2, 0, 4.0, 16.25), (3, 0, -4.0, 15.75)],
        [(2, 0, 4.0, 16.25), (3, 0, -4.0, 16.0)],
    )
    assert [t.net_pnl for t in (*mine.trades, *other.trades)] == [-2.0, -1.0]


async def closing_step(peer: str) -> None:
    market = market_of([8, 8, 8, 10], opens=[[8, 8, 8, 9]])
    options = {"finalize_trades": True} if peer == "backtesting.py" else {}
    mine, other = await both(targets(market, {1: {0: 4}}, 1024.0, force_close=True), peer, **options)
    assert plain(mine.fills) == [(2, 0, 4.0, 8.0), (3, 0, -4.0, 10.0)]
    exits = [(3, 0, -4.0, 9.0)] if peer == "backtesting.py" else []
    assert plain(other.fills) == [(2, 0, 4.0, 8.0), *exits]
    assert (mine.equity[-1], other.equity[-1]) == (1032.0, 1028.0 if exits else 1032.0)


async def buying_power(peer: str) -> None:
    make = targets(market_of([8, 8, 8, 8]), {1: {0: 200}}, 1024.0)
    mine, other = await both(make, peer)
    assert (plain(mine.fills), other.fills) == ([(2, 0, 128.0, 8.0)], [])
    assert mine.refused == other.refused == 1
    assert mine.equity == other.equity == [1024.0] * 4


async def ruin(peer: str) -> None:
    market = market_of([8, 8, 8, 20, 21, 8, 8])
    mine, other = await both(targets(market, {1: {0: -100}, 5: {0: 50}}, 1024.0), peer)
    assert plain(mine.fills) == [(2, 0, -100.0, 8.0), (4, 0, 100.0, 21.0)]
    assert mine.equity == [1024.0, 1024.0, 1024.0, -176.0, -276.0, -276.0, -276.0]
    if peer == "backtesting.py":
        assert plain(other.fills) == [(2, 0, -100.0, 8.0), (3, 0, 100.0, 20.0)]
        assert other.equity == [1024.0, 1024.0, 1024.0, 0.0, 0.0, 0.0, 0.0]
    else:
        assert plain(other.fills) == [(2, 0, -100.0, 8.0), (6, 0, 100.0, 8.0), (6, 0, 50.0, 8.0)]
        assert other.equity == [1024.0, 1024.0, 1024.0, -176.0, -276.0, 1024.0, 1024.0]


async def shorts_and_cash(peer: str) -> None:
    mine, other = await both(targets(market_of([8, 8, 8, 8]), {1: {0: -200}}, 1024.0), peer)
    assert (plain(mine.fills), plain(other.fills)) == ([(2, 0, -128.0, 8.0)], [(2, 0, -200.0, 8.0)])
    assert (mine.refused, other.refused) == (1, 0)
    assert mine.equity == other.equity == [1024.0] * 4


async def closing_first(peer: str) -> None:
    # A turns from short to long, which needs the cash that the sale of B brings at the same open.
    market = market_of([8] * 6, [8] * 6)
    mine, other = await both(targets(market, {1: {1: 100}, 2: {0: -20}, 3: {0: 120, 1: 0}}, 1024.0), peer)
    opened = [(2, 1, 100.0, 8.0), (3, 0, -20.0, 8.0)]
    closed = [(4, 0, 20.0, 8.0), (4, 1, -100.0, 8.0)]
    assert sorted(plain(mine.fills)) == sorted([*opened, *closed, (4, 0, 120.0, 8.0)])
    assert sorted(plain(other.fills)) == sorted([*opened, *closed])
    assert (mine.refused, other.refused) == (0, 1)
    assert mine.equity == other.equity == [1024.0] * 6


async def mean_entry(peer: str) -> None:
    # Bought at 8 and, after half was sold, at 16: the mean of what was bought is 12, of what is held 13 1/3.
    market = market_of([8, 8, 8, 8, 16, 16, 16])
    make = targets(market, {1: {0: 4}, 2: {0: 2}, 3: {0: 6}, 4: {0: 0}}, 1024.0)
    mine, other = await both(make, peer, any_price=True)
    assert [t.entry_price for t in mine.trades] == [(4 * 8 + 4 * 16) / 8]
    assert [t.entry_price for t in other.trades] == [(2 * 8 + 4 * 16) / 6]
    assert not differing(mine, backtrader_(make()), 1024.0)


class Difference(NamedTuple):
    name: str
    peer: str
    reason: str
    shown: Callable[[str], Coroutine[Any, Any, None]]


BACKTESTING, BACKTRADER = "backtesting.py", "backtrader"
ACCEPTED = (
    Difference("first decision", BACKTESTING, "its `next` starts at the second bar, so nothing fills there",
               first_decision),
    Difference("slippage at exits", BACKTESTING, "its spread is charged at entries only", slippage_at_exits),
    Difference("closing step", BACKTESTING, "it ends open trades at the last bar's open, not its close", closing_step),
    Difference("closing step", BACKTRADER, "it has none", closing_step),
    Difference("buying power", BACKTESTING, "it cancels what it can't pay for whole, where ours is cut", buying_power),
    Difference("buying power", BACKTRADER, "it refuses what it can't pay for whole, where ours is cut", buying_power),
    Difference("ruin", BACKTESTING, "it closes at the very close and forgives the debt", ruin),
    Difference("ruin", BACKTRADER, "it has none: it keeps what is held and trades on", ruin),
    Difference("shorts and cash", BACKTRADER, "a short takes no buying power there", shorts_and_cash),
    Difference("closing first", BACKTRADER, "it fills order by order, where all closing parts go first",
               closing_first),
    Difference("mean entry", BACKTRADER, "its trade's price is the mean of what is held, not of what was opened",
               mean_entry),
)  # fmt: skip


@pytest.mark.parametrize("row", ACCEPTED, ids=lambda row: f"{row.peer}: {row.name}")
async def test_an_accepted_difference_is_there_and_nothing_else(row: Difference) -> None:
    await row.shown(row.peer)


async def test_the_table_of_accepted_differences_is_shown(figures: Figures) -> None:
    assert len({(row.name, row.peer) for row in ACCEPTED}) == len(ACCEPTED)
    for row in ACCEPTED:
        figures.add(f"accepted difference, {row.peer}", f"{row.name}: {row.reason}")

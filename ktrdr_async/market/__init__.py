"""Market data: bars and their rules, where they are read from, and a market that is made of a seed.

Nothing here knows of strategies or of running.
"""

from ktrdr_async.market.bars import Bars
from ktrdr_async.market.synthetic import synthetic
from ktrdr_async.market.timeframes import format_timeframe, parse_timeframe

__all__ = ["Bars", "format_timeframe", "parse_timeframe", "synthetic"]

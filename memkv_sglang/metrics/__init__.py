"""Every metric that the agent exposes. `docs/metrics.md` is generated from this package."""

from memkv_sglang.metrics.agent import Metrics, make_records_counter
from memkv_sglang.metrics.calls import CallMetrics
from memkv_sglang.metrics.shards import ShardMetrics
from memkv_sglang.metrics.totals import TotalsCounter

__all__ = ["CallMetrics", "Metrics", "ShardMetrics", "TotalsCounter", "make_records_counter"]

"""Losses, errors and the user's metrics, as sums over the samples at the head of the network."""

from modeconn.metrics.classes import IGNORED
from modeconn.metrics.head import LOSSES, METRICS, Head, Metric
from modeconn.metrics.per_row import PerSample
from modeconn.metrics.whole import DatasetMetric

__all__ = ["IGNORED", "LOSSES", "METRICS", "DatasetMetric", "Head", "Metric", "PerSample"]

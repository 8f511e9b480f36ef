"""Losses, errors and the user's metrics, as sums over the samples at the head of the network."""

from modeconn.metrics.classes import IGNORED
from modeconn.metrics.head import LOSSES, METRICS, Head
from modeconn.metrics.per_row import PerSample

__all__ = ["IGNORED", "LOSSES", "METRICS", "Head", "PerSample"]

"""Writes a reading of the engine's statistics in Prometheus' text format or as OpenMetrics. Knows no HTTP.

Every metric has the label `model_name`. The values of all other labels are names of the engine's own: processes,
states and reasons. So nothing that a client sends adds a time series.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from pipeline.client.outputs import EngineStats
from pipeline.http.metrics.readings import Reading
from pipeline.http.metrics.table import HISTOGRAM_METRICS, METRICS, HistogramMetric

_END: Final = b"# EOF\n"  # of OpenMetrics


def exposition(stats: EngineStats, model_name: str, accept: str = "") -> tuple[bytes, str]:
    """The body and the content type of an answer to Prometheus.

    Args:
        stats: from `stats_with_arrays(readings.ARRAYS)`.
        model_name: the value of the label of this name.
        accept: the request's Accept header. OpenMetrics 1.0.0 if it names that, otherwise text format 0.0.4.
    """
    pieces, content_type = exposition_pieces(stats, model_name, accept)
    return b"".join(pieces), content_type


def exposition_pieces(stats: EngineStats, model_name: str, accept: str = "") -> tuple[Iterator[bytes], str]:
    """The same in pieces: one for each metric. The whole takes milliseconds, for which streams should not wait."""
    families = _families(Reading(stats), model_name)
    media_types = (part.split(";")[0].strip().lower() for part in accept.split(","))
    if "application/openmetrics-text" in media_types:
        return _open_metrics(families), openmetrics.CONTENT_TYPE_LATEST
    return (generate_latest(_One(family)) for family in families), CONTENT_TYPE_PLAIN_0_0_4


def _open_metrics(families: Iterator[Family]) -> Iterator[bytes]:
    for family in families:
        text: bytes = openmetrics.generate_latest(_One(family))  # type: ignore[no-untyped-call]
        yield text.removesuffix(_END)
    yield _END


class _One(Collector):
    """What the library writes as one text."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


def _families(reading: Reading, model_name: str) -> Iterator[Family]:
    for metric in METRICS:
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=("model_name", *metric.labels))
        for labels, value in metric.read(reading):
            family.add_metric((model_name, *labels), value)
        yield family
    for each in HISTOGRAM_METRICS:
        yield _histogram(each, reading, model_name)


def _histogram(metric: HistogramMetric, reading: Reading, model_name: str) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=("model_name",))
    if (found := reading.histogram(metric.source)) is not None:
        cumulated, total = found
        buckets = [("+Inf" if math.isinf(le) else repr(le), num) for le, num in cumulated]
        family.add_metric((model_name,), buckets, total)
    return family

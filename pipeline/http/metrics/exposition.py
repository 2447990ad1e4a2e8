"""Writes a reading of the engine's statistics in Prometheus' text format or as OpenMetrics. Knows no HTTP.

Every metric has the label `model_name`. The values of all other labels are names of the engine's own: processes,
states and reasons. So nothing that a client sends adds a time series.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from pipeline.client.outputs import EngineStats
from pipeline.http.metrics.readings import Reading
from pipeline.http.metrics.table import HISTOGRAM_METRICS, METRICS, HistogramMetric, Metric


def exposition(stats: EngineStats, model_name: str, accept: str = "") -> tuple[bytes, str]:
    """The body and the content type of an answer to Prometheus.

    Args:
        stats: from `stats_with_arrays(readings.ARRAYS)`.
        model_name: the value of the label of this name.
        accept: the request's Accept header. OpenMetrics 1.0.0 if it names that, otherwise text format 0.0.4.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(Reading(stats), model_name))
    media_types = (part.split(";")[0].strip().lower() for part in accept.split(","))
    if "application/openmetrics-text" in media_types:
        body: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return body, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class _EngineCollector(Collector):
    def __init__(self, reading: Reading, model_name: str) -> None:
        self._reading = reading
        self._model_name = model_name

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            yield self._family(metric)
        for histogram in HISTOGRAM_METRICS:
            yield self._histogram(histogram)

    def _family(self, metric: Metric) -> Family:
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=("model_name", *metric.labels))
        for labels, value in metric.read(self._reading):
            family.add_metric((self._model_name, *labels), value)
        return family

    def _histogram(self, metric: HistogramMetric) -> Family:
        family = HistogramMetricFamily(metric.name, metric.help, labels=("model_name",))
        if (found := self._reading.histogram(metric.source)) is not None:
            cumulated, total = found
            buckets = [("+Inf" if math.isinf(le) else repr(le), num) for le, num in cumulated]
            family.add_metric((self._model_name,), buckets, total)
        return family

"""What Prometheus reads, from statistics that the test writes."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from pipeline.client.outputs import EngineStats
from pipeline.http.config import STATUS_CLASSES
from pipeline.http.metrics.exposition import exposition
from pipeline.http.metrics.table import HISTOGRAM_METRICS, METRICS
from tests.unit.pipeline.http.metrics.engine_stats import engine_stats
from workers.detokenizer.config import END_REASONS, HISTOGRAMS

TEXT = "text/plain; version=0.0.4; charset=utf-8"
Key = tuple[str, frozenset[tuple[str, str]]]


def read(stats: EngineStats) -> dict[Key, float]:
    """Every sample: its name and its labels besides `model_name`."""
    body, _ = exposition(stats, 'a "model"\n')
    samples = [sample for family in parser.text_string_to_metric_families(body.decode()) for sample in family.samples]
    assert {sample.labels.pop("model_name") for sample in samples} == {'a "model"\n'}
    values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples), "a series is there twice"
    return values


def key(name: str, **labels: str) -> Key:
    return name, frozenset(labels.items())


def test_counters_and_gauges_have_the_values_of_the_processes() -> None:
    stats = engine_stats()
    found, roles = read(stats), stats.roles
    scheduler, gateway = roles["scheduler"], roles["gateway"]
    assert found[key("ringfeed_generation_tokens_total")] == scheduler["num_sampled_tokens"]
    assert found[key("ringfeed_sequences_waiting")] == scheduler["num_waiting"]
    assert found[key("ringfeed_device_seconds_total", state="no_work")] == pytest.approx(
        scheduler["device_no_work_ns"] / 1e9
    )
    assert found[key("ringfeed_kv_cache_usage_ratio")] == 1 - scheduler["num_free_blocks"] / scheduler["num_blocks"]
    assert found[key("ringfeed_tokenizer_seconds_total")] == pytest.approx(
        (roles["tokenizer.0"]["encode_ns"] + roles["tokenizer.1"]["encode_ns"]) / 1e9
    )
    assert found[key("ringfeed_requests_refused_total", stage="gateway")] == gateway["num_refused"]
    assert found[key("ringfeed_requests_queue_full_total", stage="scheduler")] == scheduler["num_queue_full"]
    assert found[key("ringfeed_timeouts_total", reason="deadline", stage="gateway")] == gateway["num_deadline"]
    assert found[key("ringfeed_samples_finished_total", finished_reason="length")] == END_REASONS.index("length")
    for role, counters in roles.items():
        assert found[key("ringfeed_process_cpu_seconds_total", process=role)] == pytest.approx(counters["cpu_ns"] / 1e9)
        assert found[key("ringfeed_process_restarts_total", process=role)] == counters["num_starts"] - 1


def test_http_processes_count_together() -> None:
    stats = engine_stats()
    found, both = read(stats), [stats.roles["http.0"], stats.roles["http.1"]]
    assert found[key("ringfeed_http_open_streams")] == sum(counters["num_open_streams"] for counters in both)
    for status in STATUS_CLASSES:
        expected = sum(counters[f"num_responses_{status}"] for counters in both)
        assert found[key("ringfeed_http_responses_total", status=status)] == expected


def test_a_histogram_counts_the_values_up_to_each_bound_in_seconds() -> None:
    found = read(engine_stats(inter_token_us=4_000, prompt_tokens=5))
    name = "ringfeed_inter_token_latency_seconds"
    buckets = {float(dict(labels)["le"]): value for (each, labels), value in found.items() if each == f"{name}_bucket"}
    assert list(buckets) == [*(bound / 1e6 for bound in HISTOGRAMS["inter_token_us"]), float("inf")]
    assert buckets[0.0025] == 0
    assert buckets[0.005] == buckets[0.01] == buckets[float("inf")] == 1
    assert (found[key(f"{name}_count")], found[key(f"{name}_sum")]) == (1, 0.004)
    tokens = "ringfeed_request_prompt_tokens"
    assert found[key(f"{tokens}_bucket", le="2.0")] == 0
    assert found[key(f"{tokens}_bucket", le="5.0")] == found[key(f"{tokens}_sum")] / 5 == 1


def test_every_metric_of_the_table_is_there_and_its_labels_have_names_of_the_engine_alone() -> None:
    stats = engine_stats()
    body, content_type = exposition(stats, "m")
    assert content_type == TEXT
    families = {family.name: family for family in parser.text_string_to_metric_families(body.decode())}
    expected = {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    expected |= {metric.name: "histogram" for metric in HISTOGRAM_METRICS}
    assert {name: family.type for name, family in families.items()} == expected
    assert all(family.samples and family.documentation for family in families.values())
    values: dict[str, set[str]] = {}
    for family in families.values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    del values["le"]
    assert values == {
        "model_name": {"m"}, "process": set(stats.roles), "finished_reason": set(END_REASONS),
        "reason": {"deadline", "queue_timeout"}, "stage": {"gateway", "scheduler"},
        "state": {"busy", "no_work", "scheduler", "copies", "masks"}, "ring": {"step", "result", "upload"},
        "task": {"plan", "apply", "compile", "masks"}, "status": set(STATUS_CLASSES),
    }  # fmt: skip


def test_an_engine_without_some_processes_lacks_their_values_alone() -> None:
    whole, bare = read(engine_stats()), read(engine_stats(without=("http", "grammar")))
    missing = {name for name, _ in whole.keys() - bare.keys()}
    assert all("_http_" in name or "_grammar" in name or "_process_" in name for name in missing)
    assert "ringfeed_http_requests_total" in missing
    starting = engine_stats()
    starting.roles["scheduler"]["num_blocks"] = 0.0
    assert read(starting)[key("ringfeed_kv_cache_usage_ratio")] == 0
    assert read(EngineStats(starting.roles, {})).keys() == {each for each in whole if not is_of_an_array(each[0])}


def is_of_an_array(name: str) -> bool:
    return name.startswith((*(metric.name for metric in HISTOGRAM_METRICS), "ringfeed_samples_finished"))


@pytest.mark.parametrize(
    ("accept", "is_open_metrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("text/plain;version=nonsense;q=,,;application/json", False),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1", True),
        ("Application/OpenMetrics-Text", True),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str, is_open_metrics: bool) -> None:
    body, content_type = exposition(engine_stats(), "m", accept)
    assert ("openmetrics" in content_type) is body.endswith(b"# EOF\n") is is_open_metrics
    if is_open_metrics:
        families: Any = list(openmetrics_parser.text_string_to_metric_families(body.decode()))
        assert len(families) == len(METRICS) + len(HISTOGRAM_METRICS)

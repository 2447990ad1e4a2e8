"""What a running engine measures of its requests, as Prometheus and its clients read it."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import parser

from pipeline import Pipeline, SamplingParams
from pipeline.http.metrics.table import HISTOGRAM_METRICS
from tests.integration.conftest import TINY_CONFIG

pytestmark = pytest.mark.slow

OF_DETOKENIZER = (*(metric.name for metric in HISTOGRAM_METRICS), "ringfeed_samples_finished_total")
PROMPTS = ["A class", "A list", "The json module"]
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def engine() -> Iterator[Pipeline]:
    with Pipeline(TINY_CONFIG, {"http.num_workers": 2, "http.served_model_names": ["m"]}) as pipeline:
        yield pipeline


def scrape(engine: Pipeline) -> Series:
    with urllib.request.urlopen(f"{engine.http_url}/metrics", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = list(parser.text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for each in families for sample in each.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset({"model_name": "m", **labels}.items())]


def test_every_request_is_measured_once_and_every_http_process_says_the_same(engine: Pipeline) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    outputs = engine.client.generate_batch(PROMPTS, params)
    two = engine.client.generate("A class", SamplingParams(max_tokens=5, temperature=1.0, seed=1, n=2, ignore_eos=True))
    usages = [output.usage for output in [*outputs, two] if output.usage is not None]
    series = scrape(engine)
    assert value(series, "ringfeed_e2e_request_latency_seconds_count") == len(usages) == 4
    assert value(series, "ringfeed_time_to_first_token_seconds_count") == 5
    assert value(series, "ringfeed_samples_finished_total", finished_reason="length") == 5
    assert value(series, "ringfeed_inter_token_latency_seconds_count") == 3 * 5 + 2 * 4
    assert value(series, "ringfeed_request_generation_tokens_sum") == sum(usage.completion_tokens for usage in usages)
    assert value(series, "ringfeed_request_prompt_tokens_sum") == sum(usage.prompt_tokens for usage in usages)
    # The detokenizer counts before it sends a final answer; the scheduler may count a moment after.
    own = {key: found for key, found in series.items() if key[0].startswith(OF_DETOKENIZER)}
    assert len(own) > 100
    for _ in range(8):  # the kernel gives connections to both processes
        again = scrape(engine)
        assert {key: again[key] for key in own} == own
    assert value(again, "ringfeed_http_responses_total", status="2xx") > 0
    deadline = time.monotonic() + 20
    while value(scrape(engine), "ringfeed_generation_tokens_total") != 3 * 6 + 2 * 5:
        assert time.monotonic() < deadline


def test_the_times_of_a_request_are_in_the_order_of_its_stages(engine: Pipeline) -> None:
    whole = engine.client.generate(PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True))
    [*parts, last] = engine.client.generate(PROMPTS[1], SamplingParams(max_tokens=4, ignore_eos=True), stream=True)
    assert all(part.times is None for part in parts)
    for output in (whole, last):
        times = output.times
        assert times is not None
        stages = [times.arrived_ns, times.tokenized_ns, times.admitted_ns, times.first_token_ns, times.last_token_ns]
        known = [stage for stage in stages if stage is not None]
        assert len(set(known)) == len(stages)
        assert known == sorted(known)

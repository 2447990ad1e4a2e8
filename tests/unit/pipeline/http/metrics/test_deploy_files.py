"""docs/metrics.md, the scrape file and the dashboard name the metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import parser

from pipeline.http.metrics.exposition import exposition
from pipeline.http.metrics.table import HISTOGRAM_METRICS, METRICS
from tests.unit.pipeline.http.metrics.engine_stats import engine_stats

ROOT = Path(__file__).parents[5]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "ringfeed.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
GRID_COLUMNS = 24


def sample_names() -> set[str]:
    body, _ = exposition(engine_stats(), "m")
    families = parser.text_string_to_metric_families(body.decode())
    return {sample.name for family in families for sample in family.samples}


def test_every_metric_is_documented_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(ringfeed_\w+)(?:\{(.*?)\})?` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    expected = [(metric.name, ", ".join(metric.labels), metric.kind) for metric in METRICS]
    expected += [(metric.name, "", "histogram") for metric in HISTOGRAM_METRICS]
    assert sorted(rows) == sorted(expected)


def test_every_metric_that_the_dashboard_names_is_in_the_exposition() -> None:
    queries = [variable["query"]["query"] for variable in variables("query")]
    named = set(re.findall(r"ringfeed_\w+", " ".join([*EXPRESSIONS, *queries])))
    assert len(named) > 20
    assert named <= sample_names()
    labels = {label for metric in METRICS for label in metric.labels} | {"model_name", "instance", "le"}
    used = set(re.findall(r"by \((\w+)\)", " ".join(EXPRESSIONS)))
    used |= set(re.findall(r"\{\{(\w+)\}\}", json.dumps(DASHBOARD)))
    assert used <= labels


def test_the_dashboards_expressions_are_promql() -> None:
    for expression in EXPRESSIONS:
        promql_parser.parse(expression.replace("$__rate_interval", "1m"))


def test_the_dashboard_has_panels_that_do_not_overlap_and_use_variables_that_it_declares() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in own) < GRID_COLUMNS
        assert not own & cells, f"{panel['title']} lies on another panel"
        cells |= own
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= declared
    assert all("datasource" in panel for panel in panels if panel["type"] != "row")


def variables(kind: str) -> list[dict[str, Any]]:
    return [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == kind]


def test_prometheus_is_told_to_read_the_endpoint() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]

"""docker/grafana against the metrics that exist: dashboard, alert rules, provisioning.

The PromQL check is small: brackets, functions, names of metrics and labels, counters under rate
and gauges outside of it. It knows nothing of types beyond that.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from metric_families import OPENAI_SERVER, counted_labels, families

from gllm_engine.types import Status

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "docker/grafana"
DASHBOARD = json.loads((HERE / "dashboards/gllm.json").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((HERE / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
SERVICES = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]

COUNTING = {"rate", "increase", "irate"}  # of counters
OVER_TIME = {"min_over_time", "max_over_time", "avg_over_time"}  # of gauges
FUNCTIONS = COUNTING | OVER_TIME | {"histogram_quantile", "absent"}
AGGREGATIONS = {"sum", "max", "min", "avg"}
WORDS = {"by", "without", "on", "and", "or", "unless"}
SCRAPED = {"instance", "job"}  # the labels that Prometheus adds
TOKEN = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*")|(?P<range>\[\w+\])|(?P<number>\d+(\.\d+)?)'
    r"|(?P<name>[a-zA-Z_][\w:]*)|(?P<op>=~|!~|!=|==|>=|<=|[-+*/<>=(){},])|(?P<space>\s+)"
)
CLOSING = {")": "(", "}": "{"}


def series() -> dict[str, tuple[str, set[str]]]:
    """Every series of the metrics page: its kind and its labels."""
    found: dict[str, tuple[str, set[str]]] = {"up": ("GAUGE", SCRAPED)}
    for name, (kind, _) in families().items():
        labels = {"model", "version"} | counted_labels().get(name, set()) | SCRAPED
        if kind == "HISTOGRAM":
            found[f"gllm:{name}_bucket"] = ("COUNTER", labels | {"le"})
            found[f"gllm:{name}_sum"] = found[f"gllm:{name}_count"] = ("COUNTER", labels)
        else:
            found[f"gllm:{name}"] = (kind, labels)
    for name, labels in OPENAI_SERVER.items():
        found[name] = ("COUNTER", labels | SCRAPED)
    return found


SERIES = series()


def tokens(expr: str) -> list[tuple[str, str]]:
    """(kind, text) without spaces. Grafana's variables have become what Grafana puts there."""
    expr = expr.replace("$__rate_interval", "1m").replace("$model", "a|b")
    found, end = [], 0
    for match in TOKEN.finditer(expr):
        assert match.start() == end, f"not PromQL: {expr[end:]}"
        end = match.end()
        if match.lastgroup != "space":
            kind = next(k for k, text in match.groupdict().items() if text is not None)
            found.append((kind, match[0]))
    assert end == len(expr), f"not PromQL: {expr[end:]}"
    return found


def check_promql(expr: str) -> set[str]:
    """Assert that an expression may be right; returns the metrics in it."""
    words = [*tokens(expr), ("end", "")]
    open_brackets: list[tuple[str, str]] = []  # with the name in front of each
    metrics: set[str] = set()
    labels: set[str] = set()  # of the last metric
    for i, (kind, text) in enumerate(words[:-1]):
        after, before = words[i + 1][1], words[i - 1][1] if i else ""
        inside, owner = open_brackets[-1] if open_brackets else ("", "")
        if text in ("(", "{"):
            open_brackets.append((text, before))
        elif text in CLOSING:
            assert open_brackets and open_brackets.pop()[0] == CLOSING[text], f"brackets: {expr}"
        elif kind == "string":
            assert inside == "{" and before in ("=", "!=", "=~", "!~"), f"a string: {expr}"
            re.compile(json.loads(text))
            if words[i - 2][1] == "status":
                assert set(json.loads(text).split("|")) <= set(get_args(Status)), text
        elif kind == "range":
            called = owner if inside == "(" else ""
            assert called in COUNTING | OVER_TIME, f"a range outside a function: {expr}"
        elif kind == "name" and inside == "{":
            assert text in labels, f"{text} is no label of {owner}"
            assert after in ("=", "!=", "=~", "!~"), expr
        elif kind == "name" and inside == "(" and owner in ("by", "without", "on"):
            assert text in set().union(*(each for _, each in SERIES.values())), text
        elif kind == "name" and text in FUNCTIONS | AGGREGATIONS:
            assert after == "(" or (text in AGGREGATIONS and after == "by"), expr
        elif kind == "name" and text not in WORDS:
            assert text in SERIES, f"no such metric: {text}"
            metric_kind, labels = SERIES[text]
            calls = {owner for _, owner in open_brackets}
            assert bool(calls & COUNTING) == (metric_kind == "COUNTER"), f"{text} in {expr}"
            metrics.add(text)
    assert not open_brackets, f"brackets: {expr}"
    return metrics


PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in ALERTS]


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_expressions_name_metrics_and_labels_that_exist(expr: str) -> None:
    assert check_promql(expr)


@pytest.mark.parametrize(
    "expr",
    [
        "rate(gllm:generation_token_total[5m])",  # no such metric
        "sum(rate(gllm:generation_tokens_total[5m])",  # not closed
        "sum(rate(gllm:generation_tokens_total[5m]}",
        "sum(gllm:num_requests_running))",
        "gllm:generation_tokens_total",  # a counter as it is
        "rate(gllm:num_requests_running[5m])",  # the rate of a gauge
        "rat(gllm:generation_tokens_total[5m])",  # no such function
        'gllm:num_requests_running{status="invalid"}',  # another metric's label
        'rate(gllm:request_errors_total{status="bad"}[5m])',  # no such status
        "sum by (modl) (gllm:num_requests_running)",
        "gllm:num_requests_running[5m]",
        "rate(gllm:time_to_first_token_seconds[5m])",  # a histogram without _bucket
        'gllm:num_requests_running{model=~"("}',
        "gllm:num_requests_running ! 5",
    ],
)
def test_the_check_can_fail(expr: str) -> None:
    with pytest.raises((AssertionError, re.error)):
        check_promql(expr)


def test_what_an_operator_asks_first_is_on_the_dashboard() -> None:
    shown = {metric for expr in EXPRESSIONS for metric in check_promql(expr)}
    histograms = ("time_to_first_token", "time_per_output_token", "e2e_request_latency")
    wanted = {f"gllm:{name}_seconds_bucket" for name in histograms} | OPENAI_SERVER.keys()
    for name, (kind, _) in families().items():
        if kind != "HISTOGRAM" and not name.startswith("tenant_"):
            wanted.add(f"gllm:{name}")
    assert wanted <= shown


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        grid = panel["gridPos"]
        assert 0 <= grid["x"] and grid["x"] + grid["w"] <= 24
        cells = {
            (grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            for group in grouped:
                assert set(labels) == set(group.split(", ")) - {"le"}, target


def test_the_dashboard_takes_any_prometheus_and_any_model() -> None:
    """Also when imported by hand: no uid of a data source of ours is in it."""
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "model"}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["model"]["definition"] == variables["model"]["query"]["query"]
    metric = re.fullmatch(r"label_values\((\S+), model\)", variables["model"]["definition"])
    assert metric and "model" in SERIES[metric[1]][1]
    places = [variables["model"], *PANELS, *(t for panel in PANELS for t in panel["targets"])]
    for place in places:
        assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all('model=~"$model"' in target["expr"] for p in PANELS for target in p["targets"])
    assert DASHBOARD["schemaVersion"] >= 36 and "id" not in DASHBOARD  # Grafana 10 gives an id


def test_alert_rules_are_whole() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
        kept = set(re.findall(r"by \(([^)]*)\)", rule["expr"])[0].split(", ")) if (
            " by (" in rule["expr"]
        ) else {"instance"}  # fmt: skip
        told = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", told)) <= kept, rule["alert"]
        assert told.count("{{") == told.count("}}")


def test_every_alert_is_in_the_table_of_operations() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `(Gllm\w+)` \|", page, re.MULTILINE)
    assert rows == [rule["alert"] for rule in ALERTS]


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """A service's path -> the file or folder of the repository that is mounted there."""
    pairs = [volume.split(":") for volume in service["volumes"]]
    return {pair[1]: ROOT / "docker" / pair[0] for pair in pairs if pair[0].startswith(".")}


def test_compose_starts_both_on_demand_and_for_this_machine_alone() -> None:
    for name in ("prometheus", "grafana"):
        assert SERVICES[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])
        assert re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"])
        assert all(path.exists() for path in mounts(SERVICES[name]).values())
    assert "profiles" not in SERVICES["gllm"]


def test_prometheus_finds_the_server_and_the_rules() -> None:
    told = yaml.safe_load((HERE / "prometheus.yml").read_text())
    (job,) = told["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert job["job_name"] == host == "gllm" in SERVICES
    _, low_high = SERVICES["gllm"]["ports"][0].rsplit(":", 1)
    assert port == low_high.split("-")[1]
    mounted = mounts(SERVICES["prometheus"])
    assert mounted["/etc/prometheus/prometheus.yml"] == HERE.parent / "./grafana/prometheus.yml"
    assert all(file in mounted for file in told["rule_files"])
    assert any(f'job="{job["job_name"]}"' in rule["expr"] for rule in ALERTS)


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    mounted = mounts(SERVICES["grafana"])
    provisioning = mounted["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    port = SERVICES["prometheus"]["ports"][0].rsplit(":", 1)[1]
    assert source["url"] == f"http://prometheus:{port}" and source["type"] == "prometheus"
    (provider,) = yaml.safe_load((provisioning / "dashboards/gllm.yaml").read_text())["providers"]
    folder = mounted[provider["options"]["path"]]
    assert [path.name for path in folder.iterdir()] == ["gllm.json"]

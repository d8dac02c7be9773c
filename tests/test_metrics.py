"""Test the metrics, and that what contrib/ has for them and for machines fits."""

import contextlib
import json
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from persipubsub import control, metrics
from tests import support, test_cli

_CONTRIB = Path(__file__).resolve().parent.parent / "contrib"


@contextlib.contextmanager
def serving(config_pth: Path, *options: object) -> Iterator[str]:
    with test_cli.start("metrics", config_pth, "--port", "0", "--json", *options) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=support.HANG_SECS) as response:
        text: str = response.read().decode()
        return text


def samples_of(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"^(persipubsub_\S+) (\S+)$", text, re.MULTILINE)
    }


def collected(config_pth: Path, queue_key: str | None = None) -> dict[str, float]:
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics.Collector(config_pth, queue_key))
    return samples_of(prometheus_client.generate_latest(registry).decode())


def busy(directory: Path) -> Path:
    """Make a queue in which something of everything has happened."""
    config_pth = support.make_queue(directory, MAX_MSGS_NUM=100)
    support.send(config_pth, b"x" * 10, b"y", b"z")
    with contextlib.suppress(ValueError), test_cli.receiving(config_pth, 1):
        raise ValueError()
    with test_cli.receiving(config_pth, 1):
        pass
    return config_pth


def test_figures(tmp_path: Path) -> None:
    config_pth = busy(tmp_path)
    with test_cli.receiving(config_pth, 2):
        time.sleep(0.01)
        found = collected(config_pth)
    labels = 'queue="queue",subscriber="sub"'
    expected = {
        "config_valid": 1,
        'queue_up{queue="queue"}': 1,
        'queue_messages{queue="queue"}': 2,
        'queue_message_bytes{queue="queue"}': 2,
        'queue_limit_ratio{limit="MAX_MSGS_NUM",queue="queue"}': 0.02,
        'messages_sent_total{queue="queue"}': 3,
        f"subscriber_lag_messages{{{labels}}}": 2,
        f"subscriber_in_flight_messages{{{labels}}}": 2,
        f"subscriber_paused{{{labels}}}": 0,
        f"messages_acknowledged_total{{{labels}}}": 1,
        f"deliveries_failed_total{{{labels}}}": 1,
        'messages_dropped_total{queue="queue",reason="mark",subscriber="sub"}': 0,
    }
    assert {name: found[f"persipubsub_{name}"] for name in expected} == expected
    for name in ("queue_oldest_age_seconds{queue=\"queue\"}", "queue_store_bytes{queue=\"queue\"}",
                 "queue_disk_bytes{queue=\"queue\"}",
                 f"subscriber_longest_in_flight_seconds{{{labels}}}",
                 f"subscriber_last_acknowledged_age_seconds{{{labels}}}"):
        assert found[f"persipubsub_{name}"] > 0, name


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    names = "".join(collected(support.make_queue(tmp_path)))
    for name in ("oldest_age", "longest_in_flight", "last_acknowledged"):
        assert name not in names


def test_they_are_served_on_the_loopback_address_only(tmp_path: Path) -> None:
    config_pth = busy(tmp_path)
    with serving(config_pth) as url:
        found = samples_of(scrape(url))
        port = int(url.rpartition(":")[2].partition("/")[0])
        assert listening(port) == {"0100007F"}
        # It has the queue open only while it answers.
        control.compact(config_pth)
        process = test_cli.run("metrics", config_pth, "--port", port, exit_code=1)
        assert f"127.0.0.1:{port}" in process.stderr
    assert found['persipubsub_queue_messages{queue="queue"}'] == 2


def listening(port: int) -> set[str]:
    return {
        line.split()[1].partition(":")[0]
        for name in ("tcp", "tcp6") if Path("/proc/net", name).exists()
        for line in Path("/proc/net", name).read_text("ascii").splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }


def test_other_addresses_are_warned_of(tmp_path: Path) -> None:
    config_pth = busy(tmp_path)
    with test_cli.start("metrics", config_pth, "--port", "0", "--address", "0.0.0.0") as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"warning" in process.stderr.readline()
        url = process.stdout.readline().decode().split()[1]
        assert samples_of(scrape(url.replace("0.0.0.0", "127.0.0.1")))
        process.kill()
    for address in ("192.0.2.1", "nowhere.invalid", "\u2026"):
        process2 = test_cli.run("metrics", config_pth, "--address", address, exit_code=1)
        assert process2.stderr.startswith("persipubsub: Expected to serve at ")


def test_they_tell_which_queue_is_not_there(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    assert collected(config_pth) == {
        "persipubsub_config_valid": 1,
        'persipubsub_queue_up{queue="queue"}': 0
    }
    assert collected(support.make_queue(tmp_path),
                     "queue")['persipubsub_queue_up{queue="queue"}'] == 1
    assert collected(config_pth, "missing")['persipubsub_queue_up{queue="missing"}'] == 0
    assert collected(tmp_path / "missing.json", "queue") == {
        "persipubsub_config_valid": 0,
        'persipubsub_queue_up{queue="queue"}': 0
    }


def test_servers_that_are_away_do_not_hold_up_other_figures(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LOOK_SECS", 1.0)
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    with socket.socket() as silent, socket.socket() as away:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        away.bind(("127.0.0.1", 0))
        with support.edited(config_pth) as config:
            queues = config["queues"]
            for name, one in (("silent", silent), ("away", away), ("away2", away)):
                path = f"nats://127.0.0.1:{one.getsockname()[1]}/{name}"
                queues[name] = {**queues["queue"], "path": path, "subscribers": ["other"]}
        start_secs = time.monotonic()
        found = collected(config_pth)
    assert time.monotonic() - start_secs < 8
    assert found['persipubsub_queue_messages{queue="queue"}'] == 1
    for name, is_up in {"queue": 1, "silent": 0, "away": 0, "away2": 0}.items():
        assert found[f'persipubsub_queue_up{{queue="{name}"}}'] == is_up, name


def test_without_the_extra() -> None:
    process = support.run_python(
        "import sys, runpy; sys.modules['prometheus_client'] = None\n"
        "runpy.run_module('persipubsub', run_name='__main__')", "metrics",
        _CONTRIB.parent / "examples" / "tutorial" / "config.json")
    assert process.returncode == 1
    assert "pip install 'persipubsub[metrics]'" in process.stderr
    assert "Traceback" not in process.stderr


# What Prometheus and Grafana make of them


def promtool(*arguments: object, stdin: str = "") -> None:
    """Run a check; ``.ci/run`` installs the tool."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing (Debian: apt-get install promtool)")
    process = support.run(["promtool", *arguments], input=stdin)
    assert process.returncode == 0, process.stdout + process.stderr


def exposed(directory: Path) -> dict[str, set[str]]:
    """Return the labels of all metrics, by name."""
    config_pth = busy(directory)
    with test_cli.receiving(config_pth, 1):
        found = collected(config_pth)
    labels: dict[str, set[str]] = {}
    for sample in found:
        name, _, rest = sample.partition("{")
        labels[name] = set(re.findall(r'(\w+)="', rest))
    return labels


def test_names_and_help_are_those_of_prometheus(tmp_path: Path) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics.Collector(busy(tmp_path)))
    text = prometheus_client.generate_latest(registry).decode()
    promtool("check", "metrics", stdin=text)
    for name, labels in exposed(tmp_path).items():
        assert re.search(fr"^# HELP {name} [A-Z1].*\.$", text, re.MULTILINE), name
        kind = re.search(fr"^# TYPE {name} (\w+)$", text, re.MULTILINE)
        assert kind is not None and (kind.group(1) == "counter") == name.endswith("_total")
        assert ("subscriber" in labels) == bool(
            re.match("persipubsub_(subscriber|deliveries|messages_(?!sent))", name))


def test_every_metric_is_in_the_docs(tmp_path: Path) -> None:
    text = (_CONTRIB.parent / "docs" / "operations.rst").read_text(encoding="utf-8")
    documented = set(re.findall(r"^``(persipubsub_\w+)``", text, re.MULTILINE))
    assert documented == set(exposed(tmp_path))


def expressions() -> Iterator[tuple[str, str]]:
    """Yield all expressions of the rules and of the dashboard, each with what is shown of it."""
    rules = (_CONTRIB / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    for rule in rules.split("- alert: ")[1:]:
        expression, _, rest = rule.partition("expr:")[2].partition("labels:")
        yield re.sub(r"\s+", " ", re.sub(r"^ *>-|^ +for: \w+$", "", expression,
                                         flags=re.MULTILINE)), rest
    dashboard = json.loads((_CONTRIB / "grafana" / "persipubsub.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        assert panel["targets"] and panel["title"] and panel["datasource"]
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


def test_rules_and_dashboard_speak_of_what_is_exposed(tmp_path: Path) -> None:
    known = exposed(tmp_path)
    used: set[str] = set()
    for expression, shown in expressions():
        names = set(re.findall(r"persipubsub_\w+", expression))
        assert names and names <= set(known), expression
        used |= names
        labels = set.intersection(*(known[name] for name in names)) | {"instance"}
        grouped = re.search(r"by \(([\w, ]+)\)", expression)
        assert set(grouped.group(1).split(", ") if grouped else []) <= labels, expression
        for label in re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", shown):
            assert label in labels, (expression, label)
        for label in re.findall(r"(\w+)(?:=~|!=)\"", expression):
            assert label in labels, (expression, label)
    # Who watches sees all of it, but for what is of interest only if something else is wrong.
    unused = set(known) - used
    assert unused == {
        f"persipubsub_{name}"
        for name in ("queue_messages", "queue_message_bytes", "queue_commits_total",
                     "messages_skipped_total", "subscriber_last_acknowledged_age_seconds")
    }


def test_rules_are_right(tmp_path: Path) -> None:
    promtool("check", "rules", _CONTRIB / "prometheus" / "rules.yml")
    promtool("test", "rules", _CONTRIB / "prometheus" / "rules-test.yml")
    lines = ["groups:", "- name: dashboard", "  rules:"]
    for index, (expression, _) in enumerate(expressions()):
        expression = expression.replace("$__rate_interval", "5m").replace("$queue", ".*")
        lines += [f"  - record: a{index}", f"    expr: {json.dumps(expression)}"]
    (tmp_path / "dashboard.yml").write_text("\n".join(lines), encoding="utf-8")
    promtool("check", "rules", tmp_path / "dashboard.yml")


# What machines are set up with


def test_units_are_right(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian: apt-get install systemd)")
    for unit in (_CONTRIB / "systemd").iterdir():
        text = unit.read_text(encoding="utf-8")
        (tmp_path / unit.name).write_text(re.sub(r"/opt/app/bin/\w+", "/bin/true", text))
    units = sorted(tmp_path.iterdir())
    assert len(units) == 3
    process = support.run(["systemd-analyze", "verify", "--man=no", *units])
    # It finds what is wrong, and yet exits with 0.
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_compose_file_is_right() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is missing (Debian: apt-get install docker-compose)")
    process = support.run(
        ["docker-compose", "-f", _CONTRIB / "compose.yaml", "config", "--format", "json"])
    assert process.returncode == 0 and process.stderr == ""
    services: Mapping[str, Any] = json.loads(process.stdout)["services"]
    assert set(services) == {"queues", "worker", "metrics"}
    for name, service in services.items():
        assert service["user"] == "1000:1000" and service["volumes"][0]["target"] == "/srv/queues"
        assert name == "queues" or service["pid"] == "service:queues"


def commands_of(path: Path) -> list[list[str]]:
    """Return the commands ``persipubsub`` of a file, as words."""
    text = path.read_text(encoding="utf-8").replace('", "', " ")
    found = re.findall(r"(?:[=/ ]|\")persipubsub ([a-z][\w./ :-]*)", text)
    return [command.split() for command in found]


@pytest.mark.parametrize("path", [
    *sorted((_CONTRIB / "systemd").iterdir()), _CONTRIB / "compose.yaml",
    _CONTRIB / "prometheus" / "rules.yml"
],
                         ids=lambda path: str(path.name))
def test_commands_of_contrib_are_there(path: Path) -> None:
    commands = commands_of(path)
    assert commands or "worker" in path.name
    for name, *words in commands:
        known = {option for one in test_cli.COMMANDS[name].params for option in one.opts}
        assert {word for word in words if word.startswith("--")} <= known, (path, words)


def test_metrics_unit_stops_as_it_says(tmp_path: Path) -> None:
    unit = (_CONTRIB / "systemd" / "persipubsub-metrics.service").read_text(encoding="utf-8")
    assert "KillSignal=SIGINT\nSuccessExitStatus=130\n" in unit
    command = re.search(r"^ExecStart=/opt/app/bin/persipubsub (.*)$", unit, re.MULTILINE)
    assert command is not None
    words = command.group(1).replace("9464", "0").split()
    variables = {"PERSIPUBSUB_CONFIG": str(support.make_queue(tmp_path))}
    with test_cli.start(*words, variables=variables) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(b"Serving ")
        process.send_signal(2)
        assert process.wait(timeout=support.HANG_SECS) == 130

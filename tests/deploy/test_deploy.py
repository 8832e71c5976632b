"""The Dockerfile and what stands in deploy/, each part held against the others: no engine for containers is needed."""

import fnmatch
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from starlette.testclient import TestClient

import hrm
from hrm.config import ServeConfig
from hrm.config.compose import compose
from hrm.results import open_store
from hrm.service.command import settings_of
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.service.results import Results
from hrm.tasks.form import PuzzleForm
from tests.helpers.entry_points import ROOT
from tests.helpers.inference import untrained

DEPLOY = ROOT / "deploy"
SECRETS = {"REDIS_PASSWORD": "of-no-use", "POSTGRES_PASSWORD": "of-no-use-either", "GRAFANA_PASSWORD": "nor-this"}


# ---- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, each with what follows it."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def test_what_is_copied_is_there_and_travels() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*", "all is left out but what is named"
    named = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {path for name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]}
    assert copied == named
    for path in copied:
        assert (ROOT / path).exists()
    tracked = subprocess.run(["git", "ls-files", "hrm", "config"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        left_out = [line for line in ignored[1:] if not line.startswith("!")]
        assert [
            file
            for file in tracked.stdout.split()
            if any(fnmatch.fnmatch(f"/{file}", f"*/{pattern.removeprefix('**/')}") for pattern in left_out)
        ] == []


def test_it_runs_as_a_user_of_its_own_and_takes_signals() -> None:
    names = [name for name, _ in instructions()]
    assert last("USER") not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")
    entry, command = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))  # as JSON there is no shell in between
    assert entry[:2] == ["hrm", "serve"]
    config = compose(ServeConfig, "serve", [*entry[2:], *command])
    assert (config.host, config.port, config.checkpoint) == ("0.0.0.0", 8000, "sudoku")
    assert last("EXPOSE") == str(config.port)


def test_its_extras_are_ours() -> None:
    (asked,) = [re.findall(r"\*\.whl\)\[([\w,]+)\]", rest) for name, rest in instructions() if "*.whl" in rest]
    project = (ROOT / "pyproject.toml").read_text()
    for extra in asked[0].split(","):
        assert f"\n{extra} = [" in project
    assert "'torch>=2.9,<2.14'" in (ROOT / "Dockerfile").read_text()
    assert '"torch>=2.9,<2.14"' in project


def test_the_health_check_tells(service: str) -> None:
    """The command in the Dockerfile, at another port: it succeeds while the service answers, and not after."""
    command = json.loads(last("HEALTHCHECK").partition("CMD")[2])
    assert command[:2] == ["python", "-c"]
    assert "127.0.0.1:8000/healthz" in command[2]
    here = command[2].replace("127.0.0.1:8000", service)
    exec(here, {})  # as a process it would take a second
    with pytest.raises(OSError, match="refused"):
        exec(here.replace(service, "127.0.0.1:1"), {})


def test_hadolint() -> None:
    program = shutil.which("hadolint") or pytest.skip("hadolint is not installed")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


# ---- compose


def composed(*files: str) -> dict[str, Any]:
    """A compose file as Compose reads it: variables filled in, `$$` for `$`."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        if not isinstance(value, str):
            return value

        def one(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            name, kind, rest = match[1], match[2], match[3]
            if kind == ":?":
                return SECRETS[name]
            assert kind == ":-", f"{name} has neither a default nor a sentence"
            return rest

        return re.sub(r"\$\$|\$\{(\w+)(:-|:\?)?([^}]*)\}", one, value)

    (content,) = [yaml.safe_load((DEPLOY / file).read_text()) for file in files]
    found: dict[str, Any] = filled(content)
    return found


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_keep_to_the_specification(file: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    package = find_spec("check_jsonschema") or pytest.skip("check-jsonschema, which has the schema, is not installed")
    assert package.origin is not None
    schema = Path(package.origin).parent / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(yaml.safe_load((DEPLOY / file).read_text()), json.loads(schema.read_text()))


def test_services_fit_together() -> None:
    content = composed("compose.yaml")
    services = content["services"]
    used = set()
    for name, service in services.items():
        assert "healthcheck" in service or name == "service", "the image has its own"
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert other in services
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing here has a password that is meant for the world"
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            assert target.startswith("/")
            if not source.startswith("."):
                used.add(source)
            elif source != "./models":  # which the user makes
                assert (DEPLOY / source).exists()
                assert volume.endswith(":ro")
    assert used == set(content["volumes"])
    over = composed("compose.gpu.yaml")["services"]
    assert set(over) == {"service"}
    assert services["service"]["build"]["args"].keys() == {"TORCH_INDEX"}
    assert "ARG TORCH_INDEX=\n" in (ROOT / "Dockerfile").read_text()
    assert not {"redis", "postgres"} & {name for name, service in services.items() if "ports" in service}


def test_the_command_of_the_service_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    service = composed("compose.yaml")["services"]["service"]
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value)
    config = compose(ServeConfig, "serve", service["command"])
    assert config.checkpoint == "sudoku"
    assert config.memory == f"redis://:{SECRETS['REDIS_PASSWORD']}@redis:6379/0"
    assert config.results == f"postgresql://hrm:{SECRETS['POSTGRES_PASSWORD']}@postgres:5432/hrm"
    assert not [word for word in service["command"] for secret in SECRETS.values() if secret in word]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > config.seconds_to_drain + 5, "what is drained and recorded is not killed"


def test_passwords_are_asked_for_and_have_no_default() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == set(SECRETS)
    assert not re.findall(r"\$\{\w*PASSWORD:?-", text)
    example = dict(line.split("=", 1) for line in (DEPLOY / "example.env").read_text().splitlines() if "=" in line)
    assert {name for name, value in example.items() if not value} == set(SECRETS)
    assert set(example) <= set(re.findall(r"\$\{(\w+)", text))
    assert "/deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_prometheus_and_grafana_ask_is_there() -> None:
    services = composed("compose.yaml")["services"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["job_name"] == "hrm"
    assert job["static_configs"] == [{"targets": ["service:8000"]}]
    assert "./rules.yaml:/etc/prometheus/rules.yaml:ro" in services["prometheus"]["volumes"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/hrm.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/hrm.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/hrm.json"
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in dashboard["panels"]]
    assert all(x + width <= 24 for x, _, width, _ in places)
    cells = [(x + i, y + j) for x, y, width, height in places for i in range(width) for j in range(height)]
    assert len(cells) == len(set(cells)), "panels do not overlap"


# ---- metrics


@contextmanager
def running(folder: Path) -> Iterator[TestClient]:
    form = PuzzleForm("sudoku", 16, 6)
    model = hrm.from_pretrained(untrained(folder / "model", form), device="cpu")
    results = Results(open_store(f"sqlite:///{folder}/results.sqlite"), 1 << 20, "small", "0" * 64)
    config = ServeConfig(checkpoint="none", most_waiting=99)
    with TestClient(make_app(Engine(model, 4), config, "small", results)) as client:
        assert client.post("/infer", json={"inputs": ["1" + 15 * "."]}).status_code == 200
        yield client


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a service that has answered a request tells Prometheus."""
    with running(tmp_path_factory.mktemp("metrics")) as client:
        return client.get("/metrics").text


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a service."""
    model = hrm.from_pretrained(
        untrained(tmp_path_factory.mktemp("service") / "model", PuzzleForm("sudoku", 16, 6)), device="cpu"
    )
    config = ServeConfig(checkpoint="none")
    server = uvicorn.Server(settings_of(make_app(Engine(model, 1), config, "small"), config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def queries() -> dict[str, str]:
    """PromQL of alerts and panels, by their names."""
    found = {}
    for group in yaml.safe_load((DEPLOY / "rules.yaml").read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    for panel in json.loads((DEPLOY / "grafana/dashboards/hrm.json").read_text())["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


@pytest.mark.parametrize(("name", "query"), queries().items())
def test_metrics_and_labels_exist(name: str, query: str, metrics: str) -> None:
    labels: dict[str, set[str]] = {}
    for line in metrics.splitlines():
        if line[0] != "#":
            series, _, rest = line.partition(" ")[0].partition("{")
            labels.setdefault(series, set()).update(re.findall(r"(\w+)=", rest))
    named = re.findall(r"\b((?:hrm|process)_\w+)(\{[^}]*\})?", query)
    assert named or "up{" in query
    for series, selector in named:
        assert series in labels, f"{name} asks for {series}, which /metrics does not have"
        asked = set(re.findall(r"(\w+)=~?", selector)) - {"instance", "job"}  # which Prometheus adds
        assert asked <= labels[series]


def test_the_limit_of_the_queue_is_told(metrics: str) -> None:
    assert "hrm_queue_limit 99.0" in metrics


def test_docs_tell_of_every_metric_and_alert(metrics: str) -> None:
    page = (ROOT / "docs/operating.md").read_text()
    names = re.findall(r"^# TYPE (hrm_\w+) (?:counter|gauge|histogram)$", metrics, re.MULTILINE)
    assert len(names) >= 12
    for name in names:
        if not name.endswith("_created"):
            assert f"`{name}`" in page
    for group in yaml.safe_load((DEPLOY / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert f"`{rule['alert']}`" in page


def test_promtool(tmp_path: Path) -> None:
    program = shutil.which("promtool") or pytest.skip("promtool is not installed")

    def succeeds(*arguments: str | Path) -> None:
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    succeeds("check", "config", DEPLOY / "prometheus.yaml")  # and the rules
    test = (Path(__file__).parent / "rules.test.yaml").read_text()
    (tmp_path / "rules.test.yaml").write_text(test.replace("- RULES\n", f"- {DEPLOY / 'rules.yaml'}\n"))
    succeeds("test", "rules", tmp_path / "rules.test.yaml")
    alerts = {rule["alert"] for rule in yaml.safe_load((DEPLOY / "rules.yaml").read_text())["groups"][0]["rules"]}
    assert alerts == set(re.findall(r"alertname: (\w+)", test))

"""The image and the compose files: their commands are the server's, and the dashboard shows the server's metrics."""

import json
import re
import subprocess
import sys
import tomllib

import httpx
import pytest
import yaml
from http_bodies import as_json
from pages import ROOT
from prometheus_client.parser import text_string_to_metric_families

from openvla_hf.cli import build_parser, main
from openvla_hf.serving.token import TOKEN_VARIABLE


DOCKER = ROOT / "docker"
TOKEN = {"Authorization": "Bearer s3cret"}
LINES = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES.replace("\\\n", "").splitlines() if line]


def last(instruction):
    return [arguments for name, arguments in INSTRUCTIONS if name == instruction][-1]


def read_yaml(name):
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


PROGRAM, *ENTRYPOINT = json.loads(last("ENTRYPOINT"))
HEALTH_CHECK = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
COMPOSE = read_yaml("compose.yaml")


@pytest.fixture(scope="module")
def url(serve, plain_policy):
    with serve(plain_policy, token="s3cret") as url:
        yield url


def test_the_image_does_not_serve_without_a_token(monkeypatch, capsys):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert PROGRAM == "openvla-hf"
    assert main(ENTRYPOINT) == 2
    assert "Everyone who reaches 0.0.0.0 could command the robot" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["compose.yaml", "compose.cuda.yaml"])
def test_a_compose_file_starts_the_server_with_its_options_and_the_token(file, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    command = read_yaml(file)["services"]["server"]["command"]
    command = [word.replace("/run/secrets", str(tmp_path)).replace("cuda", "cpu") for word in command]
    args = build_parser().parse_args([*ENTRYPOINT, *command])
    assert (args.token_file, args.no_token) == (str(tmp_path / "token"), False)
    assert args.port == int(last("EXPOSE"))


def test_what_the_image_is_built_from_is_in_the_repository_and_in_the_context():
    context = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for name, rest in INSTRUCTIONS if name == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in context
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", LINES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    assert last("USER") == "1000"


def test_the_containers_find_their_files_and_only_this_machine_reaches_them():
    build = COMPOSE["services"]["server"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    assert last("VOLUME") in [volume.split(":")[1] for volume in COMPOSE["services"]["server"]["volumes"]]
    for service in COMPOSE["services"].values():
        assert {*service.get("secrets", [])} <= {*COMPOSE["secrets"]}
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DOCKER / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${OPENVLA_ADDRESS:-127.0.0.1}:"))


def test_the_health_check_tells_a_server_from_none(url):
    python, option, code = HEALTH_CHECK
    assert (python, option) == ("python", "-c")
    for port, status in ((url.rpartition(":")[2], 0), ("1", 1)):
        checked = subprocess.run([sys.executable, "-c", code.replace(last("EXPOSE"), port)], stderr=subprocess.PIPE)
        assert checked.returncode == status, checked.stderr


def test_prometheus_and_the_dashboard_find_every_metric_of_a_server(url, plain_policy, make_observation):
    (job,) = read_yaml("prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{last('EXPOSE')}"]}]
    assert job["authorization"] == {"credentials_file": "/run/secrets/token"}  # sent as a bearer token
    observation = as_json(make_observation(plain_policy))
    assert httpx.post(f"{url}/v1/act", json=observation, headers=TOKEN, timeout=30).status_code == 200
    scraped = httpx.get(url + job.get("metrics_path", "/metrics"), headers=TOKEN)
    families = [*text_string_to_metric_families(scraped.raise_for_status().text)]
    labels = {}  # of each metric
    for sample in [sample for family in families for sample in family.samples]:
        labels.setdefault(sample.name, {}).update(sample.labels)

    dashboard = json.loads((DOCKER / "grafana/dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set()
    for query in queries:
        names = {*re.findall(r"openvla_\w+", query)}
        assert names <= {*labels}, query
        grouped = ", ".join(re.findall(r"by \((.*?)\)", query)).split(", ")
        assert {*grouped, *re.findall(r"(\w+)!?=", query)} - {""} <= set().union(*map(labels.get, names)), query
        shown |= names
    for family in families:
        assert family.name.endswith("_created") or any(name.startswith(family.name) for name in shown), family.name
    (source,) = read_yaml("grafana/datasource.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert source["url"].startswith("http://prometheus:")
    assert "prometheus" in COMPOSE["services"]

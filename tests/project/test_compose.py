"""The compose files: valid by the specification, and everything they name is there and agrees."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.try_dockerfile import instructions

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
FILES = ["compose.yaml", "compose.cuda.yaml"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


SERVICES = load("compose.yaml")["services"]
SCRAPED = load("prometheus/prometheus.yml")["scrape_configs"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container: what is mounted there."""
    return {place: what for what, place, *_ in (m.split(":") for m in service["volumes"])}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_a_compose_file(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", name],
        cwd=DOCKER,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_that_are_not_built_here_are_pinned() -> None:
    pulled = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert len(pulled) == 2
    for image in pulled:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", image)


@pytest.mark.parametrize(
    ("name", "built"), [(FILES[0], "Dockerfile"), (FILES[1], "Dockerfile.cuda")]
)
def test_the_server_is_built_from_a_dockerfile(name: str, built: str) -> None:
    build = SERVICES["ouro"]["build"] | load(name)["services"]["ouro"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / built


def test_nobody_is_root_or_may_become_it() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert not service["user"].startswith(("0", "root")), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_mounted_file_exists_and_is_read_only() -> None:
    for service in SERVICES.values():
        for mount in service["volumes"]:
            if mount.startswith("."):
                what, _, how = mount.split(":")
                assert (DOCKER / what).exists(), mount
                assert how == "ro"
            else:
                assert mount.split(":")[0] in load("compose.yaml")["volumes"]


def test_ports_are_those_that_are_listened_on_and_asked() -> None:
    """Published on loopback only; the health checks and the scrape ask the same ports."""
    ports = {}
    for name, service in SERVICES.items():
        (port,) = service["ports"]
        address, published, inside = port.split(":")
        assert (address, published) == ("127.0.0.1", inside)
        ports[name] = inside
    dockerfile = list(instructions((DOCKER / "Dockerfile").read_text()))
    assert ports["ouro"] in [step.rest for step in dockerfile if step.kind == "EXPOSE"]
    for name in ("prometheus", "grafana"):
        assert f"127.0.0.1:{ports[name]}/" in SERVICES[name]["healthcheck"]["test"][-1]
    assert SCRAPED[0]["static_configs"][0]["targets"] == [f"ouro:{ports['ouro']}"]
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == f"http://prometheus:{ports['prometheus']}"


def test_every_service_is_asked_for_its_health() -> None:
    dockerfile = instructions((DOCKER / "Dockerfile").read_text())
    assert "HEALTHCHECK" in [step.kind for step in dockerfile]
    for service in SERVICES.values():
        assert "build" in service or service["healthcheck"]["test"]
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}


def test_configuration_is_mounted_where_it_is_read() -> None:
    prometheus = SERVICES["prometheus"]
    read = next(c for c in prometheus["command"] if c.startswith("--config.file="))
    assert mounts(prometheus)[str(Path(read.partition("=")[2]).parent)] == "./prometheus"
    for name in load("prometheus/prometheus.yml")["rule_files"]:
        assert (DOCKER / "prometheus" / name).exists()
    grafana = SERVICES["grafana"]
    (provider,) = load("grafana/provisioning/dashboards/ouro.yaml")["providers"]
    assert mounts(grafana)[provider["options"]["path"]] == "./grafana/dashboards"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DOCKER / "grafana/dashboards" / Path(home).name).exists()


def test_the_cache_is_the_server_users() -> None:
    """A named volume takes its owner from the image's folder; without one it would be root's."""
    assert "/home/ouro/.cache" in mounts(SERVICES["ouro"])
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (DOCKER / name).read_text()
        assert re.search(r"install --directory --owner ouro .* /home/ouro/\.cache\n", text)


def test_the_dashboard_reads_the_provisioned_source() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    dashboard = json.loads((DOCKER / "grafana/dashboards/ouro.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == source["uid"]

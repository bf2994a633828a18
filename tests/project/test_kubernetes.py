"""The Kubernetes manifests: valid by the schemas, and everything they name is there and agrees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker/k8s"
VERSIONS = ("1.31", kubernetes_validate.latest_version())
"""The oldest Kubernetes that the manifests are for, and the newest whose schemas are known."""

KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (one["kind"], one["metadata"]["name"]): one
    for name in KUSTOMIZATION["resources"]
    for one in yaml.safe_load_all((FOLDER / name).read_text())
}
"""By kind and name."""

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}


def exactly(optional: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """The schema of an object of these fields and no other."""
    required = [name for name in fields if name not in optional]
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


LABELS = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}
META = exactly(("labels",), name=TEXT, namespace={"const": "ouro"}, labels=LABELS)
BEHAVIOUR = exactly(
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=many(
        exactly(
            type={"enum": ["Pods", "Percent"]},
            value=COUNT,
            periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
        )
    ),
)
CUSTOM = {
    # From monitoring.coreos.com_podmonitors.yaml, the part in use.
    "PodMonitor": exactly(
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": "PodMonitor"},
        metadata=META,
        spec=exactly(
            selector=exactly(matchLabels=LABELS),
            podMetricsEndpoints=many(
                exactly(port=TEXT, path=TEXT, interval={"type": "string", "pattern": r"^\d+s$"})
            ),
        ),
    ),
    # From keda.sh_scaledobjects.yaml, the part in use; a trigger's metadata are strings.
    "ScaledObject": exactly(
        apiVersion={"const": "keda.sh/v1alpha1"},
        kind={"const": "ScaledObject"},
        metadata=META,
        spec=exactly(
            scaleTargetRef=exactly(name=TEXT),
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            pollingInterval=COUNT,
            fallback=exactly(failureThreshold=COUNT, replicas=COUNT),
            advanced=exactly(
                horizontalPodAutoscalerConfig=exactly(
                    behavior=exactly(scaleUp=BEHAVIOUR, scaleDown=BEHAVIOUR)
                )
            ),
            triggers=many(
                exactly(
                    type={"const": "prometheus"},
                    name=TEXT,
                    metadata=exactly(serverAddress=TEXT, query=TEXT, threshold=TEXT),
                )
            ),
        ),
    ),
}
"""Custom resources, whose schemas are in no package, by the shape that their definitions give."""


def pods(name: str) -> dict[str, Any]:
    return OBJECTS["Deployment", name]["spec"]["template"]


def container(name: str) -> dict[str, Any]:
    (only,) = pods(name)["spec"]["containers"]
    return only


def ports(name: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(name)["ports"]}


def check(one: dict[str, Any]) -> None:
    if one["kind"] in CUSTOM:
        jsonschema.validate(one, CUSTOM[one["kind"]])
        return
    for version in VERSIONS:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("key", OBJECTS, ids="-".join)
def test_the_object_is_valid(key: tuple[str, str]) -> None:
    check(OBJECTS[key])


@pytest.mark.parametrize(
    ("key", "field"),
    [(("Deployment", "ouro-serve"), "replica"), (("ScaledObject", "ouro-serve"), "maxReplicas")],
)
def test_a_wrong_field_is_found(key: tuple[str, str], field: str) -> None:
    wrong = OBJECTS[key] | {"spec": OBJECTS[key]["spec"] | {field: 1}}
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_every_file_is_a_resource_and_every_object_lies_in_the_namespace() -> None:
    files = {file.name for file in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files
    assert ("Namespace", KUSTOMIZATION["namespace"]) in OBJECTS
    for (kind, _), one in OBJECTS.items():
        assert kind == "Namespace" or one["metadata"]["namespace"] == KUSTOMIZATION["namespace"]


def test_images_are_replaced_or_pinned() -> None:
    replaced = {image["name"] for image in KUSTOMIZATION["images"]}
    assert container("ouro-serve")["image"] in replaced
    assert re.fullmatch(r"[a-z/-]+:v\d+\.\d+\.\d+", container("ouro-router")["image"])


@pytest.mark.parametrize("name", ["ouro-serve", "ouro-router"])
def test_selectors_find_the_pods_and_ports_their_names(name: str) -> None:
    labels = pods(name)["metadata"]["labels"]
    assert OBJECTS["Deployment", name]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service", name]["spec"]["selector"] == labels
    assert {p["targetPort"] for p in OBJECTS["Service", name]["spec"]["ports"]} <= set(ports(name))
    monitor = OBJECTS["PodMonitor", name]["spec"]
    assert monitor["selector"]["matchLabels"] == labels
    assert {point["port"] for point in monitor["podMetricsEndpoints"]} <= set(ports(name))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe in container(name):
            assert container(name)[probe]["httpGet"]["port"] in ports(name)


def test_the_router_finds_the_servers_and_may_look_for_them() -> None:
    args = container("ouro-router")["args"]
    ((key, value),) = pods("ouro-serve")["metadata"]["labels"].items()
    assert args[args.index("--selector") + 1] == f"{key}={value}"
    assert f"--service-discovery-port={ports('ouro-serve')['http']}" in args
    assert f"--service-discovery-namespace={KUSTOMIZATION['namespace']}" in args
    assert f"--port={ports('ouro-router')['http']}" in args
    assert f"--prometheus-port={ports('ouro-router')['metrics']}" in args
    account = pods("ouro-router")["spec"]["serviceAccountName"]
    binding = OBJECTS["RoleBinding", account]
    assert ("ServiceAccount", account) in OBJECTS
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    (rule,) = OBJECTS[binding["roleRef"]["kind"], binding["roleRef"]["name"]]["rules"]
    assert (rule["resources"], rule["verbs"]) == (["pods"], ["get", "list", "watch"])


def test_a_start_may_take_as_long_as_in_docker() -> None:
    """And a pod that is told to go has time for the requests that it runs."""
    probe = container("ouro-serve")["startupProbe"]
    health = re.search(r"--start-period=(\d+)m", (ROOT / "docker/Dockerfile.cuda").read_text())
    assert health and probe["periodSeconds"] * probe["failureThreshold"] >= 60 * int(health[1])
    pause = container("ouro-serve")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pods("ouro-serve")["spec"]["terminationGracePeriodSeconds"] >= pause + 60


def test_nobody_is_root_or_may_become_it() -> None:
    for name in ("ouro-serve", "ouro-router"):
        assert pods(name)["spec"]["securityContext"]["runAsNonRoot"] is True
        own = container(name)["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}


def test_the_autoscaler_alone_says_how_many_servers_there_are() -> None:
    scaled = OBJECTS["ScaledObject", "ouro-serve"]["spec"]
    assert "replicas" not in OBJECTS["Deployment", scaled["scaleTargetRef"]["name"]]["spec"]
    assert scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]


def test_the_documentation_makes_the_secret_that_the_pods_read() -> None:
    (variable,) = container("ouro-serve")["env"]
    secret = variable["valueFrom"]["secretKeyRef"]
    command = f"create secret generic {secret['name']} --from-literal={secret['key']}="
    assert command in (ROOT / "docs/cluster.md").read_text()

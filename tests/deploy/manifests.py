"""What the files under deploy/ hold, and their schemas."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = sorted(KUBERNETES.rglob("*.yaml"))
VERSIONS = ("1.30", "1.37")  # of Kubernetes: the oldest and the newest that is checked
LWS = "leaderworkerset.sigs.k8s.io/"
SERVER, ROUTER = "sglang_ess.launch_server", "sglang_router.launch_router"

COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
META = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        "namespace": TEXT,
        **{key: {"additionalProperties": TEXT} for key in ("labels", "annotations")},
    },
    "additionalProperties": False,
}


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """Schema of an object with these properties alone."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def resource(version: str, kind: str, **properties: Any) -> dict[str, Any]:
    head = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return closed("apiVersion", "kind", *properties, **head, **properties)


TEMPLATE = {"type": "object", "required": ["spec"]}  # checked as a Pod
# The fields of resources that Kubernetes does not define. Sources: kubernetes-sigs/lws,
# api/leaderworkerset/v1/leaderworkerset_types.go; prometheus-operator 0.91, the PodMonitor in
# example/prometheus-operator-crd; kustomize's reference of kustomization.yaml.
SCHEMAS = {
    "LeaderWorkerSet": resource(
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
        metadata=META,
        spec=closed(
            "leaderWorkerTemplate",
            replicas=COUNT,
            startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
            rolloutStrategy={"type": "object"},
            networkConfig=closed(subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
            leaderWorkerTemplate=closed(
                "workerTemplate",
                leaderTemplate=TEMPLATE,
                workerTemplate=TEMPLATE,
                size={"type": "integer", "minimum": 1},
                restartPolicy={
                    "enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
                },
            ),
        ),
    ),
    "PodMonitor": resource(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        metadata=META,
        spec=closed(
            "selector",
            "podMetricsEndpoints",
            selector=closed(matchLabels={"additionalProperties": TEXT, "minProperties": 1}),
            podTargetLabels=TEXTS,
            podMetricsEndpoints={
                "type": "array",
                "minItems": 1,
                "items": closed(
                    "port",
                    port=TEXT,
                    path=TEXT,
                    interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                    scrapeTimeout={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                ),
            },
        ),
    ),
    "Kustomization": closed(
        "apiVersion",
        "kind",
        "resources",
        apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
        kind={"const": "Kustomization"},
        namespace=TEXT,
        resources=TEXTS,
        images={"type": "array", "items": closed("name", name=TEXT, newName=TEXT, newTag=TEXT)},
    ),
}


def documents(text: str) -> list[dict[str, Any]]:
    """The resources of a file. YAML's anchors give one object in two places: each gets its own."""
    return [copy.deepcopy(found) for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def everything() -> list[dict[str, Any]]:
    """All resources of deploy/kubernetes but its kustomization files."""
    files = [file for file in MANIFESTS if file.name != "kustomization.yaml"]
    return [found for file in files for found in documents(file.read_text())]


def schema_problems(document: dict[str, Any]) -> list[str]:
    """What Kubernetes' schemas, or ours for other resources, do not allow. One line each."""
    if (schema := SCHEMAS.get(document.get("kind", ""))) is None:
        return _core_problems(document)
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    lines = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]
    if document["kind"] == "LeaderWorkerSet" and not lines:
        group = document["spec"]["leaderWorkerTemplate"]
        for name in ("leaderTemplate", "workerTemplate"):
            if template := group.get(name):
                pod = {"apiVersion": "v1", "kind": "Pod", **template}
                lines += [f"{name}: {line}" for line in _core_problems(pod)]
    return lines


def _core_problems(document: dict[str, Any]) -> list[str]:
    return list(_core_lines(json.dumps(document)))


@cache  # reading the schemas takes most of the time, and a corruption changes one resource
def _core_lines(text: str) -> tuple[str, ...]:
    document, lines = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError as error:
            lines.append(error.message)
        except kubernetes_validate.ValidationError as error:
            lines.append(f"{version}: {'.'.join(map(str, error.path))}: {error.message}")
    return tuple(lines)


@dataclass(frozen=True)
class Pod:
    """A pod as its controller makes it. index: in its group; size: pods of the group"""

    owner: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: dict[str, Any]
    index: int
    size: int

    @property
    def container(self) -> dict[str, Any]:
        """The only container that is not an init container."""
        (only,) = self.spec["containers"]
        return only

    @property
    def env(self) -> dict[str, str]:
        """Variables: those that LeaderWorkerSet's webhook adds, and the container's own."""
        group = {
            "LWS_LEADER_ADDRESS": f"{self.owner}-0.{self.owner}",
            "LWS_GROUP_SIZE": str(self.size),
            "LWS_WORKER_INDEX": str(self.index),
        }
        own = self.container.get("env", ())
        return group | {one["name"]: one.get("value", "from-the-cluster") for one in own}

    @property
    def argv(self) -> list[str]:
        """Command and arguments, with $(NAME) replaced as Kubernetes does."""
        words = [*self.container.get("command", ()), *self.container.get("args", ())]
        return [re.sub(r"\$\((\w+)\)", lambda name: self.env[name[1]], word) for word in words]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    def runs(self, module: str) -> bool:
        return self.argv[:3] == ["python3", "-m", module]

    def matches(self, labels: dict[str, str]) -> bool:
        return labels.items() <= self.labels.items()


def pods(found: list[dict[str, Any]]) -> Iterator[Pod]:
    """The pods that these resources make: of a LeaderWorkerSet one group, of others one."""
    for document in found:
        name, kind = document["metadata"]["name"], document["kind"]
        if kind == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            templates = [group.get("leaderTemplate", group["workerTemplate"])]
            templates += [group["workerTemplate"]] * (group["size"] - 1)
        elif kind in ("Deployment", "DaemonSet"):
            templates = [document["spec"]["template"]]
        else:
            continue
        for index, template in enumerate(templates):
            meta = template["metadata"]
            labels = dict(meta.get("labels", {}))
            if kind == "LeaderWorkerSet":
                labels |= {f"{LWS}name": name, f"{LWS}worker-index": str(index)}
            annotations = meta.get("annotations", {})
            yield Pod(name, labels, annotations, template["spec"], index, len(templates))


UNITS = {"": 1, "Mi": 1 << 20, "Gi": 1 << 30, "mb": 1 << 20, "gb": 1 << 30}  # Docker's are binary


def quantity(text: str) -> int:
    """Bytes of `1056Gi`, or of Docker's `896gb`."""
    number, unit = re.fullmatch(r"(\d+)(\D*)", text).groups()
    return int(number) * UNITS[unit]


def seconds(text: str) -> int:
    """Seconds of Docker's `180s`."""
    return int(re.fullmatch(r"(\d+)s", text)[1])

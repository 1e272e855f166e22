"""The manifests of deploy/kubernetes: schemas, commands, ports, memory, ends. Nothing runs them."""

import re

import pytest
import yaml

from tests.deploy import manifests, rules
from tests.deploy.manifests import KUBERNETES, MANIFESTS, ROUTER, SERVER, Pod
from tests.deploy.rules import Server


def servers(made: list[Pod]) -> list[tuple[Pod, Server]]:
    """The pods that run a launcher, with their commands as the launcher reads them."""
    return [
        (pod, Server.of(tuple(pod.argv[3:]), manifests.quantity(_limits(pod)["memory"])))
        for pod in made
        if pod.runs(SERVER)
    ]


def _limits(pod):
    return pod.container["resources"]["limits"]


def problems(found, monkeypatch) -> list[str]:
    """Everything that these resources break."""
    if lines := [line for document in found for line in manifests.schema_problems(document)]:
        return lines
    made = list(manifests.pods(found))
    lines = rules.network_problems(found, made)
    try:
        read = servers(made)
    except ValueError as error:
        return [str(error)]
    for pod, server in read:
        others = [rules.delay_of(one) for one in made if one.owner == pod.owner and one.index]
        limit = pod.spec["terminationGracePeriodSeconds"]
        lines += rules.launcher_problems(server, monkeypatch)
        lines += rules.memory_problems(server) + rules.pod_problems(pod, server, HEALTH_SECONDS)
        if pod.index == 0:
            lines += rules.stop_problems(server, rules.delay_of(pod), limit, others)
    for pod in made:
        if pod.runs(ROUTER):
            try:
                lines += rules.router_problems(pod, made)
            except SystemExit:
                lines.append("router refuses its flags")
    sides = {server.args.disaggregation_mode: server for _, server in read}
    if "decode" in sides:
        lines += rules.pair_problems(sides["prefill"], sides["decode"])
    return lines


HEALTH_SECONDS = rules.health_seconds()


def changed(old: str, new: str, count: int = 1) -> list[dict]:
    """All resources, with one piece of text replaced in the files that have it."""
    text = "\n---\n".join(
        file.read_text() for file in MANIFESTS if file.name != "kustomization.yaml"
    )
    assert text.count(old) >= count, old
    return manifests.documents(text.replace(old, new, count))


def test_everything_agrees(monkeypatch):
    assert problems(manifests.everything(), monkeypatch) == []


def test_what_there_is():
    """So that a filter that finds nothing is noticed."""
    made = list(manifests.pods(manifests.everything()))
    read = servers(made)
    assert [(pod.owner, pod.index) for pod, _ in read] == [
        ("glm", 0), ("glm", 1), ("glm-decode", 0), ("glm-prefill", 0)
    ]  # fmt: skip
    assert [server.tiers for _, server in read] == [1, 1, 8, 0]
    assert sum(pod.runs(ROUTER) for pod in made) == 1
    kinds = {document["kind"] for document in manifests.everything()}
    assert {"LeaderWorkerSet", "Deployment", "Service", "PodMonitor", "Role"} <= kinds


# (text, what stands there instead, a part of the line that must come)
CORRUPTIONS = [
    # Schemas.
    ("containerPort: 30000", "containerPort: thirty", "is not of type 'integer'"),
    ("livenessProbe:", "livenesProbe:", "'livenesProbe' was unexpected"),
    ("readOnly: true\n", "readonly: true\n", "'readonly' was unexpected"),
    ("    size: 2", "    sise: 2", "'sise' was unexpected"),
    ("startupPolicy: LeaderCreated", "startupPolicy: Leader", "is not one of"),
    ("podMetricsEndpoints:", "endpoints:", "'endpoints' was unexpected"),
    ("kind: DaemonSet", "kind: DaemonSett", "Couldn't find schema for kind DaemonSett"),
    # Commands.
    ("--ess-hot-ratio", "--ess-hot-ration", "--ess-hot-ration"),
    ("--served-model-name", "--served-modelname", "--served-modelname"),
    ("--kv-cache-dtype=fp8_e4m3", "--kv-cache-dtype=fp7", "fp7"),
    ("--ess-itl-ms=60", "--ess-overlap=always", "ess-overlap"),
    ("--ess-hot-ratio=0.2", "--pp-size=2", "--pp-size must be 1"),
    ("--ess-hot-ratio=0.1", "--disaggregation-transfer-backend=ascend", "transfer-backend"),
    ("--node-rank=$(LWS_WORKER_INDEX)", "--node-rank=2", "--node-rank must be below"),
    ("--node-rank=$(LWS_WORKER_INDEX)", "--node-rank=0", "nodes must be the group's pods"),
    ("--service-discovery-port", "--service-discovery-prt", "router refuses"),
    ("--prefill-policy=cache_aware", "--prefill-policy=cash_aware", "router refuses"),
    # Ports.
    ("--port=30000", "--port=30001", "must ask port 30001"),
    ("containerPort: 20000", "containerPort: 20001", "'dist-init': 20000"),
    ("):20000", "):20001", "'launchers': 20000"),
    ("--disaggregation-bootstrap-port=8998", "--disaggregation-bootstrap-port=8999", "annotated"),
    ("--service-discovery-port=30000", "--service-discovery-port=80", "discovery must ask"),
    ("path: /health\n", "path: /ready\n", "must ask /health"),
    ("targetPort: http", "targetPort: https", "must name a port"),
    ('worker-index: "0"', 'worker-index: "1"', "must select leaders"),
    ("component: router", "component: rooter", "must select a pod"),
    ("- port: metrics", "- port: http2", "PodMonitor sglang-ess-router must name a port"),
    ("              - --enable-metrics\n", "", "must have --enable-metrics"),
    ("component=decode\n", "component=prefill\n", "must select decode leaders"),
    # Memory.
    ("memory: 1056Gi", "memory: 1024Gi", "must leave 208 GiB to host tiers"),
    ("--ess-host-gib=208", "--ess-host-gib=199", "--ess-host-gib must hold 199.9 GiB"),
    ("--ess-host-gib=832", "--ess-host-gib=104", "--ess-host-gib must hold 799.5 GiB"),
    ("--max-total-tokens=4194304", "--max-total-tokens=7340032", "device must hold"),
    ("--max-total-tokens=524288", "--max-total-tokens=786432", "in one tier"),
    ("--max-total-tokens=4194304", "--max-total-tokens=1000000", "context must fit"),
    ("sizeLimit: 32Gi", "sizeLimit: 64Mi", "/dev/shm must have"),
    ("mountPath: /dev/shm", "mountPath: /shm", "/dev/shm must be in memory"),
    ("mountPath: /models", "mountPath: /weights", "model must be on a volume"),
    ("add: [IPC_LOCK, SYS_NICE]", "add: [SYS_NICE]", "capabilities"),
    ('nvidia.com/gpu: "8"', 'nvidia.com/gpu: "4"', "GPUs must be"),
    # Ends and starts.
    ("--ess-grace-seconds=120", "--ess-grace-seconds=170", "grace must end before the kill"),
    ("terminationGracePeriodSeconds: 180", "terminationGracePeriodSeconds: 140", "grace must"),
    ('[sleep, "10"]', "[sh, -c, 'sleep $((10 - 9 * LWS_WORKER_INDEX))']", "a worker must wait"),
    ("--shutdown-grace-period-secs=120", "--shutdown-grace-period-secs=150", "router's grace"),
    ("timeoutSeconds: 30", "timeoutSeconds: 5", "must wait over 20 s"),
    ("failureThreshold: 360", "failureThreshold: 30", "start must have"),
    # Prefill and decode.
    ("--context-length=262144", "--context-length=131072", "context_length must be the same"),
]


@pytest.mark.parametrize(
    ("old", "new", "part"), CORRUPTIONS, ids=[c[1].strip() for c in CORRUPTIONS]
)
def test_a_corruption_is_noticed(monkeypatch, old, new, part):
    lines = problems(changed(old, new), monkeypatch)
    assert any(part in line for line in lines), lines


def test_requests_are_the_limits(monkeypatch):
    found = manifests.everything()
    for document in found:
        if (document["kind"], document["metadata"]["name"]) == ("LeaderWorkerSet", "glm"):
            group = document["spec"]["leaderWorkerTemplate"]
            resources = group["workerTemplate"]["spec"]["containers"][0]["resources"]
            resources["requests"] = {**resources["limits"], "memory": "64Gi"}
    assert any("requests must be the limits" in line for line in problems(found, monkeypatch))


def test_kustomizations_list_their_files():
    files = [file for file in MANIFESTS if file.name == "kustomization.yaml"]
    assert {file.parent for file in files} == {file.parent for file in MANIFESTS}
    for file in files:
        found = yaml.safe_load(file.read_text())
        assert manifests.schema_problems(found) == []
        others = {other.name for other in file.parent.glob("*.yaml")} - {file.name}
        assert set(found["resources"]) == others
        images = set(re.findall(r"image: (sglang-ess.*)", "".join(
            (file.parent / name).read_text() for name in found["resources"]
        )))  # fmt: skip
        assert images == {image["name"] for image in found.get("images", ())}


def test_names_are_unique_and_nothing_claims_to_have_run():
    found = manifests.everything()
    names = [(document["kind"], document["metadata"]["name"]) for document in found]
    assert len(names) == len(set(names))
    for file in KUBERNETES.rglob("*.yaml"):
        if "sglang_ess.launch_server" in (text := file.read_text()):
            assert "never run on a cluster" in text, file

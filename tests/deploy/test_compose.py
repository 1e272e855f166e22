"""deploy/compose.yaml and deploy/Dockerfile: schema, commands, memory, ends. Nothing runs them."""

import fnmatch
import json
import re
import shlex
import subprocess
import tomllib

import check_jsonschema
import jsonschema
import pytest
import yaml

from deploy import sizes
from sglang_ess.layout import GIB
from tests.deploy import rules
from tests.deploy.manifests import DEPLOY, REPO, ROUTER, SERVER, quantity, seconds
from tests.deploy.rules import Server

COMPOSE = (DEPLOY / "compose.yaml").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
SGLANG = "0.5.23"


def schema() -> dict:
    """The Compose specification's own schema, which check-jsonschema brings."""
    folder = REPO.joinpath(*check_jsonschema.__path__, "builtin_schemas", "vendor")
    return json.loads((folder / "compose-spec.json").read_text())


def instructions(name: str) -> list[str]:
    """Arguments of the Dockerfile's instructions of this name, continued lines joined."""
    text = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)", text, re.M)


ENTRYPOINT = json.loads(instructions("ENTRYPOINT")[0])


def problems(text: str, monkeypatch) -> list[str]:
    """Everything that the file breaks. ${NAME:-DEFAULT} is its default."""
    document = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    found = jsonschema.validators.validator_for(schema())(schema()).iter_errors(document)
    if lines := [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]:
        return lines
    read = {}
    for name, service in document["services"].items():
        argv = [*service.get("entrypoint", ENTRYPOINT), *service["command"]]
        stop = seconds(service["stop_grace_period"])
        if argv[2] == ROUTER:
            lines += router_problems(argv, stop, document["services"])
            continue
        assert argv[:3] == ["python3", "-m", SERVER]
        try:
            server = read[name] = Server.of(tuple(argv[3:]), quantity(service["mem_limit"]))
        except ValueError as error:
            return [str(error)]
        lines += rules.launcher_problems(server, monkeypatch) + rules.memory_problems(server)
        lines += rules.stop_problems(server, 0, stop) + service_problems(service, server)
    return lines + rules.pair_problems(read["prefill"], read["decode"])


def service_problems(service: dict, server: Server) -> list[str]:
    """What of a service does not agree with its server's flags."""
    lines, args = [], server.args
    if service["ulimits"]["memlock"] != -1 or not {"IPC_LOCK", "SYS_NICE"} <= {*service["cap_add"]}:
        lines.append("locked memory must have no limit")
    if quantity(service["shm_size"]) != sizes.SHM_GIB * GIB:
        lines.append(f"/dev/shm must have {sizes.SHM_GIB} GiB: got {service['shm_size']}")
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    if device["count"] != args.tp_size:
        lines.append(f"GPUs must be the ranks: got {device['count']}")
    check = service["healthcheck"]
    if check["test"][-1] != f"http://127.0.0.1:{args.port}/health":
        lines.append(f"health check must ask port {args.port}: got {check['test'][-1]}")
    if seconds(check["timeout"]) <= rules.health_seconds():
        lines.append(f"health check must wait longer: got {check['timeout']}")
    if seconds(check["start_period"]) < rules.START_SECONDS:
        lines.append(f"start must have {rules.START_SECONDS} s: got {check['start_period']}")
    targets = {volume.removesuffix(":ro").split(":")[-1] for volume in service["volumes"]}
    if not any(args.model_path.startswith(f"{target}/") for target in targets):
        lines.append(f"model must be on a volume: got {args.model_path}")
    return lines


def router_problems(argv: list[str], stop: int, services: dict) -> list[str]:
    """Addresses that no server of the file has, and a grace period that is cut."""
    args, lines = rules.router_args(argv), []
    wanted = {}
    for name in ("prefill", "decode"):
        flags = dict(flag.partition("=")[::2] for flag in services[name]["command"])
        wanted[name] = int(flags["--port"]), flags.get("--disaggregation-bootstrap-port")
    for url, port in args.prefill_urls:
        if (int(url.rpartition(":")[2]), str(port)) != wanted["prefill"]:
            lines.append(f"router must ask prefill's ports {wanted['prefill']}: got {url}, {port}")
    if [int(url.rpartition(":")[2]) for url in args.decode_urls] != [wanted["decode"][0]]:
        lines.append(f"router must ask decode's port: got {args.decode_urls}")
    if args.port == wanted["decode"][0]:  # on one host's network
        lines.append(f"router must have a port of its own: got {args.port}")
    if args.shutdown_grace_period_secs >= stop:
        lines.append(f"router's grace must end before the kill after {stop} s")
    return lines


def test_everything_agrees(monkeypatch):
    assert problems(COMPOSE, monkeypatch) == []


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("shm_size:", "shm-size:", "shm-size"),
        ("--ess-hot-ratio=0.2", "--ess-hot-rows=7", "--ess-hot-rows"),
        ("--attn-dp-size=8", "--atn-dp-size=8", "--atn-dp-size"),
        ("--ess-host-gib=640", "--ess-host-gib=80", "--ess-host-gib must hold"),
        ("mem_limit: 896gb", "mem_limit: 800gb", "must leave 96 GiB"),
        ("shm_size: 32gb", "shm_size: 64mb", "/dev/shm must have"),
        ("memlock: -1", "memlock: 65536", "no limit"),
        ("count: 8", "count: 4", "GPUs must be"),
        ("stop_grace_period: 180s", "stop_grace_period: 30s", "grace must end"),
        ("30000/health", "30001/health", "health check must ask"),
        ("start_period: 3600s", "start_period: 60s", "start must have"),
        ("- --port=30000", "- --port=30010", "router must ask prefill's ports"),
        ('- "8998"', '- "8999"', "router must ask prefill's ports"),
        ("ROUTER_PORT:-8000", "ROUTER_PORT:-30000", "a port of its own"),
        ("--context-length=131072", "--context-length=65536", "context_length must be the same"),
        ("}:/models:ro", "}:/weights:ro", "model must be on a volume"),
    ],
)
def test_a_corruption_is_noticed(monkeypatch, old, new, part):
    assert old in COMPOSE
    *head, tail = COMPOSE.split(old)  # the first place, but of --port and the context prefill's
    count = 2 if old in ("- --port=30000", "--context-length=131072") else 1
    text = old.join([*head, tail][:count]) + new + old.join([*head, tail][count:])
    lines = problems(text, monkeypatch)
    assert any(part in line for line in lines), lines


def test_versions_agree():
    """Of SGLang and the router: the project's, the image's, the tags'."""
    assert f"sglang=={SGLANG}" in PROJECT["dependencies"]
    assert instructions("ARG") == [f"SGLANG_IMAGE=lmsysorg/sglang:v{SGLANG}"]
    assert f'v("sglang") == "{SGLANG}"' in DOCKERFILE
    (router,) = re.findall(r"^sglang-router==.*", (REPO / "constraints.txt").read_text(), re.M)
    assert router in DOCKERFILE
    (install,) = [line for line in instructions("RUN") if "/wheels/*.whl" in line]
    named = set(shlex.split(install.split("&&")[1])) & {*PROJECT["dependencies"], router}
    assert named == {*PROJECT["dependencies"], router} - {f"sglang=={SGLANG}"}
    tags = set(re.findall(r"image: sglang-ess:(\S+)", COMPOSE))
    for file in DEPLOY.rglob("kustomization.yaml"):
        images = yaml.safe_load(file.read_text()).get("images", ())
        tags |= {image["newTag"] for image in images}
    assert tags == {f"v{SGLANG}"}


def test_the_image_has_what_the_wheel_needs_and_no_more():
    """deploy/Dockerfile.dockerignore: the last pattern that matches a file decides."""
    patterns = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split()
    kept = {file for file in listed if not ignored(file, patterns)}
    assert {file.partition("/")[0] for file in kept} == {
        "pyproject.toml", "README.md", "LICENSE", "python", "kernels", "patches"
    }  # fmt: skip
    needed = {file for file in listed if file.startswith(("python/", "kernels/", "patches/"))}
    assert needed <= kept
    assert PROJECT["readme"] in kept and set(PROJECT["license-files"]) <= kept
    assert ignored("python/sglang_ess/__pycache__/a.pyc", patterns)


def ignored(file: str, patterns: list[str]) -> bool:
    """As BuildKit decides: a pattern names the file or a folder above it."""
    parts = file.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    result = False
    for pattern in patterns:
        name = pattern.removeprefix("!")
        bare = name.removeprefix("**/")
        tried = parts if bare != name else above
        if any(fnmatch.fnmatchcase(one, bare) for one in tried):
            result = not pattern.startswith("!")
    return result


def test_the_dockerfile_starts_the_launcher_without_a_shell():
    assert ENTRYPOINT == ["python3", "-m", SERVER]
    assert instructions("FROM") == ["${SGLANG_IMAGE} AS wheel", "${SGLANG_IMAGE}"]
    copied = [words.split()[:-1] for words in instructions("COPY")]
    assert copied == [["."], ["--from=wheel", "/wheels"]]

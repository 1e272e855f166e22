"""Rules that a deployment keeps, each a list of lines for what it breaks."""

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sglang_router.launch_router import parse_router_args
from sglang_router.router_args import RouterArgs

import sglang_ess.tiers
from deploy import sizes
from sglang_ess import launch_server
from sglang_ess.config import EssConfig
from sglang_ess.launch import preflight, shutdown
from sglang_ess.launch.option_ranges import range_reasons
from sglang_ess.launch.peers import Place
from sglang_ess.layout import GIB
from sglang_ess.mem_cache.host_share import NodeTiers, host_limit_bytes
from tests.deploy.manifests import LWS, ROUTER, SERVER, Pod, quantity

# What the launcher reads of config.json.
MODELS = {
    "GLM-5.2": ("glm-5.2", "GlmMoeDsaForCausalLM"),
    "DeepSeek-V3.2": ("deepseek-v3.2", "DeepseekV32ForCausalLM"),
}
SHAPE = {"index_topk": 2048, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
BOOTSTRAP = RouterArgs.bootstrap_port_annotation  # the router reads the port of a pair there
START_SECONDS = 1800  # at least, for the weights and the host tier
# Signal to end: the grace period, error responses, and the launcher's kills (shutdown._end_all).
END_SECONDS = 3 * shutdown.END_SECONDS


@dataclass(frozen=True)
class Server:
    """A launcher's command, as the launcher reads it. memory: bytes that its container may take"""

    args: Any
    config: EssConfig
    memory: int

    @classmethod
    @cache  # a corruption changes one command, and a parser of SGLang's takes 0.1 s
    def of(cls, argv: tuple[str, ...], memory: int) -> "Server":
        """Raises: ValueError (one line) for what a parser refuses."""
        config, rest = launch_server.split_args(list(argv))
        return cls(launch_server._prepare(rest), config, memory)

    @property
    def model(self) -> tuple[str, str]:
        """(name in sim/data/models, architecture)"""
        return MODELS[Path(self.args.model_path).name]

    @property
    def has_two_tiers(self) -> bool:
        return self.config.enabled and self.args.disaggregation_mode != "prefill"

    @property
    def tiers(self) -> int:
        """Host tiers of a node."""
        return NodeTiers.of(self.args).total if self.has_two_tiers else 0

    @cached_property
    def sizes(self) -> sizes.Sizes:
        """What fits on the GPUs, by formula and model."""
        tensor = sizes.GPUS if self.args.attn_dp_size == 1 else 1
        rows = {"fp8_e4m3": "fp8", "bfloat16": "bf16"}[self.args.kv_cache_dtype]
        ratio, context = self.config.hot_ratio or 1.0, self.args.context_length
        return sizes.sizes(self.model[0], rows, tensor, ratio, context, self.args.nnodes)

    @cached_property
    def free_bytes(self) -> int:
        """What the container's limit leaves to host tiers."""
        others = sizes.SHM_GIB + sizes.GPUS * sizes.PROCESS_GIB + sizes.weights_gib(self.model[0])
        return self.memory - int(others * GIB)


def launcher_problems(server: Server, monkeypatch: Any) -> list[str]:
    """What our launcher refuses on a GPU host whose memory is the container's."""
    monkeypatch.setattr(sglang_ess.tiers, "free_host_bytes", lambda: server.free_bytes)
    model = {**SHAPE, "architectures": [server.model[1]]}
    return [
        *preflight.model_reasons(server.args, model, server.config, on_cpu=False),
        *preflight.option_reasons(server.args, server.config, on_cpu=False),
        *range_reasons(server.args),
    ]


def memory_problems(server: Server) -> list[str]:
    """Sizes that do not fit, by the formulas of mem_cache/capacity.py."""
    args, config, found = server.args, server.config, server.sizes
    lines, tokens, geometry = [], args.max_total_tokens, found.geometry
    if server.free_bytes < 0:
        lines.append(f"memory limit must hold the processes: got {server.memory / GIB:.0f} GiB")
    if not args.context_length <= min(tokens, found.model.max_context):
        lines.append(f"context must fit into {tokens} slots and the model: {args.context_length}")
    if not server.has_two_tiers:
        if tokens > found.one_tier:
            lines.append(f"device must hold {tokens} slots in one tier: got {found.one_tier}")
        return lines
    need = geometry.host_bytes(tokens)
    if host_limit_bytes(config, sys.maxsize, NodeTiers.of(args)) < need:
        need = server.tiers * need / GIB
        lines.append(f"--ess-host-gib must hold {need:.1f} GiB: got {config.host_gib:g}")
    if server.free_bytes < config.host_gib * GIB:
        free = server.free_bytes / GIB
        lines.append(f"memory limit must leave {config.host_gib:g} GiB to host tiers: {free:.1f}")
    if tokens > found.slots:
        lines.append(f"device must hold {tokens} slots: got {found.slots}")
    return lines


def stop_problems(
    server: Server, delay: float, limit: float, others: list[float] | None = None
) -> list[str]:
    """A container that is killed before it has ended by itself.

    delay: seconds before SIGTERM; limit: seconds from the start of the delay to SIGKILL
    others: delays of the other nodes' containers. The first SIGTERM to a node ends all of them.
    """
    end = delay + server.config.grace_seconds + END_SECONDS
    lines = []
    if end >= limit:
        lines.append(f"grace must end before the kill: got {end:g} s of {limit:g}")
    lines += [
        f"a worker must wait as long as the leader, {delay:g} s: got {other:g}"
        for other in others or ()
        if other != delay
    ]
    return lines


def delay_of(pod: Pod) -> float:
    """Seconds that the pod's preStop command sleeps: the command runs, its sleep prints."""
    command = pod.container["lifecycle"]["preStop"]["exec"]["command"]
    script = command[-1] if command[:2] == ["sh", "-c"] else " ".join(command)
    return _slept(script, tuple(pod.env.items()))


@cache
def _slept(script: str, env: tuple[tuple[str, str], ...]) -> float:
    shell = ["sh", "-c", f"sleep() {{ echo $1; }}; {script}"]
    return float(subprocess.run(shell, env=dict(env), capture_output=True, check=True).stdout)


def pod_problems(pod: Pod, server: Server, health_seconds: int) -> list[str]:
    """What of a server's pod does not agree with its flags.

    health_seconds: that SGLang waits for its scheduler before it answers a health check
    """
    spec, container, args = pod.spec, pod.container, server.args
    lines, resources = [], container["resources"]
    if resources["requests"] != resources["limits"]:
        lines.append("requests must be the limits: or the pod may be evicted")
    if resources["limits"]["nvidia.com/gpu"] != str(args.tp_size // args.nnodes):
        lines.append(f"GPUs must be the node's ranks: got {resources['limits']['nvidia.com/gpu']}")
    if args.host != "0.0.0.0":
        lines.append(f"--host must be 0.0.0.0 for probes: got {args.host}")
    if (args.nnodes, args.node_rank) != (pod.size, pod.index):
        lines.append(f"nodes must be the group's pods: got {args.node_rank} of {args.nnodes}")
    wanted = {"http": args.port}
    if args.nnodes > 1:
        wanted["dist-init"] = int(args.dist_init_addr.rpartition(":")[2])
        wanted["launchers"] = wanted["dist-init"] - 1
        if (place := Place.of(pod.argv, {})) is None or place.port != wanted["launchers"]:
            lines.append(f"launchers must find each other: got {place}")
    if args.disaggregation_mode == "prefill":
        wanted["bootstrap"] = args.disaggregation_bootstrap_port
        if pod.annotations.get(BOOTSTRAP) != str(wanted["bootstrap"]):
            lines.append(f"bootstrap port must be annotated: got {pod.annotations}")
    if pod.ports != wanted:
        lines.append(f"ports must be {wanted}: got {pod.ports}")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]
        if pod.ports.get(probe["httpGet"]["port"]) != args.port:
            lines.append(f"{name} must ask port {args.port}: got {probe['httpGet']['port']}")
        if probe["httpGet"]["path"] != "/health":  # every node's server answers this one
            lines.append(f"{name} must ask /health: got {probe['httpGet']['path']}")
        if probe["timeoutSeconds"] <= health_seconds:
            lines.append(f"{name} must wait over {health_seconds} s: got {probe['timeoutSeconds']}")
    start = container["startupProbe"]
    if start["failureThreshold"] * start["periodSeconds"] < START_SECONDS:
        lines.append(f"start must have {START_SECONDS} s: got {start['failureThreshold']} tries")
    shm = [one for one in spec["volumes"] if one.get("emptyDir", {}).get("medium") == "Memory"]
    paths = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    if [paths.get(one["name"]) for one in shm] != ["/dev/shm"]:
        lines.append("/dev/shm must be in memory")
    elif quantity(shm[0]["emptyDir"]["sizeLimit"]) != sizes.SHM_GIB * GIB:
        lines.append(f"/dev/shm must have {sizes.SHM_GIB} GiB: got {shm[0]['emptyDir']}")
    if not any(Path(args.model_path).is_relative_to(path) for path in paths.values()):
        lines.append(f"model must be on a volume: got {args.model_path}, volumes {paths}")
    added = container["securityContext"]["capabilities"]["add"]
    if "IPC_LOCK" not in added or ("SYS_NICE" in added) != server.has_two_tiers:
        lines.append(f"capabilities must let it lock and place its memory: got {added}")
    return lines


def network_problems(found: list[dict[str, Any]], made: list[Pod]) -> list[str]:
    """Services and scrapes that reach no pod, or a port that the pod does not have."""
    lines = []
    for document in found:
        name, kind, spec = document["metadata"]["name"], document["kind"], document.get("spec")
        if kind == "Service":
            selector, ports = spec["selector"], [port["targetPort"] for port in spec["ports"]]
        elif kind == "PodMonitor":
            selector = spec["selector"]["matchLabels"]
            ports = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        else:
            continue
        reached = [pod for pod in made if pod.matches(selector)]
        if not reached:
            lines.append(f"{kind} {name} must select a pod: got {selector}")
        for pod in reached:
            lines += [
                f"{kind} {name} must name a port of {pod.owner}: got {port}"
                for port in ports
                if port not in pod.ports
            ]
            if kind == "Service" and pod.labels.get(f"{LWS}worker-index", "0") != "0":
                lines.append(f"Service {name} must select leaders: got {pod.owner}-0-{pod.index}")
            if kind == "PodMonitor" and pod.runs(SERVER) and "--enable-metrics" not in pod.argv:
                lines.append(f"{pod.owner} must have --enable-metrics: {name} scrapes it")
    return lines


def router_problems(pod: Pod, made: list[Pod]) -> list[str]:
    """What of a router's pod does not agree with its flags and with the servers' pods."""
    args, lines = router_args(pod.argv), []
    if pod.ports != {"http": args.port, "metrics": args.prometheus_port}:
        lines.append(f"ports must be {args.port} and {args.prometheus_port}: got {pod.ports}")
    for mode in ("prefill", "decode"):
        labels = getattr(args, f"{mode}_selector")
        reached = [one for one in made if one.matches(labels)]
        modes = {f"--disaggregation-mode={mode}" in one.argv for one in reached}
        if modes != {True} or any(one.index for one in reached):
            lines.append(f"--{mode}-selector must select {mode} leaders: got {labels}")
        if any(one.ports["http"] != args.service_discovery_port for one in reached):
            lines.append(f"discovery must ask {mode}'s port: got {args.service_discovery_port}")
    delay, limit = delay_of(pod), pod.spec["terminationGracePeriodSeconds"]
    if delay + args.shutdown_grace_period_secs >= limit:
        lines.append(f"router's grace must end before the kill after {limit} s")
    return lines


def router_args(argv: list[str]) -> RouterArgs:
    """The router's own reading of its command.

    Raises: SystemExit for a flag that it does not know; ValueError for values that do not agree.
    """
    assert argv[:3] == ["python3", "-m", ROUTER]
    args = parse_router_args(argv[3:])
    args._validate_router_args()
    return args


def pair_problems(prefill: Server, decode: Server) -> list[str]:
    """Limits that must be the same on both sides (docs/disaggregation.md)."""
    lines = [
        f"{name} must be the same: got {getattr(prefill.args, name)}, {getattr(decode.args, name)}"
        for name in ("context_length", "kv_cache_dtype", "model_path", "served_model_name")
        if getattr(prefill.args, name) != getattr(decode.args, name)
    ]
    if prefill.args.max_total_tokens > decode.args.max_total_tokens:
        lines.append("prefill must not have more slots than decode")
    return lines


def health_seconds() -> int:
    """Seconds that SGLang waits for its scheduler before it answers a health check."""
    import sglang

    source = Path(sglang.__file__).parent / "srt" / "entrypoints" / "http_server.py"
    return int(re.search(r'"SGLANG_HEALTH_CHECK_TIMEOUT", (\d+)', source.read_text())[1])

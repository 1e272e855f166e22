"""Hostile bodies for the routes of a server, made from its OpenAPI document.

Each field x hostile values, pairs of fields, schemathesis, and what is not JSON.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

# Routes that are not walked, and why.
EXCEPTED: dict[str, str] = {}

SCALARS = (
    *(None, True, False, 0, 1, -1, 7, 512, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "\x00", "\ud800", "../../x", "é" * 300, "9" * 5000, "https://127.0.0.1:9/x"),
)
SHAPES = (
    *([], [[]], [[], []], [None], [0], [-1], [5, 6, 7], [2**31], [2**62], [1.5], [True], [""]),
    *(["a", "b"], [["a"]], [[1], [2, 3]], [[1, -1], [2**40]], [[[0.5]]], [[[0.5, 1.0]]], [{}]),
    *({}, {"a": None}, {"0": 1e9}, {"-1": 1.0}, {"999999999": 1}, {"x": [1]}, {"id": "a"}),
    *({"id": "a", "rid": "b", "offset": -5}, {"role": "user", "content": "a"}, [5] * 2000),
)
GRAMMARS = ("(", "(a{999}){999}", "[", '{"type": 5}', '{"$ref": "#/x"}', "root ::= root", "{}")
SPECIAL: dict[str, tuple[Any, ...]] = {
    "json_schema": GRAMMARS,
    "regex": GRAMMARS,
    "ebnf": GRAMMARS,
    "structural_tag": GRAMMARS,
    "stop_regex": GRAMMARS,
    "rid": ("HEALTH_CHECK_a", ["a", "a"], "a" * 100_000),
    "n": (2, 100, 10**6),
    "text": ("a" * 2_000_000, ["a"] * 100),
    "input_ids": ([5] * 500_000, [[5]] * 100, [5, 2**62], [5, -(2**62)]),
    "return_hidden_states": ("last", "full"),
    "image_data": ("data:image/png;base64,AAAA", [["a"]], "/etc/hostname"),
    "mode": ("abort", "retract", "in_place", "x"),
    "logprobs": (0, 5, 20, 5000),
    "activities": (["CPU"], ["GPU"], ["CPU", "GPU"], ["MEM"], ["x"]),
    "tags": (["weights"], ["kv_cache"], ["cuda_graph"], ["x"]),
}


@dataclass(frozen=True)
class Body:
    """One request: data is what follows the headers, None for nothing."""

    method: str
    path: str
    data: bytes | None = None
    kind: str = "application/json"

    def __str__(self) -> str:
        return f"{self.method} {self.path} {(self.data or b'')[:300]!r}"


def as_json(value: Any) -> bytes:
    """JSON with what JSON lacks too: NaN, Infinity, lone surrogates (as escapes)."""
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Route:
    """One method of one path. query, holes: names of its parameters

    fields: {field of its JSON body: JSON types that it may have, none if any}
    """

    method: str
    path: str
    fields: dict[str, frozenset[str]] = field(default_factory=dict)
    query: tuple[str, ...] = ()
    holes: tuple[str, ...] = ()

    def body(self, value: Any, query: dict[str, Any] | None = None) -> Body:
        path = self.path
        for hole in self.holes:
            path = path.replace(f"{{{hole}}}", "a")
        if query:
            path += "?" + urlencode({k: str(v) for k, v in query.items()}, errors="replace")
        return Body(self.method, path, value if value is None else as_json(value))


def routes(document: dict[str, Any]) -> list[Route]:
    """Every method of every path of an OpenAPI document, those of EXCEPTED left out."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path in EXCEPTED:
                continue
            parameters = operation.get("parameters", [])
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            found.append(
                Route(
                    method.upper(),
                    path,
                    _properties(document, schema),
                    tuple(p["name"] for p in parameters if p["in"] == "query"),
                    tuple(p["name"] for p in parameters if p["in"] == "path"),
                )
            )
    return found


def _properties(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, frozenset[str]]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return _properties(document, document["components"]["schemas"][name])
    found = {name: _types(one) for name, one in schema.get("properties", {}).items()}
    for key in ("anyOf", "allOf", "oneOf"):
        for part in schema.get(key, ()):
            found |= _properties(document, part)
    return found


def _types(schema: dict[str, Any]) -> frozenset[str]:
    found = {schema["type"]} if "type" in schema else set()
    for part in schema.get("anyOf", ()):
        found |= _types(part)
    return frozenset(found)


def sampling_fields() -> dict[str, frozenset[str]]:
    """Fields of SGLang's SamplingParams, which its document calls an object of anything."""
    import msgspec
    from sglang.srt.sampling.sampling_params import SamplingParams

    schema = msgspec.json.schema_components([SamplingParams])[1]["SamplingParams"]
    names = SamplingParams.__struct_fields__
    return {name: _types(one) for name, one in zip(names, schema["prefixItems"], strict=True)}


JSON_TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def hostile(name: str, types: frozenset[str] = frozenset()) -> list[Any]:
    """Values for a field of this name, those of its types only if any are given."""
    values = (*SCALARS, *SHAPES, *SPECIAL.get(name, ()))
    return [value for value in values if not types or JSON_TYPES[type(value)] in types]


CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
START = {  # a body that each route serves, where it serves one at all
    "/generate": {"text": "Hello", "sampling_params": {"max_new_tokens": 4}},
    "/v1/completions": {"model": "m", "prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {**CHAT, "max_tokens": 4},
    "/invocations": {**CHAT, "max_tokens": 4},
    "/v1/messages": {**CHAT, "max_tokens": 4},
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": "m", "input": "Hello", "max_output_tokens": 4},
    "/api/chat": {**CHAT, "options": {"num_predict": 4}},
    "/api/generate": {"model": "m", "prompt": "Hello", "options": {"num_predict": 4}},
    "/vertex_generate": {
        "instances": [{"text": "Hello"}],
        "parameters": {"sampling_params": {"max_new_tokens": 4}},
    },
    "/v1/tokenize": {"model": "m", "prompt": "Hello"},
    "/v1/detokenize": {"model": "m", "tokens": [1, 2]},
    "/tokenize": {"model": "m", "prompt": "Hello"},
    "/detokenize": {"model": "m", "tokens": [1, 2]},
    "/encode": {"text": "Hello"},
    "/classify": {"text": "Hello"},
    "/v1/embeddings": {"model": "m", "input": "Hello"},
    "/v1/classify": {"model": "m", "input": "Hello"},
    "/v1/score": {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [1, 2]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/open_session": {"capacity_of_str_len": 100},
    "/update_weights_from_disk": {"model_path": "nowhere"},
    "/parse_function_call": {"text": "a", "tools": [], "tool_call_parser": "qwen25"},
    "/separate_reasoning": {"text": "a", "reasoning_parser": "deepseek-r1"},
}


PROMPTS = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/score")


def not_json(route: Route) -> Iterator[Body]:
    """Bodies that no schema allows."""
    empty = route.body(None)
    yield empty
    for data in (b"{", b"\xff\xfe\x00", b"[" * 5000, b'{"a":1}{"a":2}', b'{"text": 1e999}'):
        yield Body(empty.method, empty.path, data)
    yield Body(empty.method, empty.path, b"a=1&b=2", "application/x-www-form-urlencoded")
    yield Body(empty.method, empty.path, b"--x\r\n\r\n", "multipart/form-data; boundary=x")
    for value in (None, 5, "a", [], {}, [{}], {"": None}):
        yield route.body(value)


def singles(route: Route) -> Iterator[Body]:
    """Each field x each hostile value, the other fields as START has them."""
    start = START.get(route.path, {})
    for name in route.fields:
        for value in hostile(name):
            yield route.body({**start, name: value})
    for name in sampling_fields() if route.path == "/generate" else ():
        for value in hostile(name):
            yield route.body(_sampled(start, {name: value}))
    for name in route.query:
        for value in SCALARS:
            yield route.body(start or None, {name: value})
    for value in ("%00", "%ff", "..%2f..", quote("é" * 300)):
        if route.holes:
            yield Body(route.method, route.path.replace(f"{{{route.holes[0]}}}", value))


def _sampled(start: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    return {**start, "sampling_params": {**start["sampling_params"], **changed}}


def several(route: Route, rng: random.Random) -> Iterator[Body]:
    """One to four fields at random, nearly all of a type that the field may have, for ever."""
    start = START.get(route.path, {})
    own = sampling_fields() if route.path == "/generate" else {}
    types = route.fields | own
    while types:
        values = {}
        for name in rng.sample(list(types), min(rng.randint(1, 4), len(types))):
            fitting = hostile(name, types[name]) if rng.random() < 0.95 else []
            values[name] = rng.choice(fitting or hostile(name))
        body = {**start, **{k: v for k, v in values.items() if k not in own}}
        sampled = {k: v for k, v in values.items() if k in own}
        if sampled and isinstance(body.get("sampling_params"), dict):
            body = _sampled(body, sampled)
        if own and rng.random() < 0.5:
            body = _sampled({**body, "sampling_params": {}}, {"max_new_tokens": 4, **sampled})
        yield route.body(body)


def schemathesis_bodies(document: dict[str, Any], per_route: int, seed: int) -> Iterator[Body]:
    """What schemathesis makes of the document, valid and invalid, per_route for each method."""
    import schemathesis

    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.path not in EXCEPTED:
            yield from _from_operation(operation, per_route, seed)


def _from_operation(operation: Any, count: int, seed: int) -> list[Body]:
    import hypothesis
    from schemathesis import GenerationMode

    found = []
    for mode in GenerationMode:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=(count + 1) // 2,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def collect(case):
            found.append(_from_case(case))

        try:
            collect()
        except hypothesis.errors.Unsatisfiable:
            pass  # without parameters there is nothing invalid
    return found


def _from_case(case: Any) -> Body:
    import requests

    sent = requests.Request(**case.as_transport_kwargs(base_url="http://127.0.0.1")).prepare()
    data = sent.body.encode() if isinstance(sent.body, str) else sent.body
    kind = sent.headers.get("Content-Type", "application/json")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    return Body(sent.method, sent.path_url, _bounded(case.path, data), kind)


def _bounded(path: str, data: bytes | None) -> bytes | None:
    """The body with START's bound on new tokens where it has no bound of its own."""
    try:
        value = json.loads(data or b"")
    except ValueError:
        return data
    bounds = {"max_tokens", "max_output_tokens", "options", "sampling_params"}
    wanted = {k: v for k, v in START.get(path, {}).items() if k in bounds}
    return as_json({**wanted, **value}) if isinstance(value, dict) else data


def walk(document: dict[str, Any], bodies: int, seed: int) -> list[Body]:
    """At most so many bodies, shared out over all routes, in a random order."""
    rng, every = random.Random(seed), routes(document)
    shares: list[tuple[int, Iterator[Body]]] = []  # (bodies a round, where they come from)
    for route in every:
        raw, found = list(not_json(route)), list(singles(route))
        rng.shuffle(raw)
        rng.shuffle(found)
        # /generate has the most fields by far, and much else ends in it.
        weight = 60 if route.path == "/generate" else 16 if route.path in PROMPTS else 4
        shares += [(1, iter(raw)), (weight // 4, iter(found))]
        shares.append((weight, several(route, random.Random(f"{seed} {route}"))))
    # It takes its time: a tenth of a second a body, and more for a large schema.
    tested = list(schemathesis_bodies(document, max(2, bodies // 2000), seed))
    rng.shuffle(tested)
    shares.append((len(every), iter(tested)))
    chosen: list[Body] = []
    while len(chosen) < bodies:
        rng.shuffle(shares)
        part = [body for count, share in shares for body in itertools.islice(share, count)]
        if not part:
            break
        chosen += part
    return chosen[:bodies]

"""The OpenAPI document of all routes, made from the very types that decode and encode their bodies."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from millpond.server.context import Call
from millpond.server.native_routes import ROUTES, Route
from millpond.wire import headers, lockd, native
from millpond.wire.faults import Fault

PATH = "/v1/openapi.json"

FRAMES = "application/vnd.millpond.frames"
OPENMETRICS = "application/openmetrics-text"
EVENTS = "text/event-stream"
MULTIPART = "multipart/related"

KEY = "^q/[a-z0-9._-]{1,128}/state/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
"""The key of a message's workflow state; under others lockd has locks."""

FAULTS = {
    400: "The request cannot be right.",
    401: "It is not known who asks.",
    403: "Who asks may not do this.",
    404: "There is no such message, state or stream.",
    405: "The route takes another method.",
    409: "The lease is lost, the version is another, or there is no message (lockd: `waiting`).",
    413: "The body, or something in it, is larger than its limit.",
    415: "The body has a content type that this route does not take.",
    429: "The server has too much to write; Retry-After says when to ask again.",
    500: "The server failed, or a record is damaged; its log says why.",
    501: "A part of lockd's protocol that this server does not have.",
    503: "The store or the server is busy, full, down or about to stop; Retry-After says when to ask again.",
}
"""Statuses besides success, on every route under /v1; their bodies are all of one form."""


class Described(NamedTuple):
    """A route that is not of Millpond's own table."""

    path: str
    summary: str
    answers: dict[str, Any]
    """Content type → type of the body, a schema, or None for bytes."""
    request: type[msgspec.Struct] | None = None
    method: str = "post"
    parameters: tuple[str, ...] = ()
    """Names of what is in the query; those that begin with ``X-`` are headers."""
    upload: bool = False
    """The body is multipart, with ``meta`` and ``payload``."""
    state: bool = False
    """The body is a JSON document of the user's."""
    empty: bool = False
    """Success may also be 204."""
    tag: str = "lockd"


_LEASE = ("key", "namespace", "X-Lease-ID", "X-Fencing-Token", "X-Txn-ID")
_PLACE = ("namespace", "queue", "owner")
_ANY: dict[str, Any] = {}
_DEQUEUE = "Receives messages, as pairs of parts: `meta` and `payload`"
_SUBSCRIBE = "Receives messages as they come, until the client goes away"

DESCRIBED: tuple[Described, ...] = (
    Described("/v1/queue/enqueue", "Puts a message into a queue; the payload is streamed",
              {headers.JSON: lockd.Enqueued}, lockd.EnqueueMeta, parameters=("queue",), upload=True),
    Described("/v1/queue/dequeue", _DEQUEUE, {MULTIPART: None}, lockd.Dequeue, parameters=_PLACE),
    Described("/v1/queue/dequeueWithState", f"{_DEQUEUE}, with a lease on the workflow state", {MULTIPART: None},
              lockd.Dequeue, parameters=_PLACE),
    Described("/v1/queue/subscribe", _SUBSCRIBE, {MULTIPART: None}, lockd.Dequeue, parameters=_PLACE),
    Described("/v1/queue/subscribeWithState", f"{_SUBSCRIBE}, with leases on the workflow states", {MULTIPART: None},
              lockd.Dequeue, parameters=_PLACE),
    Described("/v1/queue/watch", "Tells of changes at the head of a queue, as server-sent events", {EVENTS: None},
              lockd.Named, parameters=_PLACE[:2]),
    Described("/v1/queue/stats", "Who waits, and which message is next", {headers.JSON: lockd.Stats}, lockd.Named,
              parameters=_PLACE[:2]),
    Described("/v1/queue/ack", "Removes a message that is done", {headers.JSON: lockd.Acked}, lockd.Ack),
    Described("/v1/queue/nack", "Gives a message back, with a failure or without", {headers.JSON: lockd.Requeued},
              lockd.Nack),
    Described("/v1/queue/extend", "Renews a lease", {headers.JSON: lockd.Extended}, lockd.Extend),
    Described("/v1/get", "Reads the workflow state", {headers.JSON: _ANY}, parameters=_LEASE, empty=True),
    Described("/v1/update", "Writes the workflow state", {headers.JSON: lockd.Updated},
              parameters=(*_LEASE, "X-If-State-ETag", "X-If-Version"), state=True),
    Described("/v1/remove", "Removes the workflow state", {headers.JSON: lockd.Removed},
              parameters=(*_LEASE, "X-If-State-ETag", "X-If-Version")),
    Described("/v1/metadata", "Answers what clients say of a state's visibility", {headers.JSON: lockd.MetadataUpdated},
              lockd.Metadata, parameters=_LEASE),
    *(
        Described(f"/v1/{path}", "Part of lockd's protocol that this server answers with 501", {}, tag="not here")
        for path in (
            *("acquire", "keepalive", "release", "describe", "mutate", "query"),
            *(f"txn/{step}" for step in ("decide", "commit", "rollback", "replay")),
        )
    ),
    Described("/healthz", "The process answers", {}, method="get", tag="operation"),
    Described("/readyz", "The store can be reached, and the server is not about to stop", {}, method="get",
              tag="operation"),
    Described("/metrics", "Prometheus metrics, where they are on", {"text/plain": None, OPENMETRICS: None},
              method="get", tag="operation"),
    Described(PATH, "This document", {headers.JSON: _ANY}, method="get", tag="operation"),
)  # fmt: skip
"""lockd's routes, and what operators and their tools look at."""


def _types(answers: Iterable[Any]) -> list[Any]:
    return [answer for answer in answers if isinstance(answer, type)]


@functools.cache
def _schemas() -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """The schema of each type that a route takes or answers, and the components that they refer to."""
    types: list[Any] = [Fault, native.Frame]
    for route in ROUTES:
        types += [route.request, *_types([route.answer])]
    for other in DESCRIBED:
        types += [*_types([other.request]), *_types(other.answers.values())]
    wanted = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(wanted, ref_template="#/components/schemas/{name}")
    for one in (*schemas, components):
        _tidy(one)
    return dict(zip(wanted, schemas, strict=True)), components


def _tidy(value: Any) -> None:
    """Base64 as a format that tools know, and docstrings as they read."""
    if isinstance(value, dict):
        if value.get("contentEncoding") == "base64":
            value["format"] = "byte"
        if isinstance(value.get("description"), str):
            value["description"] = _unfolded(value["description"])
        for one in value.values():
            _tidy(one)
    elif isinstance(value, list):
        for one in value:
            _tidy(one)


def _unfolded(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("``", "`").strip()


def _faults(of: Iterable[int]) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in of}


def _own(route: Route) -> dict[str, Any]:
    schemas = _schemas()[0]
    body = {"schema": schemas[route.request]}
    if route.kind == "stream":
        frame = schemas[native.Frame]
        content: dict[str, Any] = {FRAMES: {"schema": frame}, headers.NDJSON: {"schema": frame}}
    elif route.kind == "payload":
        content = {"*/*": {}}
    else:
        answer = {"schema": schemas[route.answer]}
        content = {headers.JSON: answer, headers.MSGPACK: answer}
    return {
        "operationId": _operation_id(route.path),
        "tags": ["millpond"],
        "summary": route.summary,
        "description": f"Scope: `{route.scope}`.",
        "requestBody": {
            "required": not route.optional,
            "content": {headers.JSON: body, headers.MSGPACK: body},
        },
        "responses": {
            "200": {"description": "Done.", "content": content},
            **_faults(status for status in FAULTS if status != 501),
        },
    }


def _operation_id(path: str) -> str:
    first, *rest = path.removeprefix("/v1").removesuffix(".json").strip("/").split("/")
    return first + "".join(word[0].upper() + word[1:] for word in rest)


def _described(route: Described) -> dict[str, Any]:
    schemas = _schemas()[0]
    said: dict[str, Any] = {
        "operationId": _operation_id(route.path),
        "tags": [route.tag],
        "summary": route.summary,
    }
    if route.parameters:
        said["parameters"] = [
            {
                "name": name,
                "in": "header" if name.startswith("X-") else "query",
                "required": name == "key",
                "schema": {"type": "string", **({"pattern": KEY} if name == "key" else {})},
            }
            for name in route.parameters
        ]
    if route.upload:
        assert route.request is not None
        parts = {"meta": schemas[route.request], "payload": {"type": "string", "format": "binary"}}
        upload = {"schema": {"type": "object", "properties": parts, "required": ["meta"]}}
        said["requestBody"] = {"required": True, "content": {MULTIPART: upload, "multipart/form-data": upload}}
    elif route.request is not None:
        said["requestBody"] = {"content": {headers.JSON: {"schema": schemas[route.request]}}}
    elif route.state:
        said["requestBody"] = {"required": True, "content": {headers.JSON: {"schema": {}}}}
    content = {
        kind: {} if answer is None else {"schema": schemas[answer] if isinstance(answer, type) else answer}
        for kind, answer in route.answers.items()
    }
    success: dict[str, Any] = {"description": "Done."}
    if content:
        success["content"] = content
    answers = {} if route.tag == "not here" else {"200": success}
    if route.empty:
        answers["204"] = {"description": "There is none."}
    if route.tag != "operation":
        wanted: Iterable[int] = FAULTS
    else:
        wanted = (401, 403, 404, 405, 500, 503)
    said["responses"] = {**answers, **_faults(wanted)}
    return said


@functools.cache
def document() -> dict[str, Any]:
    """The whole document; the same one at each call, and not to be changed."""
    from millpond import __version__

    schemas, components = _schemas()
    fault = {headers.JSON: {"schema": schemas[Fault]}}
    paths: dict[str, Any] = {route.path: {"post": _own(route)} for route in ROUTES}
    paths |= {route.path: {route.method: _described(route)} for route in DESCRIBED}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Millpond",
            "version": __version__,
            "description": (
                "A durable at-least-once message queue. Times are integer milliseconds UTC (`*_at_ms`), durations "
                "integer milliseconds (`*_ms`). Millpond's own routes take and answer JSON or MessagePack, by "
                "Content-Type; in JSON, bytes are base64. Routes tagged `lockd` are lockd's, in its units."
            ),
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{}, {"bearer": []}, {"certificate": []}],
        "tags": [
            {"name": "millpond", "description": "Millpond's own routes."},
            {"name": "lockd", "description": "The queue protocol of lockd."},
            {"name": "not here", "description": "Routes of lockd's that are answered with 501."},
            {"name": "operation", "description": "For operators and their tools."},
        ],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "responses": {str(status): {"description": text, "content": fault} for status, text in FAULTS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS"},
            },
        },
    }


@functools.cache
def _encoded() -> bytes:
    return msgspec.json.format(msgspec.json.encode(document()), indent=1) + b"\n"


async def openapi(call: Call) -> None:
    """This document."""
    await call.answer(_encoded())

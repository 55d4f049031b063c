"""Every setting of the server, by name, with its kind and what it does: flags, variables, the file and the reference
page are all made from this table. Nothing is imported here, because the command's help is printed from it.

A setting at ``tls.cert`` is ``cert`` in the table ``[tls]`` of the file, the flag ``--tls-cert`` and the variable
``MILLPOND_SERVE_TLS_CERT``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["text", "path", "flag", "number", "bytes", "duration", "choice", "list"]


class Setting(NamedTuple):
    """One setting."""

    field: str
    """Its name in `ServerConfig`."""
    place: str
    """Where it stands in the file: a key, or table and key."""
    kind: Kind
    help: str
    choices: tuple[str, ...] = ()
    secret: bool = False
    """It may hold what nobody else should read; shown with that part left out."""

    @property
    def flag(self) -> str:
        """``--tls-cert``"""
        return "--" + self.option.replace("_", "-")

    @property
    def option(self) -> str:
        """``tls_cert``"""
        return self.place.replace(".", "_")

    @property
    def variable(self) -> str:
        """``MILLPOND_SERVE_TLS_CERT``"""
        return GLOBAL.get(self.place, PREFIX + self.option.upper())

    @property
    def section(self) -> str | None:
        """The table of the file that it stands in; None for the top."""
        head, dot, _ = self.place.partition(".")
        return head if dot else None


PREFIX = "MILLPOND_SERVE_"
GLOBAL = {"store": "MILLPOND_STORE", "keyring": "MILLPOND_KEYRING_FILE", "namespace": "MILLPOND_NAMESPACE"}
"""Those that every command has, and their variables."""
SECTIONS = {
    "tls": "Transport security",
    "auth": "Who may do what",
    "insecure": "Consent to what is not safe",
    "limit": "Limits; what is above one is refused, never cut",
    "timeout": "How long a client may take",
    "lockd": "What lockd's protocol leaves to the server",
    "log": "Logs",
    "metrics": "Metrics and traces",
}
"""Tables of the file."""

SETTINGS: tuple[Setting, ...] = (
    Setting("store", "store", "text", "Where the queues are.", secret=True),
    Setting("keyring", "keyring", "path", "Keyring of an encrypted store."),
    Setting("namespace", "namespace", "text", "Namespace of requests that name none."),
    Setting("host", "host", "text", "Address to listen on."),
    Setting("port", "port", "number", "Port to listen on; 0 takes a free one."),
    Setting("tls_cert", "tls.cert", "path", "PEM file: the server's certificate and those between it and the CA."),
    Setting("tls_key", "tls.key", "path", "PEM file: its private key, where it is not in the certificate's file."),
    Setting(
        "tls_client_ca", "tls.client_ca", "path", "PEM file: the CAs whose clients are let in by certificate (mTLS)."
    ),
    Setting("tls_bundle", "tls.bundle", "path", "One PEM file with CA, certificate and key, in place of those three."),
    Setting(
        "tls_client_auth",
        "tls.client_auth",
        "choice",
        "Whether clients must show a certificate; auto: they must where a CA for them is given.",
        ("auto", "none", "optional", "required"),
    ),
    Setting("tls_revoked", "tls.revoked", "list", "Serial numbers (hexadecimal) of client certificates to refuse."),
    Setting("auth_tokens", "auth.tokens", "path", "File of bearer tokens, as `millpond token create` writes it."),
    Setting("insecure_plaintext", "insecure.plaintext", "flag", "Listen without TLS where others can reach it."),
    Setting("insecure_anonymous", "insecure.anonymous", "flag", "Let all who can reach it do everything."),
    Setting("max_body_bytes", "limit.body", "bytes", "Largest body of a request, but for payloads that are streamed."),
    Setting("max_meta_bytes", "limit.meta", "bytes", "Largest `meta` part of a multipart enqueue."),
    Setting("max_payload_bytes", "limit.payload", "bytes", "Largest payload of a message."),
    Setting("max_attributes_bytes", "limit.attributes", "bytes", "Largest attributes of a message."),
    Setting("max_header_bytes", "limit.header", "bytes", "Largest head of a request: its first line and all headers."),
    Setting("max_headers", "limit.headers", "number", "Most headers of a request."),
    Setting("max_connections", "limit.connections", "number", "Most connections at a time."),
    Setting(
        "max_connections_per_address",
        "limit.connections_per_address",
        "number",
        "Most connections of one client address; 0: no such limit.",
    ),
    Setting(
        "max_unsent_bytes",
        "limit.unsent",
        "bytes",
        "Most bytes of answers that clients have yet to read, all together; beyond it the slowest are cut off.",
    ),
    Setting("backlog", "limit.backlog", "number", "Most connections that wait to be accepted."),
    Setting("max_consumers", "limit.consumers", "number", "Most consumers that wait; more are told queue_busy."),
    Setting(
        "retry_window",
        "limit.retry_window",
        "duration",
        "For how long the store knows that an enqueue was carried out, so that a client may send it again; 0: not.",
    ),
    Setting("max_queues_per_namespace", "limit.queues", "number", "Most queues in a namespace; 0: no such limit."),
    Setting(
        "header_timeout", "timeout.header", "duration", "For the head of a request, or a TLS handshake, to arrive."
    ),
    Setting("body_timeout", "timeout.body", "duration", "For a body that makes no progress."),
    Setting("keep_alive", "timeout.idle", "duration", "For a connection on which no request is under way."),
    Setting("write_timeout", "timeout.write", "duration", "For a client that reads nothing of its answer."),
    Setting(
        "drain_grace",
        "timeout.drain",
        "duration",
        "When told to stop: for consumers to answer what they hold, until new connections are refused.",
    ),
    Setting(
        "shutdown_timeout",
        "timeout.shutdown",
        "duration",
        "From then on, for requests under way, until they are cut off.",
    ),
    Setting("max_visibility", "lockd.max_visibility", "duration", "Longest lease of a dequeue; longer wishes are cut."),
    Setting(
        "log_format",
        "log.format",
        "choice",
        "Form of the log; auto: text on a terminal, JSON lines elsewhere.",
        ("auto", "text", "json"),
    ),
    Setting("log_level", "log.level", "choice", "Least level that is logged.", ("debug", "info", "warning", "error")),
    Setting("log_access", "log.access", "flag", "Log every request."),
    Setting("log_audit", "log.audit", "path", "File for the audit log of destructive calls; else they go to the log."),
    Setting("metrics_off", "metrics.off", "flag", "Serve no /metrics."),
    Setting("metrics_public", "metrics.public", "flag", "Serve /metrics to those without a token, too."),
    Setting("metrics_queues", "metrics.queues", "number", "Most queues with figures of their own in /metrics."),
    Setting(
        "traces",
        "metrics.traces",
        "choice",
        "OpenTelemetry traces; auto: where a tracer provider is set up.",
        ("auto", "on", "off"),
    ),
)
BY_PLACE = {setting.place: setting for setting in SETTINGS}
BY_OPTION = {setting.option: setting for setting in SETTINGS}

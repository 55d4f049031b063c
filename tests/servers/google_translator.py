"""The translator of `tests.servers.google`, as a program: `python google_translator.py PORT PORT-OF-FAKE-GCS-SERVER`.

obstore speaks Google's XML API, and fake-gcs-server keeps conditions in the JSON API's multipart uploads only. So what
obstore sends is put into those here, and what comes back is put into XML; conditions are decided by fake-gcs-server.
Uploads in parts, which it does not know, are held here until they are completed.

A process of its own, lest requests wait for the interpreter that runs the tests.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import resource
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

_BOUNDARY = "the-parts-of-an-upload"


class _Reply:
    def __init__(self, reply: http.client.HTTPResponse) -> None:
        self.status = reply.status
        self.headers = reply.headers
        self.body = reply.read()

    def json(self) -> Any:
        return json.loads(self.body)


class _Behind:
    """fake-gcs-server, over as many connections as there are requests at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[http.client.HTTPConnection] = []

    def call(
        self, method: str, path: str, body: bytes | None = None, kind: str | None = None, **headers: str
    ) -> _Reply:
        try:
            connection = self._free.pop()
        except IndexError:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(method, path, body, {**({"Content-Type": kind} if kind else {}), **headers})
            reply = _Reply(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            # To the client the connection breaks, as it may in a cloud; the log says why.
            raise RuntimeError(f"fake-gcs-server did not answer {method} {path}") from error
        self._free.append(connection)
        return reply


class _Translator(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # idle connections of clients stay open
    request_queue_size = 128

    def __init__(self, port: int, behind: int) -> None:
        self.behind = _Behind(behind)
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.numbers = itertools.count(1)
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Translator
    disable_nagle_algorithm = True
    _REASONS: ClassVar[dict[int, str]] = {
        304: "NotModified",
        400: "InvalidArgument",
        404: "NoSuchKey",
        412: "PreconditionFailed",
    }

    def log_message(self, format: str, *args: object) -> None:
        """fake-gcs-server keeps the log."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _read(self) -> tuple[str, str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).removeprefix("/").partition("/")
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return bucket, name, query, self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str | None = None) -> None:
        code = code or self._REASONS.get(status, "InternalError")
        self._answer(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())

    def _object(self, bucket: str, name: str) -> str:
        return f"/storage/v1/b/{quote(bucket)}/o/{quote(name, safe='')}"

    def _missing(self, bucket: str) -> None:
        there = self.server.behind.call("GET", f"/storage/v1/b/{quote(bucket)}").status == 200
        self._fail(404, "NoSuchKey" if there else "NoSuchBucket")

    def _upload(self, bucket: str, name: str, data: bytes, condition: str | None) -> None:
        query = {"uploadType": "multipart", "name": name}
        if condition is not None:
            query["ifGenerationMatch"] = condition
        meta = json.dumps({"name": name}).encode()
        body = b"".join(
            (
                f"--{_BOUNDARY}\r\nContent-Type: application/json\r\n\r\n".encode(), meta,
                f"\r\n--{_BOUNDARY}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(), data,
                f"\r\n--{_BOUNDARY}--\r\n".encode(),
            )
        )  # fmt: skip
        path = f"/upload/storage/v1/b/{quote(bucket)}/o?{urlencode(query)}"
        reply = self.server.behind.call("POST", path, body, f"multipart/related; boundary={_BOUNDARY}")
        if reply.status == 404:
            self._fail(404, "NoSuchBucket")
        elif reply.status != 200:
            self._fail(reply.status)
        else:
            made = reply.json()
            headers = {"ETag": _etag(made), "x_goog_generation": made["generation"]}
            if self.command == "POST":  # the end of an upload in parts
                body = (
                    f"<CompleteMultipartUploadResult><ETag>{escape(_etag(made))}</ETag></CompleteMultipartUploadResult>"
                )
                self._answer(200, body.encode(), **headers)
            else:
                self._answer(200, **headers)

    def do_PUT(self) -> None:
        bucket, name, query, data = self._read()
        if "uploadId" in query:
            parts = self.server.uploads.get(query["uploadId"])
            if parts is None:
                self._fail(404, "NoSuchUpload")
                return
            parts[int(query["partNumber"])] = data
            self._answer(200, ETag=f'"{len(data)}"')
            return
        self._upload(bucket, name, data, self.headers.get("x-goog-if-generation-match"))

    def do_POST(self) -> None:
        bucket, name, query, _ = self._read()
        if "uploads" in query:
            id = str(next(self.server.numbers))
            self.server.uploads[id] = {}
            xml = f"<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, xml.encode())
            return
        parts = self.server.uploads.pop(query.get("uploadId", ""), None)
        if parts is None:
            self._fail(404, "NoSuchUpload")
            return
        data = b"".join(parts[number] for number in sorted(parts))
        self._upload(bucket, name, data, self.headers.get("x-goog-if-generation-match"))

    def do_DELETE(self) -> None:
        bucket, name, query, _ = self._read()
        if "uploadId" in query:
            self.server.uploads.pop(query["uploadId"], None)
            self._answer(204)
            return
        reply = self.server.behind.call("DELETE", self._object(bucket, name))
        if reply.status == 404:
            self._missing(bucket)
        else:
            self._answer(204 if reply.status == 200 else reply.status)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        bucket, name, query, _ = self._read()
        if not name:
            self._list(bucket, query)
            return
        passed = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        reply = self.server.behind.call("GET", self._object(bucket, name) + "?alt=media", **passed)
        if reply.status == 404:
            self._missing(bucket)
            return
        if reply.status not in {200, 206}:
            self._fail(reply.status)
            return
        generation = reply.headers["X-Goog-Generation"]
        hashes = dict(item.strip().split("=", 1) for item in reply.headers["X-Goog-Hash"].split(","))
        etag = _etag({"md5Hash": hashes["md5"]})
        if self.headers.get("If-Match", etag) != etag:
            self._fail(412)
            return
        headers = {
            "ETag": etag,
            "x_goog_generation": generation,
            "Last_Modified": reply.headers["Last-Modified"],
        }
        if "Content-Range" in reply.headers:
            headers["Content_Range"] = reply.headers["Content-Range"]
        self._answer(reply.status, reply.body, **headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        wanted = {"maxResults": "1000", **{key: query[key] for key in ("prefix", "delimiter") if key in query}}
        after = query.get("start-after", "")
        if after:
            wanted["startOffset"] = after
        if "continuation-token" in query:
            wanted["pageToken"] = query["continuation-token"]
        reply = self.server.behind.call("GET", f"/storage/v1/b/{quote(bucket)}/o?{urlencode(wanted)}")
        if reply.status != 200:
            self._fail(reply.status, "NoSuchBucket" if reply.status == 404 else None)
            return
        found = reply.json()
        token = found.get("nextPageToken")
        xml = ["<ListBucketResult>", f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>"]
        if token:
            xml.append(f"<NextContinuationToken>{escape(token)}</NextContinuationToken>")
        for item in found.get("items", []):
            if item["name"] > after:  # startOffset includes it
                xml.append(
                    f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
                    f"<LastModified>{item['updated']}</LastModified><ETag>{escape(_etag(item))}</ETag></Contents>"
                )
        for prefix in found.get("prefixes", []):
            xml.append(f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>")
        self._answer(200, "".join([*xml, "</ListBucketResult>"]).encode(), Date=formatdate(usegmt=True))


def _etag(meta: dict[str, Any]) -> str:
    """As the XML API has it: of the body, so that equal bodies have equal ones."""
    return f'"{base64.b64decode(meta["md5Hash"]).hex()}"'


if __name__ == "__main__":
    # Clients keep their connections for a minute and a half, and the tests have many clients.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    _Translator(int(sys.argv[1]), int(sys.argv[2])).serve_forever()

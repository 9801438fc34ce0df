"""A bucket of Google Cloud Storage on loopback: as much of its JSON API as gcsfs and tensorstore use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"
_OBJECT = re.compile(
    rf"(?:/download)?/storage/v1/b/{NAME}/o/([^/]+)"
    rf"(?:/(?:(?:rewriteTo|copyTo)/b/{NAME}|moveTo)/o/([^/]+))?"
)


class Bucket:
    """The objects, by name, as a server has them; an object is replaced whole or not at all.

    url: of the server.   objects: content and generation.   environment: what a process needs to find it.
    """

    def __init__(self, url: str):
        self.url = url
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self._generation = 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket this is
        }

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict | None:
        """Its description, or None where it is not of the generation that `query` asks for."""
        with self.lock:
            present = self.objects.get(name, (b"", 0))[1]
            if int(query.get("ifGenerationMatch", present)) != present:
                return None
            self._generation += 1
            self.objects[name] = (content, self._generation)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.objects):
                inside = name.startswith(prefix) and name >= query.get("startOffset", "")
                if not inside or ("endOffset" in query and name >= query["endOffset"]):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                if found:
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """A bucket that other processes reach while the context lasts."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bucket = Bucket(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.bucket
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a process that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._parse()
        if path == f"/storage/v1/b/{NAME}":
            return self._json({"kind": "storage#bucket", "name": NAME, "storageClass": "STANDARD"})
        if path == f"/storage/v1/b/{NAME}/o":
            return self._json(self.server.bucket.listing(query))
        name = self._object(path)
        with self.server.bucket.lock:
            content, generation = self.server.bucket.objects.get(name, (None, 0))
            known = content is not None and self.server.bucket.describe(name)
        if content is None:
            return self._json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._reply(304, b"")
        if query.get("alt") != "media":
            return self._json(known)
        headers = {"X-Goog-Generation": str(generation), "ETag": str(generation)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._reply(200, content, headers)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        else:
            first, last = max(0, len(content) - int(asked[2])), len(content) - 1
        if first > last:
            return self._reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._reply(206, content[first : last + 1], headers)

    def do_POST(self) -> None:
        bucket, (path, query), body = self.server.bucket, self._parse(), self._body()
        if path == f"/upload/storage/v1/b/{NAME}/o":
            kind = query["uploadType"]
            if kind == "media":
                return self._put(query["name"], body, query)
            if kind == "multipart":
                border = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
                about, content = re.split(rb"\r?\n?--" + re.escape(border) + rb"(?:--)?\r?\n?", body)[1:3]
                name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
                return self._put(name, re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1], query)
            upload = f"{len(bucket.uploads)}"
            name = query.get("name") or json.loads(body)["name"]
            bucket.uploads[upload] = (name, bytearray())
            return self._reply(200, b"{}", {"Location": f"{bucket.url}/resumable/{upload}"})
        if path.startswith("/resumable/"):
            return self._resume(path.rpartition("/")[2], body)
        source, target = (unquote(part) for part in _OBJECT.fullmatch(path).groups())
        if source not in bucket.objects:
            return self._json({"error": {"code": 404, "message": f"No such object: {source}"}}, 404)
        found = bucket.put(target, bucket.objects[source][0], query)
        if "/moveTo/o/" in path:
            del bucket.objects[source]
            return self._json(found)
        return self._json({"done": True, "resource": found})

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        path, query = self._parse()
        bucket, name = self.server.bucket, self._object(path)
        with bucket.lock:
            present = bucket.objects.get(name, (b"", 0))[1]
            if int(query.get("ifGenerationMatch", present)) != present:
                status = 412
            else:
                status = 204 if bucket.objects.pop(name, None) else 404
        self._reply(status, b"")

    def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
        found = self.server.bucket.put(name, content, query)
        self._json(found or {"error": {"code": 412, "message": "another generation"}}, 200 if found else 412)

    def _resume(self, upload: str, body: bytes) -> None:
        name, content = self.server.bucket.uploads[upload]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self._reply(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        return self._put(name, bytes(content), {})

    def _parse(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}

    def _object(self, path: str) -> str:
        return unquote(_OBJECT.fullmatch(path)[1])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def _json(self, value: dict, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

"""A store like Google Cloud Storage in the memory of the test, as far as its client needs it here."""

import base64
import contextlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "bucket"


@dataclass
class FakeStore:
    """One bucket.

    Attributes:
        objects: contents by name.
        generations: of each of them.
        requests: what was asked for: method and name, in order.
        fault: gets method and name of each request; the status that it returns fails the request.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str, str], int | None] = lambda method, name: None
    url: str = ""

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, as another program would."""
        self.objects[name] = content
        self.generations[name] = max(time.time_ns(), *(self.generations.values() or [0])) + 1

    def below(self, prefix: str) -> list[str]:
        """Names that begin so, without that beginning."""
        return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def json(self, name: str) -> dict[str, Any]:
        """How the store describes an object."""
        content = self.objects[name]
        generation = str(self.generations[name])
        return {
            "bucket": BUCKET, "name": name, "size": str(len(content)), "generation": generation,
            "metageneration": "1", "crc32c": checksum(content),
        }  # fmt: skip


def checksum(content: bytes) -> str:
    """CRC-32C as the store writes it."""
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


@contextlib.contextmanager
def serving() -> Iterator[FakeStore]:
    """A store that listens on a free port of this machine."""
    store = FakeStore()
    handler = type("Handler", (_Handler,), {"store": store, "uploads": {}, "lock": threading.RLock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeStore
    uploads: dict[str, Any]
    lock: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        split = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(split.query).items()}
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+)(/compose)?)?", split.path)
        if found is None:  # the client also asks about the bucket, which nothing here needs
            return self._answer(404, {"error": {"message": "not here", "code": 404}})
        kind, bucket, name = found[1], found[2], urllib.parse.unquote(found[3] or query.get("name", ""))
        if kind == "/upload" and query["uploadType"] == "multipart":
            header, content = self._parts(body)
            name = header["name"]
        with self.lock:
            self.store.requests.append((self.command, name or query.get("prefix", "")))
        status = self.store.fault(self.command, name)
        if status is not None:
            return self._answer(status, {"error": {"message": "it was told to fail", "code": status}})
        with self.lock:
            if bucket != BUCKET:
                return self._answer(404, {"error": {"message": "no bucket", "code": 404}})
            if kind == "/upload" and query["uploadType"] == "multipart":
                return self._finish(name, content, query, header.get("crc32c"))
            if kind == "/upload":
                return self._resumable(name, body, query)
            if self.command == "POST":
                return self._compose(name, json.loads(body), query)
            if not found[3]:
                names = [each for each in sorted(self.store.objects) if each.startswith(query.get("prefix", ""))]
                names = names[: int(query.get("maxResults", len(names)))]
                return self._answer(200, {"items": [self.store.json(each) for each in names]})
            generation = query.get("generation")
            if name not in self.store.objects or generation not in (None, str(self.store.generations[name])):
                return self._answer(404, {"error": {"message": "no object", "code": 404}})
            if self.command == "DELETE":
                del self.store.objects[name], self.store.generations[name]
                return self._answer(204, None)
            if kind == "/download" or query.get("alt") == "media":
                return self._media(name)
            return self._answer(200, self.store.json(name))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _parts(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        boundary = re.search(rb'boundary="?([^";]+)', self.headers["Content-Type"].encode())
        assert boundary is not None
        _, first, second, _ = body.split(b"--" + boundary[1])
        header = first.partition(b"\r\n\r\n")[2]
        return json.loads(header), second.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")

    def _finish(self, name: str, content: bytes, query: dict[str, str], sum_: str | None) -> None:
        there = self.store.generations.get(name, 0)
        if query.get("ifGenerationMatch", str(there)) != str(there):
            return self._answer(412, {"error": {"message": "precondition", "code": 412}})
        if sum_ is not None and sum_ != checksum(content):
            return self._answer(400, {"error": {"message": "checksum", "code": 400}})
        self.store.put(name, content)
        return self._answer(200, self.store.json(name))

    def _resumable(self, name: str, body: bytes, query: dict[str, str]) -> None:
        if self.command == "POST":
            name = name or json.loads(body)["name"]
            upload = str(len(self.uploads))
            self.uploads[upload] = (name, bytearray(), query)
            headers = {"Location": f"{self.store.url}{self.path}&upload_id={upload}"}
            return self._answer(200, {}, headers)
        name, content, first = self.uploads[query["upload_id"]]
        content += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            return self._answer(308, None, {"Range": f"bytes=0-{len(content) - 1}"})
        return self._finish(name, bytes(content), first, None)

    def _compose(self, name: str, body: dict[str, Any], query: dict[str, str]) -> None:
        names = [source["name"] for source in body["sourceObjects"]]
        if not all(each in self.store.objects for each in names):
            return self._answer(404, {"error": {"message": "no source", "code": 404}})
        return self._finish(name, b"".join(self.store.objects[each] for each in names), query, None)

    def _media(self, name: str) -> None:
        content = self.store.objects[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-hash", f"crc32c={self.store.json(name)['crc32c']}")
        self.send_header("x-goog-generation", str(self.store.generations[name]))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

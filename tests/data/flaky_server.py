"""A real HTTP server on loopback that serves a folder with byte ranges, and misbehaves when told to."""

import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

FAIL, STALL, CUT, SHORT, FORBID = "answer 500", "stall", "close in the middle", "send less, politely", "answer 403"


class FlakyServer(ThreadingHTTPServer):
    """``misbehave`` holds what to do with the next GET requests of files; ``always`` what to do with all."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type["_Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.misbehave: deque[str | None] = deque()
        self.always: str | None = None
        self.ranges = True
        self.key: str | None = None  # the query, or the header Authorization, without which everything is refused
        self.served: list[tuple[str, int]] = []  # file and bytes of every sound answer
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        place, _, query = self.path.partition("?")
        if self.server.key is not None and self.server.key not in (unquote(query), self.headers.get("Authorization")):
            return self._send(403, b"", {}, body)
        path = self.server.folder / place.lstrip("/")
        if path.is_dir():
            page = "".join(f'<a href="{child.name}">{child.name}</a>\n' for child in sorted(path.iterdir())).encode()
            return self._send(200, page, {"Content-Type": "text/html"}, body)
        if not path.exists():
            return self._send(404, b"", {}, body)
        if not body:
            return self._send(200, path.read_bytes(), {}, body)
        mood = self.server.always or (self.server.misbehave.popleft() if self.server.misbehave else None)
        if mood == FAIL:
            return self._send(500, b"out of order", {}, body)
        if mood == FORBID:
            return self._send(403, b"", {}, body)
        content, status, headers = path.read_bytes(), 200, {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.server.ranges:
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            if first >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"}, body)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if mood == SHORT:
            content = content[: len(content) // 2]
        if mood in (STALL, CUT):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if mood == STALL:
                self.server.released.wait(20)
            self.close_connection = True
            return None
        self.server.served.append((path.name, len(content)))
        return self._send(status, content, headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class S3Handler(_Handler):
    """As much of S3's REST API as reading takes: ``/bucket/key`` is a file of the folder, and a bucket can be
    listed."""

    def _answer(self, body: bool) -> None:
        self.path, _, query = self.path.partition("?")
        if "list-type=2" not in query:
            return super()._answer(body)
        prefix = parse_qs(query).get("prefix", [""])[0]
        bucket = self.server.folder / self.path.strip("/")
        files = sorted(file for file in (bucket / prefix).iterdir()) if (bucket / prefix).is_dir() else []
        listed = "".join(
            (
                f"<Contents><Key>{file.relative_to(bucket)}</Key><Size>{file.stat().st_size}</Size></Contents>"
                if file.is_file()
                else f"<CommonPrefixes><Prefix>{file.relative_to(bucket)}/</Prefix></CommonPrefixes>"
            )
            for file in files
        )
        page = (
            "<ListBucketResult"
            f' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket.name}</Name><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>'
        )
        return self._send(200, page.encode(), {"Content-Type": "application/xml"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        stamps = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        super()._send(status, content, stamps | headers, body)


class GCSHandler(_Handler):
    """As much of Google Cloud Storage's JSON API as reading takes: a bucket is a folder, an object a file in it."""

    def _answer(self, body: bool) -> None:
        path, _, query = self.path.partition("?")
        parts = re.fullmatch(r"/(download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", path)
        if parts is None:
            return self._send(404, b"", {}, body)
        download, bucket, name = parts.groups()
        folder = self.server.folder / bucket
        if download:
            self.path = f"/{bucket}/{unquote(name)}"
            return super()._answer(body)
        if self.server.always == FORBID:
            return self._send(403, b"{}", {}, body)
        if name is not None:
            file = folder / unquote(name)
            found = self._object(folder, file) if file.is_file() else None
            return self._send(
                200 if found else 404, json.dumps(found).encode(), {"Content-Type": "application/json"}, body
            )
        prefix = parse_qs(query).get("prefix", [""])[0]
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and str(file.relative_to(folder)).startswith(prefix)
        ]
        near = [file for file in files if "/" not in str(file.relative_to(folder))[len(prefix) :]]
        folders = {
            prefix + str(file.relative_to(folder))[len(prefix) :].partition("/")[0] + "/"
            for file in files
            if file not in near
        }
        listed = {"items": [self._object(folder, file) for file in near], "prefixes": sorted(folders)}
        return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, body)

    def _object(self, folder: Path, file: Path) -> dict[str, str]:
        return {"bucket": folder.name, "name": str(file.relative_to(folder)), "size": str(file.stat().st_size)}


class HubHandler(_Handler):
    """As much of the Hugging Face hub's API as reading a data set takes: ``datasets/ORG/NAME`` is a folder of the
    folder."""

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths", [])
        folder = self._dataset()
        found = [self._entry(folder, folder / name) for name in asked if (folder / name).exists()]
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, True)

    def _answer(self, body: bool) -> None:
        path, _, query = self.path.partition("?")
        if not path.startswith("/api/"):
            self.path = re.sub("/resolve/[^/]+/", "/", path)
            return super()._answer(body)
        folder = self._dataset()
        tree = re.search(r"/tree/[^/]+/?(.*)", path)
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        found: object = {"id": "/".join(folder.parts[-2:]), "sha": "0" * 40}
        if tree:
            below = (folder / unquote(tree[1])).glob(
                "**/*" if "true" in parse_qs(query)["recursive"][0].lower() else "*"
            )
            found = [self._entry(folder, file) for file in sorted(below)]
        return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

    def _dataset(self) -> Path:
        return self.server.folder.joinpath(*self.path.split("/")[2:5])

    def _entry(self, folder: Path, file: Path) -> dict[str, object]:
        kind = "file" if file.is_file() else "directory"
        return {"type": kind, "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "1" * 40}


@contextmanager
def serving(folder: Path, handler: type[_Handler] = _Handler) -> Iterator[FlakyServer]:
    """A server of ``folder`` in a thread, for as long as the context lasts."""
    server = FlakyServer(folder, handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)

"""A Google Cloud Storage of one process: as much of its JSON API as gcsfs, google-cloud-storage and tensorstore use.

It also refuses: buckets that are not in `buckets` do not exist, and `denied` methods are forbidden.
"""

import base64
import email.parser
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TIME = "2026-01-01T00:00:00.000Z"
Query = dict[str, str]
Answer = tuple[int, Any]


class FakeGcs:
    """buckets: name -> object's name -> (bytes, generation). read: bytes of every object sent. denied: HTTP methods."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, tuple[bytes, int]]] = {name: {} for name in buckets}
        self.read: Counter[str] = Counter()
        self.denied: set[str] = set()
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.generation, self.url, self.lock = 0, "", threading.RLock()

    @contextmanager
    def serving(self) -> Iterator["FakeGcs"]:
        server = Server(("127.0.0.1", 0), handler(self))
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environ(self) -> dict[str, str]:
        """What sends the three clients here, without credentials and without a look for Google's machines."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put_directory(self, directory: os.PathLike, bucket: str, prefix: str) -> None:
        for file in pathlib.Path(directory).rglob("*"):
            if file.is_file():
                self.put(bucket, f"{prefix}/{file.relative_to(directory).as_posix()}", file.read_bytes(), {})

    def get_directory(self, bucket: str, prefix: str, directory: pathlib.Path) -> pathlib.Path:
        for name in self.names(bucket, f"{prefix}/"):
            file = directory / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.buckets[bucket][name][0])
        return directory

    def put(self, bucket: str, name: str, data: bytes, query: Query) -> Answer:
        with self.lock:
            there = self.buckets[bucket].get(name, (b"", 0))[1]
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != there:
                return 412, error(412, "conditionNotMet")
            self.generation += 1
            self.buckets[bucket][name] = (bytes(data), self.generation)
            return 200, self.metadata(bucket, name)

    def metadata(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "etag": str(generation),
            "timeCreated": TIME,
            "updated": TIME,
        }

    def listing(self, bucket: str, query: Query) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, bool] = {}
        for name in self.names(bucket, prefix):
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name[len(prefix) :], "", "")
            entry = prefix + head + cut
            in_range = query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")
            if in_range and name > query.get("pageToken", "") and entry > query.get("pageToken", ""):
                entries[entry] = bool(cut)
        page = list(entries)[: int(query.get("maxResults", 1000))]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [self.metadata(bucket, name) for name in page if not entries[name]]
        answer["prefixes"] = [name for name in page if entries[name]]
        # Past everything under a prefix that was listed as one.
        last = page[-1] + ("\U0010ffff" if entries[page[-1]] else "") if page else ""
        return answer | ({"nextPageToken": last} if len(page) < len(entries) else {})

    def delete(self, bucket: str, name: str, query: Query) -> Answer:
        with self.lock:
            stored = self.buckets[bucket].get(name)
            if stored is None:
                return 404, error(404, "notFound")
            if query.get("ifGenerationMatch", str(stored[1])) != str(stored[1]):
                return 412, error(412, "conditionNotMet")
            del self.buckets[bucket][name]
            return 204, b""


class Server(http.server.ThreadingHTTPServer):
    # Of http.server's own five, a checkpoint's connections overflow: each that is dropped waits seconds to minutes.
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up."""


def error(code: int, reason: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": reason, "errors": [{"reason": reason, "message": reason}]}}


def handler(store: FakeGcs) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Small answers would otherwise wait for the client's acknowledgement of their headers.
        wbufsize = -1

        def log_message(self, *_: Any) -> None:
            """Tests print enough."""

        def do_GET(self) -> None:
            self.answer(self.get)

        def do_POST(self) -> None:
            self.answer(self.post)

        def do_PUT(self) -> None:
            self.answer(self.post)

        def do_DELETE(self) -> None:
            self.answer(lambda bucket, name, query, _: store.delete(bucket, name, query))

        def answer(self, act: Callable[[str, str, Query, bytes], Answer]) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            match = re.search(r"/b/([^/]+)(?:/o(?:/(.*))?)?$", url.path)
            bucket, name = (urllib.parse.unquote(part or "") for part in match.groups()) if match else ("", "")
            self.extra: dict[str, str] = {}
            if url.path.startswith("/batch/"):
                status, said = self.batch(body)
            elif bucket not in store.buckets:
                status, said = 404, error(404, "The specified bucket does not exist.")
            elif self.command in store.denied:
                status, said = 403, error(403, f"someone does not have permission for {self.command} of {name}")
            else:
                self.lists = match is not None and url.path.endswith("/o")
                status, said = act(bucket, name, query, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for key, value in ({"Content-Type": "application/json"} | self.extra).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        def get(self, bucket: str, name: str, query: Query, _: bytes) -> Answer:
            if not name:
                return 200, store.listing(bucket, query) if self.lists else {"name": bucket, "kind": "storage#bucket"}
            if name not in store.buckets[bucket]:
                return 404, error(404, "notFound")
            if query.get("alt") != "media":
                return 200, store.metadata(bucket, name)
            data, generation = store.buckets[bucket][name]
            if query.get("ifGenerationNotMatch") == str(generation):
                return 304, b""
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            self.extra = {"Content-Type": "application/octet-stream", "X-Goog-Generation": str(generation)}
            if wanted is None:
                store.read[name] += len(data)
                return 200, data
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            if start >= len(data):
                return 416, error(416, "requestedRangeNotSatisfiable")
            self.extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            store.read[name] += stop - start
            return 206, data[start:stop]

        def post(self, bucket: str, name: str, query: Query, body: bytes) -> Answer:
            kind = query.get("uploadType")
            if "upload_id" in query:
                return self.resumed(query, body)
            if kind == "media":
                return store.put(bucket, query["name"], body, query)
            if kind == "multipart":
                # As mail has it, with the boundary where gcsfs writes it.
                about, data = parts(body, self.headers["Content-Type"])
                return store.put(bucket, json.loads(about)["name"], data, query)
            assert kind == "resumable", self.path
            number = str(len(store.uploads))
            store.uploads[number] = (bucket, query.get("name") or json.loads(body)["name"], bytearray())
            where = f"{store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            self.extra = {"Location": where}
            return 200, {}

        def resumed(self, query: Query, body: bytes) -> Answer:
            bucket, name, data = store.uploads[query["upload_id"]]
            data += body
            if self.headers["Content-Range"].endswith("/*"):
                self.extra = {"Range": f"bytes=0-{len(data) - 1}"}
                return 308, b""
            return store.put(bucket, name, bytes(data), {})

        def batch(self, body: bytes) -> Answer:
            """Deletions, several in one request."""
            answers = []
            for bucket, name in re.findall(rb"DELETE /storage/v1/b/([^/ ]+)/o/([^? ]+)", body):
                if "DELETE" in store.denied:
                    status = 403
                else:
                    status, _ = store.delete(*(urllib.parse.unquote(part.decode()) for part in (bucket, name)), {})
                said = f'\n{{"error": {{"code": {status}, "message": "someone may not"}}}}\n' if status >= 400 else ""
                answers.append(f"--edge\nContent-Type: application/http\n\nHTTP/1.1 {status} Said\n{said}\n")
            self.extra = {"Content-Type": "multipart/mixed; boundary=edge"}
            return 200, ("".join(answers) + "--edge--").encode()

    return Handler


def parts(body: bytes, content_type: str) -> tuple[bytes, bytes]:
    """Metadata and data of a multipart upload, whatever bytes the data is."""
    boundary = email.parser.HeaderParser().parsestr(f"Content-Type: {content_type}\n\n").get_param("boundary")
    edge = b"--" + str(boundary).strip("\"'").encode()
    _, about, rest = body.split(edge, 2)
    data = rest[: rest.rindex(edge)]
    separate = re.compile(rb"\r?\n\r?\n")
    return separate.split(about, 1)[1], re.sub(rb"\r?\n\Z", b"", separate.split(data, 1)[1])

"""A Hugging Face hub of one process: as much of its API as huggingface_hub asks for to push a model and to fetch one.

Files reach it as the hub wants them: small texts in the commit itself, all others by their SHA-256 through Git LFS.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

TOKEN = "hf_a_token_that_may_write"
READER = "hf_a_token_that_may_read"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Repo:
    """files: name -> bytes, of the newest commit. commits: their number is the commit's name."""

    def __init__(self, private: bool):
        self.private, self.files, self.commits = private, {".gitattributes": b"*.safetensors filter=lfs\n"}, 1

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"

    def tags(self) -> list[str]:
        header = re.match(rb"---\n(.*?)\n---\n", self.files.get("README.md", b""), re.DOTALL)
        return yaml.safe_load(header[1]).get("tags", []) if header else []


class FakeHub:
    """blobs: what was sent by SHA-256, in a commit or not yet. asked: (method, path, its token) of every request.

    sent: the sums of what was uploaded, each time it was.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.sent: list[str] = []
        self.url, self.lock = "", threading.RLock()

    @contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environ(self, **more: str) -> dict[str, str]:
        """What sends a process's client here, by LFS in place of Xet, whose service is another one's."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | more

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] != "me":
            return 403, {"error": f"You don't have the rights to create a model under {body['organization']}"}
        if name in self.repos:
            return 409, {"error": "You already created this model repo"}
        private = body.get("private", body.get("visibility") == "private")
        self.repos[name] = Repo(private)
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def info(self, repo: str) -> tuple[int, Any]:
        it = self.repos[repo]
        siblings = [{"rfilename": name} for name in sorted(it.files)]
        known = {"id": repo, "sha": it.sha, "private": it.private, "tags": it.tags(), "siblings": siblings}
        return 200, known | {"modelId": repo, "downloads": 0, "likes": 0}

    def tree(self, repo: str) -> tuple[int, Any]:
        entries = []
        for name, data in sorted(self.repos[repo].files.items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return 200, entries

    def preupload(self, repo: str, body: dict[str, Any]) -> tuple[int, Any]:
        def mode(name: str) -> str:
            return "lfs" if name.endswith(".safetensors") else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in body["files"]]
        return 200, {"files": files}

    def batch(self, body: dict[str, Any]) -> tuple[int, Any]:
        def entry(wanted: dict[str, Any]) -> dict[str, Any]:
            there = wanted["oid"] in self.blobs
            upload = {"actions": {"upload": {"href": f"{self.url}/blobs/{wanted['oid']}"}}}
            return wanted | ({} if there else upload)

        return 200, {"transfer": "basic", "objects": [entry(wanted) for wanted in body["objects"]]}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        it = self.repos[repo]
        parent = lines[0]["value"].get("parentCommit", it.sha)
        if parent != it.sha:
            return 412, {"error": "A commit has happened since"}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                it.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                it.files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del it.files[value["path"]]
        it.commits += 1
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{it.sha}", "commitOid": it.sha, "success": True}


_ROUTES = {
    "POST": {
        r"/api/repos/create": lambda hub, body: hub.create(json.loads(body)),
        r"/api/validate-yaml": lambda hub, body: (200, {"errors": [], "warnings": []}),
        rf"/api/models/{_REPO}/preupload/main": lambda hub, body, repo: hub.preupload(repo, json.loads(body)),
        rf"/{_REPO}\.git/info/lfs/objects/batch": lambda hub, body, repo: hub.batch(json.loads(body)),
        rf"/api/models/{_REPO}/commit/main": lambda hub, body, repo: hub.commit(
            repo, [json.loads(line) for line in body.splitlines()]
        ),
    },
    "GET": {
        rf"/api/models/{_REPO}(/revision/\w+)?": lambda hub, body, repo: hub.info(repo),
        rf"/api/models/{_REPO}/tree/\w+": lambda hub, body, repo: hub.tree(repo),
    },
}


def _handler(hub: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            self.route(self.body())

        def do_GET(self) -> None:
            self.download() if "/resolve/" in self.path else self.route(b"")

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            """A file's bytes, under the name of their sum; the address is a secret in itself, so without token."""
            data = self.body()
            name = hashlib.sha256(data).hexdigest()
            assert self.path == f"/blobs/{name}"
            hub.blobs[name] = data
            hub.sent.append(name)
            self.answer(200, {})

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def token(self) -> str:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.asked.append((self.command, self.path, token))
            return token

        def route(self, body: bytes) -> None:
            token, path = self.token(), self.path.partition("?")[0]
            routes = ((re.fullmatch(pattern, path), act) for pattern, act in _ROUTES[self.command].items())
            match, act = next((found for found in routes if found[0]), (None, None))
            if match is None or act is None:
                # The client also asks for what it can do without.
                self.answer(404, {"error": f"{path} is nothing that this hub has"})
                return
            named = match.groupdict()
            if token not in (TOKEN, READER):
                self.answer(401, {"error": "Invalid credentials in Authorization header"})
            elif "repo" in named and named["repo"] not in hub.repos:
                self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif self.command == "POST" and token == READER and path != "/api/validate-yaml":
                self.answer(403, {"error": "this token has the role read"})
            else:
                with hub.lock:
                    status, value = act(hub, body, **named)
                self.answer(status, value)

        def download(self) -> None:
            match = re.fullmatch(rf"/{_REPO}/resolve/(\w+)/(.+)", self.path.partition("?")[0])
            assert match is not None, self.path
            self.token()
            it = hub.repos[match["repo"]]
            if (data := it.files.get(match[3])) is None:
                self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            sums = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": it.sha}
            self.send(200, data, sums)

        def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            error = {"X-Error-Message": value["error"]} if isinstance(value, dict) and "error" in value else {}
            self.send(
                status, json.dumps(value).encode(), {"Content-Type": "application/json"} | error | (headers or {})
            )

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler

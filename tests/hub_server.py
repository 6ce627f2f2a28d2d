"""A hub on loopback that knows just enough of the protocol to create, push, list and load repositories of models and data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
REPO = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"
API = r"/api/(?P<repo>(?:models|datasets)/[\w.-]+/[\w.-]+)"
LFS_SUFFIXES = (".safetensors", "tokenizer.json", ".parquet")


class Repository:
    """The files of branch main, and how many commits made them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.private = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repositories: by "owner/name", those of data by "datasets/owner/name".
        requests: (method, path) of every request, in order.
        url: for `HF_ENDPOINT`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running, empty hub, for the time of a `with` block."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------ plumbing

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self._body()
        method = "GET" if self.command == "HEAD" else self.command
        writes = method == "POST" and path.startswith("/api/") and not re.search("/validate-yaml$|/paths-info/", path)
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, {"error": "a token that may write is needed"})
        for verb, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb == method:
                groups = found.groupdict()
                if "repo" in groups:
                    groups["repo"] = groups["repo"].removeprefix("models/")
                repository = self.server.repositories.get(groups.get("repo", ""))
                if "repo" in groups and repository is None:
                    return self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return answer(self, body, repository, **groups)
        self._reply(404, {"error": f"this hub does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------ routes

    def validate_yaml(self, body: bytes, repository: None) -> None:
        self._reply(200, {"errors": [], "warnings": []})

    def create(self, body: bytes, repository: None) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        key = f"datasets/{name}" if wanted.get("type") == "dataset" else name
        status = 409 if key in self.server.repositories else 200
        self.server.repositories.setdefault(key, Repository())
        self.server.repositories[key].private |= wanted.get("visibility") == "private"
        self._reply(status, {"url": f"{self.server.url}/{key}", "name": name})

    def preupload(self, body: bytes, repository: Repository, repo: str) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
        files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
        self._reply(200, {"files": files})

    def lfs_batch(self, body: bytes, repository: Repository, repo: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._reply(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, repository: None, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._reply(200, {})

    def commit(self, body: bytes, repository: Repository, repo: str) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.server.url}/{repo}/commit/{repository.sha}"
        self._reply(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    def info(self, body: bytes, repository: Repository, repo: str) -> None:
        siblings = [{"rfilename": path} for path in repository.files]
        self._reply(200, {"id": repo, "sha": repository.sha, "private": False, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repository: Repository, repo: str, folder: str | None = None) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in repository.files if path.startswith(prefix)]
        if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
            below = list(dict.fromkeys(prefix + path.removeprefix(prefix).partition("/")[0] for path in below))
        self._reply(200, [self._entry(repository, path) for path in below])

    def paths_info(self, body: bytes, repository: Repository, repo: str) -> None:
        folders = {path.rpartition("/")[0] for path in repository.files}
        wanted = [path for path in parse_qs(body.decode())["paths"] if path in folders | repository.files.keys()]
        self._reply(200, [self._entry(repository, path) for path in wanted])

    def _entry(self, repository: Repository, path: str) -> dict:
        data = repository.files.get(path)
        if data is None:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def resolve(self, body: bytes, repository: Repository, repo: str, path: str) -> None:
        commit = {"X-Repo-Commit": repository.sha}
        data = repository.files.get(path)
        if data is None:
            return self._reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', **commit}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._reply(206, data[start : end + 1], headers)
        self._reply(200, data, headers)


ROUTES = [
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"{API}/preupload/main", _Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", f"{API}/commit/main", _Handler.commit),
    ("GET", f"{API}(?:/revision/[^/]+)?", _Handler.info),
    ("GET", f"{API}/tree/[^/]+(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", f"{API}/paths-info/[^/]+", _Handler.paths_info),
    ("GET", f"/{REPO}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
]

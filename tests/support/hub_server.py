"""A Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client.

It speaks the endpoints that downloads and uploads use, over repositories held in memory, with Git LFS files on a
second address as on the real Hub, keeps a record of every request, and misbehaves on demand::

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})
        use_hub(monkeypatch, hub, tmp_path)
        ...
        assert not hub.gets("model.safetensors")
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_" + "w" * 20
READ_TOKEN = "hf_" + "r" * 20
STRANGER_TOKEN = "hf_" + "s" * 20
ALWAYS = 10**9


@dataclass
class Request:
    """One request as it was answered.

    Attributes:
        method: HTTP method.
        path: path and query.
        range: the Range header.
        token: the bearer token.
        status: of the answer; 0 if the connection was cut before it.
        sent: bytes of the answer's body.
        received: bytes of the request's body.
        file: name of the file that is read, also where the path has only its hash.
    """

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0
    received: int = 0
    file: str = ""


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path or file name contains a text."""

    match: str
    method: str
    times: float
    after: int | None = None
    status: int | None = None
    body: bytes | None = None
    delay: float = 0.0


@dataclass
class Repo:
    """A repository: commits are whole trees."""

    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, bytes], message: str) -> str:
        text = f"{self.name} {branch} {len(self.commits)} {message}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.messages[sha] = message
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """The Hub.

    Attributes:
        url: address for HF_ENDPOINT.
        requests: every request so far.
        repos: repositories by id.
        users: what each token stands for: name, role, organisations, and repositories whose gate is open to it.
        objects: Git LFS objects by sha256, also those that no commit has yet.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.users: dict[str, dict[str, Any]] = {
            WRITE_TOKEN: {"name": "owner", "role": "write", "orgs": ["team"], "granted": set()},
            READ_TOKEN: {"name": "owner", "role": "read", "orgs": ["team"], "granted": set()},
            STRANGER_TOKEN: {"name": "stranger", "role": "write", "orgs": [], "granted": set()},
        }
        self.connections: set[socket.socket] = set()
        self._servers: list[ThreadingHTTPServer] = []
        self.url = self._listen()
        self.storage_url = self._listen()

    def _listen(self) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.daemon_threads = True
        server.hub = self  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; afterwards connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []
        # Clients keep connections open, and those would be served until they end.
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Put a commit with exactly these files on a branch of a repository, and return its hash."""
        if isinstance(files, Path):
            files = {entry.name: entry.read_bytes() for entry in files.iterdir() if entry.is_file()}
        entry = self.repos.setdefault(repo, Repo(repo))
        entry.private, entry.gated = private, gated
        self.objects.update({hashlib.sha256(data).hexdigest(): data for data in files.values()})
        return entry.commit(branch, files, "add")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The tree of a revision."""
        entry = self.repos[repo]
        return entry.commits[entry.resolve(revision)]

    def cut(self, match: str, *, after: int, times: float = 1, method: str = "GET") -> None:
        """Cut the connection after so many bytes of a body (of the request's body for PUT and POST)."""
        self.faults.append(Fault(match, method, times, after=after))

    def fail(
        self, match: str, *, status: int = 500, times: float = 1, method: str = "GET", body: bytes | None = None
    ) -> None:
        """Answer with an error, in the Hub's manner or with a given body."""
        self.faults.append(Fault(match, method, times, status=status, body=body))

    def slow(self, match: str, *, seconds: float, times: float = 1, method: str = "GET") -> None:
        """Answer late."""
        self.faults.append(Fault(match, method, times, delay=seconds))

    def gets(self, file: str) -> list[Request]:
        """GET requests that transferred (a part of) a file."""
        return [r for r in self.requests if r.method == "GET" and r.file == file and r.status in (200, 206)]

    def sent(self, file: str | None = None) -> int:
        """Bytes sent, of one file or altogether."""
        return sum(r.sent for r in self.requests if file is None or r.file == file)

    def paths(self, method: str) -> list[str]:
        """Paths requested with a method, without queries."""
        return [urlsplit(r.path).path for r in self.requests if r.method == method]

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                hit = fault.match in request.path or fault.match == request.file
                if fault.times > 0 and fault.method == request.method and hit:
                    fault.times -= 1
                    return fault
        return None


class _Cut(Exception):
    """The connection ends here."""


class _Refusal(Exception):
    """An error answer in the Hub's manner."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_lfs(name) else git_oid(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Each write of a header and a body would otherwise wait for the acknowledgement of the one before.
    disable_nagle_algorithm = True

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.record = Request(self.command, self.path, self.headers.get("Range"), bearer)
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if self.command in ("GET", "HEAD"):
            self.record.file = (
                parse_qs(parts.query)["file"][0]
                if path.startswith("/cdn/")
                else path.rpartition("/")[2]
                if "/resolve/" in path
                else ""
            )
        with self.hub.lock:
            self.hub.requests.append(self.record)
        self.fault = self._fault(path)
        try:
            body = self._body()
            if self.fault and self.fault.delay:
                threading.Event().wait(self.fault.delay)  # tests may have put time.sleep out of action
            if self.fault and self.fault.body is not None:
                self._send(self.fault.status or 200, self.fault.body, {"Content-Type": "text/html"})
                return
            if self.fault and self.fault.status:
                raise _Refusal(self.fault.status, None, "something went wrong")
            self._route(parts.path, path, body)
        except _Refusal as refusal:
            self._refuse(refusal)
        except (_Cut, ConnectionError):
            self.close_connection = True
            # shutdown and not close, since rfile and wfile keep the socket open.
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _fault(self, path: str) -> Fault | None:
        # A redirect has no body to cut, so the fault waits for the request that has.
        if self.command == "GET" and "/resolve/" in path and is_lfs(path):
            return None
        return self.hub.take_fault(self.record)

    def _body(self) -> bytes:
        if self.command not in ("PUT", "POST"):
            return b""
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        limit = self.fault.after if self.fault and self.fault.after is not None else math.inf
        data = b"".join(self._pieces(length, chunked, limit))
        self.record.received = len(data)
        if len(data) >= limit:
            raise _Cut
        return data

    def _pieces(self, length: int, chunked: bool, limit: float) -> list[bytes]:
        if not chunked:
            return [self.rfile.read(int(min(length, limit)))]
        pieces: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
            if sum(map(len, pieces)) >= limit:
                return pieces
        self.rfile.readline()
        return pieces

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = len(body)
        if self.fault and self.fault.after is not None and self.command == "GET":
            limit = min(limit, self.fault.after)
        # Before the write, since the client may be done with the answer before this thread goes on.
        self.record.sent = limit
        self.wfile.write(body[:limit])
        self.wfile.flush()
        if limit < len(body):
            raise _Cut

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self._send(status, json.dumps(value).encode(), {**kind, **(headers or {})})

    def _refuse(self, refusal: _Refusal) -> None:
        headers = {"X-Error-Message": refusal.message}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self._json({"error": refusal.message}, refusal.status, headers)

    def _route(self, raw: str, path: str, body: bytes) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, handler in _ROUTES:
            # Quoted slashes belong to a revision, so the path is split before it is unquoted.
            if verb == method and (match := re.fullmatch(pattern, raw)):
                handler(self, body, **{key: unquote(value) for key, value in match.groupdict().items()})
                return
        raise _Refusal(404, None, f"no such endpoint {path}")

    # --- who may do what

    def _user(self) -> dict[str, Any] | None:
        if self.record.token is None:
            return None
        user = self.hub.users.get(self.record.token)
        if user is None:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, repo: str) -> bool:
        user = self._user()
        owner = repo.partition("/")[0]
        return user is not None and user["role"] == "write" and owner in (user["name"], *user["orgs"])

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user = self._user()
        entry = self.hub.repos.get(name)
        owner = name.partition("/")[0]
        hidden = entry is not None and entry.private and (user is None or owner not in (user["name"], *user["orgs"]))
        if entry is None or hidden:
            raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not self._may_write(name):
            raise _Refusal(403, None, "You don't have the right permission")
        return entry

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    # --- reading

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        token = {"displayName": "test", "role": user["role"]}
        orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in user["orgs"]]
        self._json({"type": "user", "name": user["name"], "auth": {"accessToken": token}, "orgs": orgs})

    def model(self, body: bytes, repo: str, revision: str = "main") -> None:
        entry = self._repo(repo)
        sha, tree = self._tree(entry, revision)
        sizes = "blobs=" in self.path
        siblings = [
            {"rfilename": name, **({"size": len(data), "blobId": git_oid(data)} if sizes else {})}
            for name, data in tree.items()
        ]
        self._json(
            {
                "_id": "0" * 24,
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": entry.private,
                "gated": "manual" if entry.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, tree = self._tree(self._repo(repo), revision)
        self._json(
            [{"type": "file", "path": name, "size": len(data), "oid": git_oid(data)} for name, data in tree.items()]
        )

    def refs(self, body: bytes, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self._repo(repo).refs.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def auth_check(self, body: bytes, repo: str) -> None:
        self._repo(repo)
        self._json({})

    def auth_check_write(self, body: bytes, repo: str) -> None:
        self._repo(repo, write=True)
        self._json({})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        entry = self._repo(repo)
        user = self._user()
        if entry.gated and (user is None or repo not in user["granted"]):
            message = f"Access to model {repo} is restricted."
            raise _Refusal(403 if user else 401, "GatedRepo", message)
        sha, tree = self._tree(entry, revision)
        if file not in tree:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = tree[file]
        etag = f'"{_oid(file, data)}"'
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not is_lfs(file):
            self._content(data, {**headers, "ETag": etag})
            return
        location = f"{self.hub.storage_url}/cdn/{hashlib.sha256(data).hexdigest()}?Signature=secret&file={file}"
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": etag, "Location": location}
        self._send(302, b"Found. Redirecting", headers)

    def cdn(self, body: bytes, oid: str) -> None:
        self._content(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range or "")
        if not self.record.range:
            self._send(200, data, headers)
            return
        start, end = (int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)) if wanted else (0, -1)
        if start > end:
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    # --- writing

    def create(self, body: bytes) -> None:
        payload = json.loads(body)
        user = self._user()
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        name = f"{payload.get('organization') or user['name']}/{payload['name']}"
        url = f"{self.hub.url}/{name}"
        if not self._may_write(name):
            raise _Refusal(403, None, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = bool(payload.get("private")) or payload.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": url, "name": name})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        entry = self._repo(repo, write=True)
        if branch in entry.refs:
            raise _Refusal(409, None, "Reference already exists")
        entry.refs[branch] = self._tree(entry, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        self._json({})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if content.startswith("---") and "\n---" not in content[3:]:
            self._json({"errors": [{"message": "front matter does not end"}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, tree = self._tree(self._repo(repo, write=True), revision)
        answers = []
        for entry in json.loads(body)["files"]:
            name = entry["path"]
            answer = {
                "path": name,
                "uploadMode": "lfs" if is_lfs(name) else "regular",
                "shouldIgnore": False,
            }
            if name in tree:
                answer["oid"] = _oid(name, tree[name])
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            known = entry["oid"] in self.hub.objects
            target = {"upload": {"href": f"{self.hub.storage_url}/lfs/{entry['oid']}", "header": {}}}
            objects.append({**entry, **({} if known else {"actions": target})})
        self._json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, None, "the content does not have this hash")
        self.hub.objects[oid] = body
        self._send(200, b"", {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        entry = self._repo(repo, write=True)
        if revision not in entry.refs:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(self._tree(entry, revision)[1])
        summary = ""
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                summary = value["summary"]
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refusal(400, None, f"{value['path']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, None, f"unknown step {step['key']}")
        sha = entry.commit(revision, files, summary)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("GET", _MODEL, _Handler.model),
    ("GET", _MODEL + r"/revision/(?P<revision>[^/]+)", _Handler.model),
    ("GET", _MODEL + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", _MODEL + r"/refs", _Handler.refs),
    ("GET", _MODEL + r"/auth-check", _Handler.auth_check),
    ("GET", _MODEL + r"/auth-check/write", _Handler.auth_check_write),
    ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("GET", r"/cdn/(?P<oid>\w+)", _Handler.cdn),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", _MODEL + r"/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _MODEL + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", _MODEL + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
)


def hub_environment(hub: HubServer, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
    """Environment variables with which a fresh process uses this Hub and nothing of the user's."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        # Xet is a second protocol with servers of its own; plain Git LFS carries the same files.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def use_hub(monkeypatch: Any, hub: HubServer, home: Path, *, token: str | None = None, offline: bool = False) -> None:
    """Make huggingface_hub in this process use this Hub, although it has read the environment long ago."""
    from huggingface_hub import constants, file_download, utils

    for name, value in hub_environment(hub, home, token=token, offline=offline).items():
        monkeypatch.setenv(name, value)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # before 1.0 it had a copy of its own
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    utils.disable_progress_bars()
    # Pooled connections, and before 1.0 also the offline switch, live in the session.
    (getattr(utils, "close_session", None) or utils.reset_sessions)()

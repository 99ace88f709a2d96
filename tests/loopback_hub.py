"""A Hub on 127.0.0.1, for the real client: repositories, commits, large files, and faults.

    with LoopbackHub() as hub:  # then in a process of its own, or with `hub.environment(folder)`:
        HfApi(endpoint=hub.url, token=WRITE).create_repo("user/name", private=True)
        hub.faults = [Fault("PUT /_store", "cut", times=2)]
    hub.files("user/name")  # {path: bytes}

As a process: python tests/loopback_hub.py, which prints its address. Everything is in memory.
"""

import base64
import dataclasses
import hashlib
import json
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ = "hf_" + "w" * 34, "hf_" + "r" * 34
USER = "user"
LARGE = re.compile(r".*\.(safetensors|pt|pth|bin|arrow|parquet|zip|gz|png)")
LARGEST_REGULAR = 10_000_000  # bytes of a text file; the Hub's own limit
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
NOWHERE = "0" * 40


class File(NamedTuple):
    """One file of a commit."""

    sha256: str
    is_large: bool


class Commit(NamedTuple):
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    date: str
    files: dict[str, File]


@dataclasses.dataclass
class Repository:
    """Branches of commits; `kind` is models, datasets or spaces."""

    kind: str
    name: str
    private: bool
    sdk: str | None = None
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        """Commit the files as the branch's new head."""
        parent, date = self.branches.get(branch), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        made_of = repr((parent, title, date, sorted(files.items()), len(self.commits)))
        oid = hashlib.sha1(made_of.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, date, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch or an oid means."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" the pattern finds."""

    pattern: str
    action: int | str | tuple[int, dict[str, str]]
    """A status, alone or with headers; drop: closed without an answer; drop_after: closed when the
    work is done; cut: closed in the middle of the upload or the answer; hang: no answer until
    released; slow:N: N bytes per second; truncated: half an answer that looks whole; wrong_sha:
    bytes arrive changed."""
    times: int = 1


class Refused(Exception):
    """An answer that is an error: status, message, the Hub's error code."""


class Answer(NamedTuple):
    """Status, body (JSON, if it is no bytes) and headers."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = {}


class LoopbackHub:
    """The server, running in a thread from `__enter__` to `__exit__`.

    Attributes:
        url: its address, for HF_ENDPOINT.
        tokens: by token its user, "read" or "write", and the organisations it may write to.
        faults: what goes wrong; used up from the front.
        log: of every request (method, path, headers, status), without the bodies.
        bodies: what was received, kept if `keeps_bodies`.
        part_bytes: uploads larger than that go in parts (None: none do).
    """

    def __init__(self, *, keeps_bodies: bool = False, port: int = 0) -> None:
        self.tokens = {WRITE: (USER, "write", ["org"]), READ: (USER, "read", [])}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.keeps_bodies, self.part_bytes = keeps_bodies, None
        self.lock, self.released = threading.RLock(), threading.Event()
        self.sockets: set[socket.socket] = set()
        self._random: tuple[random.Random, float, tuple] | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for open_socket in list(self.sockets):
            _shut(open_socket)

    def release(self) -> None:
        """Let go of the requests that hang; later ones hang anew."""
        self.released.set()
        self.released = threading.Event()

    def random_faults(
        self, seed: int, rate: float, actions: tuple = (500, 503, "drop", "drop_after", "cut")
    ) -> None:
        """Let every request go wrong with this probability, the same way for the same seed."""
        self._random = (random.Random(seed), rate, actions) if rate else None

    def environment(self, home: Any, *, token: str | None = WRITE) -> dict[str, str]:
        """Return the variables with which a process sees this Hub and no other."""
        found = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or "",
        }  # fmt: skip
        return found

    def seen_by(self, monkeypatch: Any, *, token: str | None = WRITE) -> None:
        """Let this process, in which huggingface_hub was imported already, see this Hub."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", self.url)  # its functions'
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.setenv("HF_TOKEN", token or "")

    def repository(self, name: str, kind: str = "models") -> Repository:
        """Return a repository; KeyError where there is none."""
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", *, kind: str = "models") -> dict[str, bytes]:
        """Return what a revision holds, without the .gitattributes that the Hub puts there."""
        files = self.repository(name, kind).at(revision).files
        return {p: self.blobs[f.sha256] for p, f in files.items() if p != ".gitattributes"}

    def titles(self, name: str, revision: str = "main", *, kind: str = "models") -> list[str]:
        """Return the titles of a revision's commits, the first one first."""
        return [commit.title for commit in reversed(self.history(name, revision, kind=kind))]

    def history(self, name: str, revision: str = "main", *, kind: str = "models") -> list[Commit]:
        """Return the commits of a revision, the newest first."""
        repository = self.repository(name, kind)
        found = [repository.at(revision)]
        while found[-1].parent is not None:
            found.append(repository.commits[found[-1].parent])
        return found

    def put(
        self, name: str, files: dict[str, bytes], *, kind: str = "models", private: bool = False,
        branch: str = "main",
    ) -> str:  # fmt: skip
        """Commit files as somebody else would, into a new repository if need be; return the oid."""
        with self.lock:
            repository = self.repositories.get((kind, name)) or self._new(kind, name, private)
            kept = {p: self._keep(data, bool(LARGE.fullmatch(p))) for p, data in files.items()}
            old = repository.branches.get(branch) or repository.branches["main"]
            repository.branches.setdefault(branch, old)
            return repository.add(branch, "by hand", repository.at(old).files | kept).oid

    def counted(self, pattern: str) -> int:
        """Return how many requests "METHOD /path" the pattern finds."""
        return sum(bool(re.search(pattern, f"{r['method']} {r['path']}")) for r in self.log)

    def _keep(self, data: bytes, is_large: bool) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return File(sha256, is_large)

    def _new(self, kind: str, name: str, private: bool, sdk: str | None = None) -> Repository:
        repository = Repository(kind, name, private, sdk)
        repository.add("main", "initial commit", {".gitattributes": self._keep(ATTRIBUTES, False)})
        self.repositories[kind, name] = repository
        return repository

    def _fault(self, request: str) -> Any:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.action
            if self._random is not None and self._random[0].random() < self._random[1]:
                return self._random[0].choice(self._random[2])
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection; what a request asks for is in the `on_...` methods below."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.sockets.add(self.request)

    def finish(self) -> None:
        self.hub.sockets.discard(self.request)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True

    def do_GET(self) -> None:
        """Answer, or do what the fault says."""
        hub, url = self.hub, urlsplit(self.path)
        self.url_path = url.path
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        entry = {"method": self.command, "path": self.path, "headers": dict(self.headers)}
        hub.log.append(entry)
        fault = hub._fault(f"{self.command} {self.url_path}")
        pace = float(fault[5:]) if isinstance(fault, str) and fault.startswith("slow:") else None
        has_body = self.command in ("POST", "PUT")
        entry["status"] = fault
        if fault == "drop" or fault == "cut" and has_body:
            if fault == "cut":
                self._read(int(self.headers.get("Content-Length") or 0) // 2, pace)
            return self._close()
        self.body = self._read(None, pace)
        if hub.keeps_bodies:
            hub.bodies.append(self.body)
        if fault == "hang":
            hub.released.wait()
            return self._close()
        if fault == "wrong_sha" and self.command == "PUT":
            self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            answer = Answer(status, {"error": f"fault {status}"}, headers)
        else:
            answer = self._answer()
        entry["status"] = answer.status
        if fault == "drop_after":
            return self._close()
        self._send(answer, fault, pace)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read(self, most: int | None, pace: float | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        left = int(self.headers.get("Content-Length") or 0) if most is None else most
        if pace is None:
            return self.rfile.read(left)
        found, step = b"", max(1, int(pace // 10))
        while len(found) < left and (data := self.rfile.read(min(step, left - len(found)))):
            found += data
            self.hub.released.wait(len(data) / pace)
        return found

    def _send(self, answer: Answer, fault: Any, pace: float | None) -> None:
        body, headers = answer.body, dict(answer.headers)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        if fault == "wrong_sha" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "truncated":
            body = body[: len(body) // 2]
        self.send_response(answer.status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            return self._close()
        if pace is None:
            self.wfile.write(body)
            return
        step = max(1, int(pace // 10))
        for start in range(0, len(body), step):
            self.hub.released.wait(step / pace)
            self.wfile.write(body[start : start + step])

    def _close(self) -> None:
        self.close_connection = True
        _shut(self.connection)

    def _answer(self) -> Answer:
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.url_path}"):
                try:
                    with self.hub.lock:
                        groups = {key: unquote(g or "") for key, g in match.groupdict().items()}
                        return action(self, **groups)
                except Refused as refused:
                    status, message, *code = refused.args
                    headers = {"X-Error-Message": message}
                    headers |= {"X-Error-Code": code[0]} if code else {}
                    return Answer(status, {"error": message}, headers)
        return Answer(404, {"error": "Sorry, we can't find the page you are looking for."})

    @property
    def given(self) -> dict[str, Any]:
        """The JSON of the request."""
        return json.loads(self.body)

    def account(self, *, needed: bool = True) -> tuple[str, str, list[str]] | None:
        """Return (user, role, organisations) of the token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token and not needed:
            return None
        if token not in self.hub.tokens:
            what = "Invalid credentials in Authorization header" if token else "Invalid username"
            raise Refused(401, what)
        return self.hub.tokens[token]

    def found(self, kind: str, repo: str, *, writes: bool = False) -> Repository:
        """Return the repository, if the token may see it (or write to it)."""
        account = self.account(needed=writes)
        repository = self.hub.repositories.get((kind, repo))
        owners = [] if account is None else [account[0], *account[2]]
        if repository is None or repository.private and repo.split("/")[0] not in owners:
            status = 401 if account is None else 404
            raise Refused(status, "Repository not found", "RepoNotFound")
        if writes:
            self.check_writes(repo.split("/")[0])
        return repository

    def check_writes(self, owner: str) -> None:
        """See that the token may write there."""
        user, role, organisations = self.account()
        if role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository")
        if owner not in (user, *organisations):
            raise Refused(403, f"You don't have the rights under the namespace {owner!r}")

    def on_whoami(self) -> Answer:
        user, role, organisations = self.account()
        return Answer(body={
            "type": "user", "name": user, "auth": {"accessToken": {"role": role}},
            "orgs": [{"name": name} for name in organisations],
        })  # fmt: skip

    def on_create(self) -> Answer:
        owner = self.given.get("organization") or self.account()[0]
        name, kind = f"{owner}/{self.given['name']}", self.given.get("type", "model") + "s"
        self.check_writes(owner)
        url = f"{self.hub.url}/{PREFIXES[kind]}{name}"
        if (kind, name) in self.hub.repositories:
            return Answer(409, {"error": "You already created this repo", "url": url})
        private = self.given.get("visibility") == "private" or bool(self.given.get("private"))
        self.hub._new(kind, name, private, self.given.get("sdk"))
        return Answer(body={"url": url, "name": name})

    def on_delete(self) -> Answer:
        owner = self.given.get("organization") or self.account()[0]
        kind, name = self.given.get("type", "model") + "s", f"{owner}/{self.given['name']}"
        self.found(kind, name, writes=True)
        del self.hub.repositories[kind, name]
        return Answer()

    def on_yaml(self) -> Answer:
        match = re.match(r"---\n(.*?)\n---\s", self.given["content"], re.DOTALL)
        errors = []
        try:
            values = yaml.safe_load(match[1]) if match else {}
            if not isinstance(values, dict):
                errors.append("the metadata is no mapping")
            elif not isinstance(values.get("license", ""), str):
                errors.append('"license" must be a string')
        except yaml.YAMLError as error:
            errors.append(f"bad YAML: {error}")
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        return Answer(400 if errors else 200, answer)

    def on_info(self, kind: str, repo: str, revision: str = "main") -> Answer:
        repository = self.found(kind, repo)
        commit = repository.at(revision)
        return Answer(body={
            "_id": NOWHERE, "id": repo, "modelId": repo, "author": repo.split("/")[0],
            "sha": commit.oid, "private": repository.private, "gated": False, "disabled": False,
            "lastModified": commit.date, "createdAt": commit.date, "tags": [], "downloads": 0,
            "likes": 0, "sdk": repository.sdk,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        })  # fmt: skip

    def on_refs(self, kind: str, repo: str) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self.found(kind, repo).branches.items()
        ]
        return Answer(body={"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def on_branch(self, kind: str, repo: str, revision: str) -> Answer:
        repository = self.found(kind, repo, writes=True)
        if self.command == "DELETE":
            repository.branches.pop(repository.at(revision) and revision)
            return Answer()
        if revision in repository.branches:
            raise Refused(409, f"Reference already exists: {revision}")
        start = self.given.get("startingPoint") or "main"
        repository.branches[revision] = repository.at(start).oid
        return Answer()

    def on_commits(self, kind: str, repo: str, revision: str) -> Answer:
        self.found(kind, repo)
        return Answer(body=[
            {"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": []}
            for c in self.hub.history(repo, revision, kind=kind)
        ])  # fmt: skip

    def entries(self, commit: Commit) -> list[dict[str, Any]]:
        """Return files and folders as the Hub lists them."""
        last = {"id": commit.oid, "title": commit.title, "date": commit.date}
        found, folders = [], {}
        for path, file in sorted(commit.files.items()):
            data = self.hub.blobs[file.sha256]
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
            if file.is_large:
                entry["oid"] = _git(_pointer(file.sha256, len(data)))
                entry["lfs"] = {"oid": file.sha256, "size": len(data), "pointerSize": 134}
            found.append(entry | {"lastCommit": last})
            for depth in range(1, len(path.split("/"))):
                folder = "/".join(path.split("/")[:depth])
                folders[folder] = {"type": "directory", "path": folder, "size": 0, "oid": NOWHERE}
        return [*folders.values(), *found]

    def on_tree(self, kind: str, repo: str, revision: str, path: str = "") -> Answer:
        below = f"{path}/" if path else ""
        found = self.entries(self.found(kind, repo).at(revision))
        found = [entry for entry in found if entry["path"].startswith(below)]
        if path and not found:
            raise Refused(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        if self.query.get("recursive", "").lower() not in ("1", "true"):
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(below)]
        return Answer(body=found)

    def on_paths(self, kind: str, repo: str, revision: str) -> Answer:
        paths = parse_qs(self.body.decode()).get("paths", [])
        found = self.entries(self.found(kind, repo).at(revision))
        return Answer(body=[entry for entry in found if entry["path"] in paths])

    def on_preupload(self, kind: str, repo: str, revision: str) -> Answer:
        files = self.found(kind, repo, writes=True).at(revision).files

        def mode(path: str, size: int, sample: str) -> str:
            is_large = LARGE.fullmatch(path) or size > LARGEST_REGULAR
            return "lfs" if is_large or b"\0" in base64.b64decode(sample) else "regular"

        def oid(path: str) -> str | None:
            file = files.get(path)
            if file is None or file.is_large:
                return file and file.sha256
            return _git(self.hub.blobs[file.sha256])

        return Answer(body={"files": [
            {"path": f["path"], "uploadMode": mode(**f), "shouldIgnore": False,
             "oid": oid(f["path"])}
            for f in self.given["files"]
        ]})  # fmt: skip

    def on_batch(self, repo: str, kind: str = "models/") -> Answer:
        self.found(kind.rstrip("/") or "models", repo, writes=True)
        objects, part = [], self.hub.part_bytes
        for wanted in self.given["objects"]:
            oid, size, action = wanted["oid"], wanted["size"], {}
            if oid not in self.hub.blobs:
                href = f"{self.hub.url}/_store/{oid}"
                upload: dict[str, Any] = {"href": href}
                if part is not None and size > part:
                    count = -(-size // part)
                    header = {str(n): f"{href}/{n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(part), **header}
                action["actions"] = {
                    "upload": upload, "verify": {"href": f"{self.hub.url}/_verify"}
                }  # fmt: skip
            objects.append({"oid": oid, "size": size, **action})
        return Answer(body={"transfer": "basic", "objects": objects})

    def on_store(self, sha256: str, part: str = "") -> Answer:
        key = f"{sha256}/{part}" if part else sha256
        if self.command == "POST":  # all parts are there
            parts = [f"{sha256}/{p['partNumber']}" for p in self.given["parts"]]
            self.body = b"".join(self.hub.blobs.pop(name) for name in parts)
        if not part and hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refused(400, "The Content-SHA256 you specified did not match what we received")
        self.hub.blobs[key] = self.body
        return Answer(headers={"ETag": f'"{_git(self.body)}"'})

    def on_verify(self) -> Answer:
        self.account()
        there = self.hub.blobs.get(self.given["oid"])
        if there is None or len(there) != self.given["size"]:
            raise Refused(404, "Object not found")
        return Answer(body={"message": "Everything ok"})

    def on_commit(self, kind: str, repo: str, revision: str) -> Answer:
        repository = self.found(kind, repo, writes=True)
        if revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, title = repository.at(revision), ""
        files = dict(head.files)
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = self.hub._keep(data, False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(
                        400, f"LFS pointer pointed to a file that does not exist: {value}"
                    )
                files[value["path"]] = File(value["oid"], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:  # deletedFolder
                below = value["path"].rstrip("/") + "/"
                files = {p: f for p, f in files.items() if not p.startswith(below)}
        oid = repository.add(revision, title, files).oid
        url = f"{self.hub.url}/{PREFIXES[kind]}{repo}/commit/{oid}"
        return Answer(body={"success": True, "commitOid": oid, "commitUrl": url})

    def on_resolve(self, repo: str, revision: str, path: str, kind: str = "models/") -> Answer:
        commit = self.found((kind or "models/").rstrip("/"), repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if not file.is_large:
            return self.ranged(self.hub.blobs[file.sha256], headers)
        # Another host, as the Hub's store is one: no token may reach it.
        headers |= {
            "Location": f"http://localhost:{self.hub.port}/_cdn/{file.sha256}",
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(len(self.hub.blobs[file.sha256])),
        }
        return Answer(302, b"", headers)

    def on_cdn(self, sha256: str) -> Answer:
        return self.ranged(self.hub.blobs[sha256], {})

    def ranged(self, data: bytes, headers: dict[str, str]) -> Answer:
        """Return the data, or the range of it that was asked for."""
        headers = {**headers, "ETag": f'"{_git(data)}"', "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Answer(200, data, headers)
        start, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        if start >= len(data):
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[start : last + 1], headers)


PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/|spaces/|)(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", _Handler.on_whoami),
    (r"POST /api/repos/create", _Handler.on_create),
    (r"DELETE /api/repos/delete", _Handler.on_delete),
    (r"POST /api/validate-yaml", _Handler.on_yaml),
    (rf"GET {_API}(/revision/(?P<revision>.+))?", lambda self, kind, repo, revision: (
        self.on_info(kind, repo, revision or "main"))),
    (rf"GET {_API}/refs", _Handler.on_refs),
    (rf"(?:POST|DELETE) {_API}/branch/(?P<revision>.+)", _Handler.on_branch),
    (rf"GET {_API}/commits/(?P<revision>.+)", _Handler.on_commits),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", lambda self, path, **rest: (
        self.on_tree(path=path or "", **rest))),
    (rf"POST {_API}/paths-info/(?P<revision>.+)", _Handler.on_paths),
    (rf"POST {_API}/preupload/(?P<revision>.+)", _Handler.on_preupload),
    (rf"POST {_API}/commit/(?P<revision>.+)", _Handler.on_commit),
    (rf"POST {_PAGE}\.git/info/lfs/objects/batch", _Handler.on_batch),
    (r"(?:PUT|POST) /_store/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?", lambda self, sha256, part:
        self.on_store(sha256, part or "")),
    (r"POST /_verify", _Handler.on_verify),
    (rf"(?:GET|HEAD) {_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.on_resolve),
    (r"(?:GET|HEAD) /_cdn/(?P<sha256>[0-9a-f]{64})", _Handler.on_cdn),
]  # fmt: skip


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{sha256}\nsize {size}\n".encode()


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed


if __name__ == "__main__":
    with LoopbackHub() as running:
        sys.stdout.write(f"HF_ENDPOINT={running.url} HF_TOKEN={WRITE} HF_HUB_DISABLE_XET=1\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass

"""A Hugging Face Hub in a thread: the endpoints that huggingface_hub 2 uses to push and load a model, on 127.0.0.1.

It is strict where the Hub is: writing needs a token, metadata of a card must be YAML of the right types, an LFS object
must have the hash and size that were announced, and a commit may only name objects that were uploaded. Xet is not
spoken; set HF_HUB_DISABLE_XET=1 for clients (`Hub.environment`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
# What the Hub's .gitattributes make large files.
LARGE = (".safetensors", ".bin", ".pt")


class HubError(Exception):
    """A response that is not 2xx: status, the Hub's error code and its message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Commit:
    """A commit: its hash, message and all files of the repository as of it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """The server and what it holds; use it in a `with` block.

    Attributes:
        repos: commits by repository, oldest first.
        large: LFS objects by sha256.
        requests: "METHOD path" of each request, in order.
        refused: "METHOD path: message" of each request that no endpoint knows or that broke a rule.
    """

    repos: dict[str, list[Commit]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The Hub's endpoint."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store_url(self) -> str:
        """Where large files are: to clients another host, to which they must not send their token."""
        return f"http://localhost:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make huggingface_hub, imported after they are set, talk to this server and no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a repository by path."""
        return self.commit(repo, revision).files

    def commit(self, repo: str, revision: str = "main") -> Commit:
        """The commit that a branch name or hash stands for; there is one branch."""
        if repo not in self.repos:
            raise HubError(404, "RepoNotFound", f"there is no repository {repo}")
        for commit in reversed(self.repos[repo]):
            if revision in ("main", "HEAD", commit.oid):
                return commit
        raise HubError(404, "RevisionNotFound", f"{repo} has no revision {revision}")

    def add_commit(self, repo: str, message: str, files: dict[str, bytes]) -> Commit:
        """Make `files` the content of the repository, which is created if need be."""
        commits = self.repos.setdefault(repo, [])
        commit = Commit(hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest(), message, dict(files))
        commits.append(commit)
        return commit


def git_hash(content: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    """The hash that identifies a file: sha256 for large ones, git's for others."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # connections are kept, as the Hub keeps them
    disable_nagle_algorithm = True  # or each answer waits for the client's delayed acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            try:
                for pattern, endpoint in ENDPOINTS:
                    if match := re.fullmatch(pattern, request):
                        endpoint(self, *match.groups(), **({"body": body} if self.command in ("POST", "PUT") else {}))
                        return
                raise HubError(404, "", "no such endpoint")
            except HubError as error:
                if error.code not in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
                    self.hub.refused.append(f"{request}: {error.message}")
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                self._send_json({"error": error.message}, error.status, {k: v for k, v in headers.items() if v})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _need_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "", "writing needs a token")

    def _need_no_token(self) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "", "the store of large files must not see the token")

    # One method an endpoint; `body` is the request's.

    def _create(self, body: bytes) -> None:
        self._need_token()
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            self._send_json({**answer, "error": "You already created this model repo"}, 409)
            return
        self.hub.add_commit(repo, "initial commit", {".gitattributes": b"".join(b"*%s\n" % x.encode() for x in LARGE)})
        self._send_json(answer)

    def _validate(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, flags=re.DOTALL)
        errors, warnings = [], []
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            metadata = None
            errors.append(str(error))
        if metadata is None and not errors:
            warnings.append("empty or missing yaml metadata in repo card")
        for name, value in (metadata or {}).items():
            strings = value if isinstance(value, list) else [value]
            if name in ("library_name", "pipeline_tag") and not isinstance(value, str):
                errors.append(f'"{name}" must be a string')
            if name in ("base_model", "tags") and not all(isinstance(text, str) and text for text in strings):
                errors.append(f'"{name}" must be a string or a list of strings')
        found = {"errors": errors, "warnings": warnings}
        if errors:
            self.hub.refused.append(f"POST /api/validate-yaml: {errors}")
        answer = {name: [{"message": message} for message in messages] for name, messages in found.items()}
        self._send_json(answer, 400 if errors else 200)

    def _preupload(self, repo: str, revision: str, body: bytes) -> None:
        self._need_token()
        present = self.hub.files(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = etag(path, present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def _lfs_batch(self, repo: str, body: bytes) -> None:
        self._need_token()
        self.hub.commit(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                upload = f"{self.hub.store_url}/upload/{wanted['oid']}/{wanted['size']}"
                verify = f"{self.hub.url}/{repo}.git/lfs/verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str, size: str, body: bytes) -> None:
        self._need_no_token()
        if hashlib.sha256(body).hexdigest() != oid or len(body) != int(size):
            raise HubError(400, "", f"{len(body)} bytes do not have the announced hash and size {size}")
        self.hub.large[oid] = body
        self._send(b"")

    def _lfs_verify(self, repo: str, body: bytes) -> None:
        self._need_token()
        wanted = json.loads(body)
        if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "", f"object {wanted['oid']} was not uploaded to {repo}")
        self._send(b"")

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        self._need_token()
        files = dict(self.hub.files(repo, revision))
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif kind == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise HubError(400, "", f"cannot commit {kind} {value.get('path')}")
        oid = self.hub.add_commit(repo, message, files).oid
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _info(self, repo: str, revision: str | None = None) -> None:
        commit = self.hub.commit(repo, revision or "main")
        answer = {"id": repo, "modelId": repo, "sha": commit.oid, "tags": [], "private": False}
        self._send_json({**answer, "siblings": [{"rfilename": path} for path in commit.files]})

    def _tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, content in self.hub.files(repo, revision).items():
            if path.startswith(prefix):
                entry = {"type": "file", "oid": git_hash(content), "size": len(content), "path": path}
                if path.endswith(LARGE):
                    entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 132}
                entries.append(entry)
        if not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self._send_json(entries)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        """A file; large ones by redirection to a store that takes no token, as on the Hub."""
        commit = self.hub.commit(repo, revision)
        if path not in commit.files:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(b"Entry not found", 404, {**error, "X-Repo-Commit": commit.oid})
            return
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{git_hash(content)}"'}
        if path.endswith(LARGE):
            oid = etag(path, content)
            self.hub.large[oid] = content
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._send(b"", 302, {**headers, **linked, "Location": f"{self.hub.store_url}/download/{oid}"})
        else:
            self._send(content, 200, headers)

    def _download(self, oid: str) -> None:
        self._need_no_token()
        content = self.hub.large[oid]
        start = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self._send(content[start:], 206 if start else 200, {"ETag": f'"{oid}"'})


_REPO, _REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ENDPOINTS = (
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (r"PUT /upload/(\w+)/(\d+)", _Handler._lfs_upload),
    (rf"POST /{_REPO}\.git/lfs/verify", _Handler._lfs_verify),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", _Handler._commit),
    (rf"GET /api/models/{_REPO}", _Handler._info),
    (rf"GET /api/models/{_REPO}/revision/{_REVISION}", _Handler._info),
    (rf"GET /api/models/{_REPO}/tree/{_REVISION}(?:/(.+))?", _Handler._tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(.+)", _Handler._resolve),
    (r"GET /download/(\w+)", _Handler._download),
)

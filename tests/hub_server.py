"""A stand-in for the Hub: repositories over HTTP on this machine, with the real client on the other side.

    with HubServer(tmp_path / "repositories") as hub:
        shutil.copytree(checkpoint, hub.root / "someone/model")
        run_python("...", **hub.env)

The server has branches, commits and pull requests, takes large files by LFS, serves ranges, and hides private
repositories from everybody without `hub.token`; `hub.guest_token` is known but may not write. The folder
`{root}/{owner}/{name}` (for a dataset `{root}/datasets/{owner}/{name}`) is the branch `main`: a change in the folder
becomes a commit, and pushed files appear in it. The client must not use Xet, which `hub.env` turns off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit


USER = "someone"


@dataclass
class Repository:
    """commits: id -> {name: SHA-256 of the content}; branches: name -> id of a commit."""

    folder: Path
    private: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, int, int]] | None = None

    def state(self) -> list[tuple[str, int, int]]:
        """Return a value that changes whenever a file in the folder does."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            (path.relative_to(self.folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files
        ]

    def commit(self, branch: str, files: dict[str, str], message: str = "") -> str:
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(json.dumps([parent, files, message, len(self.commits)]).encode()).hexdigest()
        self.commits[oid], self.branches[branch], self.messages[oid] = files, oid, message
        return oid


class HubServer:
    """Serve the repositories under `root`; `requests` lists the requests, such as `"GET /api/models/a/b"`.

    faults: Pattern of a path (as in `requests`) -> HTTP status of the answer; 0 breaks off the connection.
    uploads_until_cut: Number of large files that arrive whole. The connection of each later one is cut half-way.
        `None` for no limit.
    """

    token = "hf_ownerOfEverythingHere"
    guest_token = "hf_someoneElseHere"

    def __init__(self, root: Path):
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, int] = {}
        self.uploads_until_cut: int | None = None
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        # The poll interval bounds how long a shutdown takes: half a second by default.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        host, port = self._http.server_address[:2]
        return f"http://{host}:{port}"

    @property
    def env(self) -> dict[str, str]:
        """Variables that make a Python process use this server as the Hub, as the owner of all repositories."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
        }

    def repository(self, repo: str) -> Repository:
        """Return a repository, after committing changes in its folder; raise `LookupError` if there is none."""
        with self.lock:
            folder = self.root / repo
            if not folder.is_dir():
                raise LookupError("RepoNotFound")
            found = self.repositories.setdefault(repo, Repository(folder))
            if (state := found.state()) != found.seen:
                found.commit("main", {name: self.keep((folder / name).read_bytes()) for name, _, _ in state})
                found.seen = state
            return found

    def keep(self, content: bytes) -> str:
        """Store the content of a file, and return its SHA-256."""
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of each file of a repository."""
        found = self.repository(repo)
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            raise LookupError("RevisionNotFound")
        return {name: self.blobs[digest] for name, digest in found.commits[commit].items()}

    def commit(self, repo: str, revision: str = "main") -> str:
        """Return the id of the last commit of a branch."""
        found = self.repository(repo)
        return found.branches.get(revision, revision)


class _Handler(BaseHTTPRequestHandler):
    """Answer one request; the first parts of its path say what is requested, as on the Hub."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold back the content until the header is acknowledged

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `hub.requests` lists the requests."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {url.path}")
        faults = [status for pattern, status in self.hub.faults.items() if fnmatch(url.path, pattern)]
        if faults:
            self.close_connection = not faults[0]
            if faults[0]:
                self._send(faults[0])
            return
        try:
            match parts:
                case ["upload", digest]:
                    self._take_upload(digest)
                    return
            body = b"".join(self._read_body())
            if self.command in ("POST", "PUT") and parts != ["api", "validate-yaml"] and not self._is_owner():
                self._refuse()
                return
            match parts:
                case ["api", "whoami-v2"]:
                    self._send_json({"type": "user", "name": USER, "orgs": []})
                case ["api", "repos", "create"]:
                    self._create(json.loads(body))
                case ["api", "validate-yaml"]:
                    self._send_json({"errors": [], "warnings": []})
                case ["api", "models" | "datasets" as kind, owner, name, *what]:
                    repo = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
                    self._answer_api(self._find(repo), repo, what, body)
                case [*_, "info", "lfs", "objects", "batch"]:
                    self._send_upload_links(json.loads(body)["objects"])
                case [owner, name, "resolve", revision, *file] | ["datasets", owner, name, "resolve", revision, *file]:
                    repo = f"{owner}/{name}" if parts[0] == owner else f"datasets/{owner}/{name}"
                    self._find(repo)
                    self._send_file(repo, revision, "/".join(file))
                case ["storage", digest]:
                    self._send_content(self.hub.blobs[digest], ETag=f'"{digest}"')
                case _:
                    raise LookupError("EntryNotFound")
        except LookupError as error:
            self._send(404, error=str(error))

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _refuse(self) -> None:
        if self.headers.get("Authorization") == f"Bearer {self.hub.guest_token}":
            self._send(403, error="Forbidden", message="You don't have the rights to write here")
        else:
            self._send(401, error="Unauthorized", message="Invalid credentials in Authorization header")

    def _find(self, repo: str) -> Repository:
        found = self.hub.repository(repo)
        if found.private and not self._is_owner():
            raise LookupError("RepoNotFound")
        return found

    def _answer_api(self, repository: Repository, repo: str, what: list[str], body: bytes) -> None:
        match what:
            case [] | ["revision", _]:
                revision = what[1] if what else "main"
                self._send_json(
                    {
                        "id": repo,
                        "sha": self._commit_id(repository, revision),
                        "private": repository.private,
                        "siblings": [
                            {"rfilename": name, "size": len(content)}
                            for name, content in self.hub.files(repo, revision).items()
                        ],
                    }
                )
            case ["tree", revision, *folder]:
                start = "/".join([*folder, ""]) if folder else ""
                content = {
                    name: data for name, data in self.hub.files(repo, revision).items() if name.startswith(start)
                }
                if folder and not content:
                    raise LookupError("EntryNotFound")
                is_direct = self.query.get("recursive", ["false"])[0].lower() != "true"
                folders = {start + name.removeprefix(start).partition("/")[0] for name in content} - content.keys()
                listed = [
                    {"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders) if is_direct
                ]
                listed += [
                    {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
                    for name, data in content.items()
                    if not is_direct or "/" not in name.removeprefix(start)
                ]
                self._send_json(listed)
            case ["refs"]:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in repository.branches.items()
                ]
                self._send_json({"branches": branches, "converts": [], "tags": []})
            case ["branch", branch]:
                if branch in repository.branches:
                    self._send(409, error="Conflict")
                    return
                start = json.loads(body or "{}").get("startingPoint", "main")
                repository.branches[branch] = self._commit_id(repository, start)
                self._send_json({})
            case ["preupload", revision]:
                there = self.hub.files(repo, revision)
                self._send_json({"files": [upload_mode(one, there) for one in json.loads(body)["files"]]})
            case ["commit", revision]:
                self._take_commit(repository, repo, revision, [json.loads(line) for line in body.splitlines()])
            case _:
                raise LookupError("EntryNotFound")

    def _commit_id(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise LookupError("RevisionNotFound")
        return commit

    def _create(self, wanted: dict[str, Any]) -> None:
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        repo = f"{kind}{wanted['organization'] or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if (self.hub.root / repo).is_dir():
            self._send_json(answer, status=409)
            return
        (self.hub.root / repo).mkdir(parents=True)
        self.hub.repository(repo).private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self._send_json(answer)

    def _take_commit(self, repository: Repository, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        with self.hub.lock:
            branch, pull_request = revision, "create_pr" in self.query
            if pull_request:
                branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.branches)}"
            files = dict(repository.commits[self._commit_id(repository, revision)])
            message = ""
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
                    case "lfsFile":
                        files[value["path"]] = value["oid"]
                        assert value["oid"] in self.hub.blobs, "committed before it was uploaded"
                    case "deletedFile":
                        del files[value["path"]]
            oid = repository.commit(branch, files, message)
            if branch == "main":
                self._check_out(repository, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        pull_request_url = f"{self.hub.endpoint}/{repo}/discussions/{branch.split('/')[-1]}" if pull_request else None
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull_request_url})

    def _check_out(self, repository: Repository, files: dict[str, str]) -> None:
        for name, _, _ in repository.state():
            if name not in files:
                (repository.folder / name).unlink()
        for name, digest in files.items():
            target = repository.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.hub.blobs[digest])
        repository.seen = repository.state()

    def _send_upload_links(self, objects: list[dict[str, Any]]) -> None:
        """Answer with a link for each file that the server does not have yet."""
        for one in objects:
            if one["oid"] not in self.hub.blobs:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/upload/{one['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def _take_upload(self, digest: str) -> None:
        with self.hub.lock:
            is_cut = self.hub.uploads_until_cut == 0
            if self.hub.uploads_until_cut:
                self.hub.uploads_until_cut -= 1
        if is_cut:
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return
        content = b"".join(self._read_body())
        assert self.hub.keep(content) == digest
        self._send(200)

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        files = self.hub.files(repo, revision)
        commit = {"X-Repo-Commit": self._commit_id(self.hub.repository(repo), revision)}
        if name not in files:
            self._send(404, error="EntryNotFound", **commit)
        elif is_large(name):
            digest = self.hub.keep(files[name])
            linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            # The storage has another host name, as on the Hub, so the client sends it no token.
            storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, Location=f"{storage}/storage/{digest}", **linked, **commit)
        else:
            self._send_content(files[name], ETag=f'"{git_hash(files[name])}"', **commit)

    def _send_content(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, **headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], **headers)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        content: bytes = b"",
        *,
        error: str | None = None,
        message: str | None = None,
        **headers: str,
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"X-Error-Code": error, "X-Error-Message": message}).items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def is_large(name: str) -> bool:
    """Return whether a file is stored by LFS."""
    return name.endswith((".safetensors", ".model", ".parquet", ".mp4"))


def git_hash(content: bytes) -> str:
    """Return Git's id for the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def upload_mode(file: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
    """Return the Hub's answer about a file to upload."""
    name, large = file["path"], is_large(file["path"])
    old = there.get(name)
    oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_hash(old)
    return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

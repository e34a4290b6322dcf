"""A Hub on the loopback interface: what the real huggingface_hub client needs to push to it and to load from it.

Repositories, revisions, tokens, organisations and private models are kept; contents lie in a folder under their hash.
Faults are injected by name, see `HubServer.fail`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

# Tokens of two users.
ALICE, BOB = "hf_" + "a1B2" * 9, "hf_" + "c3D4" * 9
LARGE = (".safetensors", ".png", ".bin", ".pt", ".npz")


@dataclass
class Repository:
    """Branches and tags point at commits; a commit maps paths to `(hash of the content, is large)`."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, tuple[str, bool]], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, content: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.content = status, code, content or {"error": message}


class HubServer:
    """
    Args:
        folder: where contents are kept.
        tokens: user by token.
        organisations: members by organisation.
    """

    def __init__(self, folder: Path, tokens: dict[str, str], organisations: dict[str, list[str]] | None = None):
        self.folder = Path(folder)
        self.tokens, self.organisations = tokens, organisations or {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[list] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, *, times: int = 1, how: str = "drop") -> None:
        """The next `times` requests whose `"METHOD /path"` matches: `"drop"` the connection in the middle of the body,
        `"hang up"` after reading all of it (the work is done, the answer is lost), or answer a status such as "503"."""
        self._faults.append([re.compile(pattern), times, how])

    def heal(self) -> None:
        self._faults.clear()

    def fault(self, request: str) -> str | None:
        with self.lock:
            for entry in self._faults:
                if entry[1] > 0 and entry[0].search(request):
                    entry[1] -= 1
                    return entry[2]
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, by path."""
        repository = self.repositories[repo_id]
        sha = repository.resolve(revision)
        assert sha is not None, f"{repo_id} has no revision {revision}"
        return {path: self.content(oid) for path, (oid, _) in repository.commits[sha].items()}

    def put(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """A commit made behind the client's back."""
        repository = self.repositories.setdefault(repo_id, self.new_repository(private))
        return repository.commit(
            branch, {path: (self.store(content), path.endswith(LARGE)) for path, content in files.items()}, "put"
        )

    @staticmethod
    def new_repository(private: bool) -> Repository:
        repository = Repository(private)
        repository.commit("main", {}, "initial commit")
        return repository

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        (self.folder / oid).write_bytes(content)
        return oid

    def content(self, oid: str) -> bytes:
        return (self.folder / oid).read_bytes()

    def has(self, oid: str) -> bool:
        return (self.folder / oid).is_file()

    def namespaces(self, user: str) -> list[str]:
        return [user, *(name for name, members in self.organisations.items() if user in members)]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    routes: list[tuple[str, re.Pattern, str]] = [
        ("GET", re.compile(r"/api/whoami-v2"), "whoami"),
        ("POST", re.compile(r"/api/repos/create"), "create"),
        ("POST", re.compile(r"/api/validate-yaml"), "validate_yaml"),
        ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?"), "info"),
        ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/refs"), "refs"),
        ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<path>.+))?"), "tree"),
        ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)"), "preupload"),
        ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)"), "commit"),
        ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)"), "branch"),
        ("POST", re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"), "lfs_batch"),
        ("PUT", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})"), "lfs_put"),
        ("POST", re.compile(r"/lfs/verify"), "lfs_verify"),
        ("GET", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), "resolve"),
        ("HEAD", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), "resolve"),
    ]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        # ---- Requests and answers -----------------------------------------------------------------------------------

        def answer(self) -> None:
            path = urlsplit(self.path).path
            request = f"{self.command} {path}"
            with hub.lock:
                hub.requests.append(request)
            fault = hub.fault(request)
            if fault == "drop":
                next(self.chunks(), None)
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.body = b"".join(self.chunks())
            if fault is not None and fault.isdigit():
                self.reply(int(fault), {"error": "injected"})
                return
            try:
                for method, pattern, name in routes:
                    if method == self.command and (match := pattern.fullmatch(path)):
                        values = {key: unquote(value) for key, value in match.groupdict().items() if value}
                        status, content, headers = getattr(self, name)(**values)
                        break
                else:
                    raise Refused(404, f"no route for {request}")
            except Refused as refusal:
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                status, content = refusal.status, refusal.content
            if fault == "hang up":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.reply(status, content, headers)

        def chunks(self) -> Iterator[bytes]:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                piece = self.rfile.read(min(left, 4096))
                left -= len(piece)
                yield piece

        def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        # ---- Who may do what ----------------------------------------------------------------------------------------

        def user(self) -> str | None:
            header = self.headers.get("Authorization")
            if header is None:
                return None
            user = hub.tokens.get(header.removeprefix("Bearer "))
            if user is None:
                raise Refused(401, "Invalid credentials in Authorization header")
            return user

        def readable(self, repo: str) -> Repository:
            user = self.user()
            repository = hub.repositories.get(repo)
            if repository is None or (
                repository.private and (user is None or repo.split("/")[0] not in hub.namespaces(user))
            ):
                # As on the Hub: who may not see a repository is not told whether there is one.
                status, text = (401, "Invalid username or password.") if user is None else (404, "Repository not found")
                raise Refused(status, text, "RepoNotFound")
            return repository

        def writable(self, repo: str) -> Repository:
            repository = self.readable(repo)
            user = self.user()
            if user is None:
                raise Refused(401, "Invalid username or password.")
            if repo.split("/")[0] not in hub.namespaces(user):
                raise Refused(403, f"Authorization error: {user} may not write to {repo}")
            return repository

        @staticmethod
        def revision(repository: Repository, rev: str) -> str:
            sha = repository.resolve(rev)
            if sha is None:
                raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            return sha

        # ---- Endpoints ----------------------------------------------------------------------------------------------

        def whoami(self):
            user = self.user()
            if user is None:
                raise Refused(401, "Invalid username or password.")
            orgs = [{"type": "org", "name": name} for name in hub.namespaces(user)[1:]]
            return 200, {"type": "user", "name": user, "fullname": user, "orgs": orgs, "auth": {}}, {}

        def create(self):
            wanted, user = json.loads(self.body), self.user()
            if user is None:
                raise Refused(401, "Invalid username or password.")
            owner = wanted.get("organization") or user
            repo = f"{owner}/{wanted['name']}"
            if owner not in hub.namespaces(user):
                raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}".')
            with hub.lock:
                if repo in hub.repositories:
                    content = {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}
                    raise Refused(409, content["error"], content=content)
                private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                hub.repositories[repo] = hub.new_repository(private)
            return 200, {"url": f"{hub.url}/{repo}", "name": repo}, {}

        def validate_yaml(self):
            text, errors = json.loads(self.body)["content"], []
            match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            try:
                metadata = yaml.safe_load(match[1]) if match else {}
                for entry in metadata.get("model-index") or ():
                    if not entry.get("name") or not isinstance(entry.get("results"), list):
                        errors.append({"message": '"model-index[0].name" is required'})
            except yaml.YAMLError as error:
                errors.append({"message": f"invalid YAML: {error}"})
            return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

        def info(self, repo: str, rev: str = "main"):
            repository = self.readable(repo)
            sha = self.revision(repository, rev)
            siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
            content = {"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "siblings": siblings}
            return 200, content | {"tags": [], "pipeline_tag": "image-classification"}, {}

        def refs(self, repo: str):
            repository = self.readable(repo)
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.refs.items()
            ]
            return 200, {"branches": branches, "tags": [], "converts": []}, {}

        def tree(self, repo: str, rev: str, path: str = ""):
            repository = self.readable(repo)
            entries = []
            for name, (oid, large) in sorted(repository.commits[self.revision(repository, rev)].items()):
                if not name.startswith(f"{path}/" if path else ""):
                    continue
                content = hub.content(oid)
                entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                if large:
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            return 200, entries, {}

        def preupload(self, repo: str, rev: str):
            repository = self.writable(repo)
            present = repository.commits[self.revision(repository, rev)]
            answers = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                answer = {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                if path in present:
                    oid, large = present[path]
                    answer["oid"] = oid if large else git_oid(hub.content(oid))
                answers.append(answer)
            return 200, {"files": answers}, {}

        def lfs_batch(self, repo: str):
            self.writable(repo)
            objects = []
            for item in json.loads(self.body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if not hub.has(item["oid"]):
                    entry["actions"] = {
                        "upload": {"href": f"{hub.url}/lfs/{item['oid']}"},
                        "verify": {"href": f"{hub.url}/lfs/verify"},
                    }
                objects.append(entry)
            return 200, {"transfer": "basic", "objects": objects}, {}

        def lfs_put(self, oid: str):
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, "the content is not what was announced")
            hub.store(self.body)
            return 200, {}, {}

        def lfs_verify(self):
            wanted = json.loads(self.body)
            if not hub.has(wanted["oid"]) or len(hub.content(wanted["oid"])) != wanted["size"]:
                raise Refused(404, "not uploaded")
            return 200, {}, {}

        def branch(self, repo: str, rev: str):
            repository = self.writable(repo)
            with hub.lock:
                if rev in repository.refs:
                    raise Refused(409, f"Reference already exists: {rev}")
                start = json.loads(self.body or b"{}").get("startingPoint", "main")
                repository.refs[rev] = self.revision(repository, start)
            return 200, {}, {}

        def commit(self, repo: str, rev: str):
            repository = self.writable(repo)
            lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
            with hub.lock:
                files = dict(repository.commits[self.revision(repository, rev)])
                summary = ""
                for line in lines:
                    kind, value = line["key"], line["value"]
                    if kind == "header":
                        summary = value["summary"]
                    elif kind == "file":
                        files[value["path"]] = (hub.store(base64.b64decode(value["content"])), False)
                    elif kind == "lfsFile":
                        if not hub.has(value["oid"]):
                            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                        files[value["path"]] = (value["oid"], True)
                    elif kind == "deletedFile":
                        if files.pop(value["path"], None) is None:
                            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    else:
                        raise Refused(400, f"unknown operation {kind}")
                sha = repository.commit(rev, files, summary)
            return 200, {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha}, {}

        def resolve(self, repo: str, rev: str, path: str):
            repository = self.readable(repo)
            sha = self.revision(repository, rev)
            headers = {"X-Repo-Commit": sha}
            if path not in repository.commits[sha]:
                return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
            oid, large = repository.commits[sha][path]
            content = hub.content(oid)
            headers |= {"ETag": f'"{oid if large else git_oid(content)}"', "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            headers["Content-Type"] = "application/octet-stream"
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
                if start >= len(content):
                    raise Refused(416, "range outside of the file")
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                return 206, content[start : end + 1], headers
            return 200, content, headers

    return Handler

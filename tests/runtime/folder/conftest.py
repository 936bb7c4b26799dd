"""A Hub on the loopback interface, which speaks the protocol of the real client and misbehaves on demand."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

from meam_policy import MeamPolicy

REPO = "robots/pockets"
SHA = "a1" * 20
LICENCES = ("apache-2.0", "mit")
LARGE = (".onnx", ".safetensors", ".png")
"""Endings of files that are uploaded apart from the commit, whatever their size."""


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass
class Repository:
    """Files of every commit, the commits of branches and tags, and what was said about them."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    private: bool = False
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    parents: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    pull_requests: list[str] = dataclasses.field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def commit(self, branch: str, files: dict[str, bytes], title: str = "", message: str = "", onto: str = "") -> str:
        parent = self.refs[onto or branch]
        sha = hashlib.sha1(f"{parent} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = {**self.commits[parent], **files}
        self.parents[sha], self.messages[sha] = parent, (title, message)
        self.refs[branch] = sha
        return sha

    def history(self, sha: str) -> list[str]:
        found = [sha]
        while found[-1] in self.parents:
            found.append(self.parents[found[-1]])
        return found


class Hub(ThreadingHTTPServer):
    """Serves repositories.

    `fault` says how it misbehaves to whoever loads, `after` what happens once a file has been downloaded. `faults` says
    the same of what is needed to push, by the name of the request, and `before` what happens before one is answered:
    "lost" does what was asked and hangs up, "silent" never answers, "drip" answers a byte at a time, "echo" repeats the
    token, and a number is a status.
    """

    daemon_threads = True

    def __init__(self, commits, refs):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {REPO: Repository(commits, refs)}
        self.commits, self.refs = commits, refs
        self.fault = ""
        self.requests = []
        self.missing_status = 404
        self.cuts = 0
        self.stalled = set()
        self.after = {}
        self.released = threading.Event()
        self.role = "write"
        self.faults: dict[str, str] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.written = []
        self.large = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Stay silent: clients that give up close their connections."""

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def downloads(self):
        return Counter(
            path.split("/")[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path
        )


class Handler(BaseHTTPRequestHandler):
    # One request a connection, so that none outlives the server.
    protocol_version = "HTTP/1.0"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.take()

    def do_PUT(self):
        self.take()

    def answer(self):
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if server.fault == "silent":
            server.released.wait(120)
            return
        if server.fault == "drip":
            self.drip()
            return
        if server.fault == "portal":
            self.reply(200, {"Content-Type": "text/html"}, b"<html>Please sign in to the hotel's network</html>")
            return
        if server.fault.isdigit():
            self.reply(int(server.fault), {})
            return
        if server.fault == "gated":
            self.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to the model is restricted"})
            return
        if server.fault == "bad token":
            self.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        if self.path == "/api/whoami-v2":
            self.do("whoami", self.whoami)
            return
        path = urlsplit(self.path).path.strip("/")
        if path.startswith("api/models/"):
            kinds = "revision|tree|refs|commits|discussions|"
            repo, kind, revision = re.fullmatch(rf"api/models/([^/]+/[^/]+)/?({kinds})/?(.*)", path).groups()  # pyright: ignore[reportOptionalMemberAccess]
            name = ""
        else:
            repo, kind, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
        revision, name = unquote(revision), unquote(name)  # a branch may have slashes
        if repo not in server.repositories:
            self.reply(server.missing_status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
            return
        repository = server.repositories[repo]
        if kind in ("refs", "discussions"):
            self.do(kind, lambda: self.list(kind, repository))
            return
        sha = {**repository.tags, **repository.refs}.get(revision or "main", revision)
        if sha not in repository.commits:
            self.reply(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        files = repository.commits[sha]
        if kind == "tree":
            self.send_json([self.entry(name, content) for name, content in files.items()])
        elif kind == "commits":
            self.do(kind, lambda: self.send_json([self.said(repository, sha) for sha in repository.history(sha)]))
        elif not name:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings}
            self.do("info", lambda: self.send_json(info))
        elif name not in files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        else:
            self.send_file(name, files[name], {"X-Repo-Commit": sha, "ETag": f'"{git_blob_id(files[name])}"'})

    def entry(self, name, content):
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_blob_id(content)}
        if name.endswith(LARGE):
            entry |= {"oid": git_blob_id(b"pointer to " + content), "lfs": self.large_entry(content)}
        return entry

    def large_entry(self, content):
        return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}

    def said(self, repository, sha):
        title, message = repository.messages.get(sha, ("initial commit", ""))
        return {"id": sha, "title": title, "message": message, "authors": [], "date": "2026-01-01T00:00:00.000Z"}

    def list(self, kind, repository):
        if kind == "refs":
            named = (("heads", repository.refs), ("tags", repository.tags))
            branches, tags = (
                [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha} for name, sha in refs.items()]
                for place, refs in named
            )
            self.send_json({"branches": branches, "tags": tags, "converts": []})
            return
        requests = [
            {
                "title": title,
                "num": number,
                "author": {"name": "robots"},
                "repo": {"name": REPO, "type": "model"},
                "isPullRequest": True,
                "status": "open",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
            for number, title in enumerate(repository.pull_requests, 1)
        ]
        self.send_json({"count": len(requests), "start": 0, "discussions": requests[::-1]})

    def take(self):
        """Answer a request that writes, or that asks with a body."""
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path.strip("/")
        query = parse_qs(urlsplit(self.path).query)
        if path == "api/validate-yaml":
            self.do("validate", lambda: self.validate(json.loads(body)))
        elif path == "api/repos/create":
            self.do("create", lambda: self.create(json.loads(body)))
        elif path.startswith("large/"):
            self.do("upload", lambda: self.store(path.removeprefix("large/"), body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.do("batch", lambda: self.batch(json.loads(body)))
        else:
            found = re.fullmatch(r"api/models/([^/]+/[^/]+)/(preupload|commit|branch|tag|paths-info)/([^/]+)", path)
            assert found is not None, path
            repository, revision = server.repositories.get(found[1]), unquote(found[3])
            if repository is None:
                self.reply(404, {"X-Error-Code": "RepoNotFound"})
                return
            todo = {
                "preupload": lambda: self.preupload(repository, revision, json.loads(body)),
                "commit": lambda: self.commit(found[1], repository, revision, body, "create_pr" in query),
                "branch": lambda: self.branch(repository, revision),
                "tag": lambda: self.tag(repository, revision, json.loads(body)),
                "paths-info": lambda: self.paths_info(repository, revision, parse_qs(body.decode())),
            }
            self.do(found[2], todo[found[2]])

    def do(self, what, act):
        """Do what was asked, and misbehave as wanted."""
        server = self.server
        server.before.get(what, lambda: None)()
        fault = server.faults.get(what, "")
        if fault == "silent":
            server.released.wait(120)
        elif fault == "drip":
            self.drip()
        elif fault == "echo":
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            message = f"something is wrong with {token}"
            self.reply(500, {"Content-Type": "application/json"}, json.dumps({"error": message}).encode())
        elif fault.isdigit():
            self.reply(int(fault), {})
        else:
            self.lost = fault == "lost"
            act()

    def drip(self):
        """Answer, without an end, a byte at a time."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while not self.server.released.wait(0.02):
            self.wfile.write(b"x")

    def send_json(self, data, status=200):
        self.reply(status, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def whoami(self):
        if self.headers.get("Authorization") is None:
            self.reply(401, {})
            return
        self.send_json({"type": "user", "name": "robots", "auth": {"accessToken": {"role": self.server.role}}})

    def validate(self, data):
        front = data["content"].split("---")[1] if data["content"].startswith("---") else ""
        licence = (yaml.safe_load(front) or {}).get("license")
        if licence in (None, *LICENCES):
            self.send_json({"errors": [], "warnings": []})
        else:
            self.send_json({"errors": [{"message": f'"license" must be one of {LICENCES}'}]}, 400)

    def create(self, data):
        name = f"{data['organization']}/{data['name']}"
        if data["organization"] != "robots":
            self.reply(403, {"X-Error-Message": "You don't have the rights to create a model under this namespace"})
        elif name in self.server.repositories:
            self.send_json({"error": "You already created this model repo", "url": ""}, 409)
        else:
            private = data.get("visibility") == "private" or bool(data.get("private"))
            first = {"0" * 39 + "1": {".gitattributes": b"*.onnx filter=lfs\n"}}
            self.server.repositories[name] = Repository(first, {"main": "0" * 39 + "1"}, private)
            self.server.written.append(("create", name))
            self.send_json({"url": f"{self.server.url}/{name}"})

    def branch(self, repository, name):
        if name in repository.refs:
            self.reply(409, {})
            return
        repository.refs[name] = repository.refs["main"]
        self.server.written.append(("branch", name))
        self.send_json({})

    def tag(self, repository, revision, data):
        if data["tag"] in repository.tags:
            self.reply(409, {})
            return
        repository.tags[data["tag"]] = repository.refs.get(revision, revision)
        self.server.written.append(("tag", data["tag"]))
        self.send_json({})

    def preupload(self, repository, revision, data):
        there = repository.commits[repository.refs[revision]]
        found = []
        for file in data["files"]:
            content, large = there.get(file["path"]), file["path"].endswith(LARGE)
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else git_blob_id(content)
            ignored = file["path"] in repository.ignored
            mode = "lfs" if large else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self.send_json({"files": found})

    def batch(self, data):
        actions = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            if entry["oid"] not in self.server.large
            else entry
            for entry in data["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": actions})

    def store(self, oid, content):
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self.server.written.append(("upload", oid))
        self.reply(200, {})

    def paths_info(self, repository, revision, query):
        files = repository.commits[repository.refs.get(revision, revision)]
        self.send_json([self.entry(path, files[path]) for path in query["paths"] if path in files])

    def commit(self, name, repository, branch, body, create_pr):
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.refs[branch]):
            self.send_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.server.large[value["oid"]]
        target, onto = branch, ""
        if create_pr:
            repository.pull_requests.append(header["summary"])
            target, onto = f"refs/pr/{len(repository.pull_requests)}", branch
        sha = repository.commit(target, files, header["summary"], header["description"], onto)
        self.server.written.append(("commit", sorted(files)))
        page = f"{self.server.url}/{name}/discussions/{len(repository.pull_requests)}" if create_pr else None
        self.send_json(
            {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": page}
        )

    def send_file(self, name, content, headers):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut = self.command == "GET" and name == "policy.onnx" and self.server.cuts > 0
        if cut:
            self.server.cuts -= 1
        if self.command == "GET" and name in self.server.stalled:
            self.reply(200, headers, body, send=len(body) // 2)
            self.wfile.flush()
            self.server.released.wait(120)
            return
        self.reply(206 if start else 200, headers, body, send=(0 if start else len(body) // 2) if cut else None)
        if self.command == "GET" and name in self.server.after:
            self.server.after[name]()

    lost = False

    def reply(self, status, headers, body=b"", send=None):
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])


@pytest.fixture
def linear(make_policy):
    return make_policy()


@pytest.fixture
def hub(linear, monkeypatch):
    files = {path.name: path.read_bytes() for path in linear.folder.iterdir()}
    files |= {"README.md": b"# Pockets", "pytorch_model.bin": b"\x80pickle", "policy.onnx.data": b"x", "run.py": b"1/0"}
    hub = Hub({SHA: files}, {"main": SHA, "v1": SHA})
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", True, raising=False
    )  # its server is not one that can stand here
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.stop()


@pytest.fixture
def load(hub, tmp_path):
    def load(repo_id=REPO, **arguments):
        return MeamPolicy.from_pretrained(repo_id, cache_dir=tmp_path / "cache", **arguments)

    return load

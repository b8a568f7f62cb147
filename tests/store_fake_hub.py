"""
The part of the hub's HTTP interface that a dataset repository needs, on 127.0.0.1, for the real huggingface_hub:
commits with a parent, large files by sha256, listings, downloads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/caches"


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.commits: list[tuple[str, dict[str, bytes]]] = [("0" * 40, {".gitattributes": b"*.zip filter=lfs\n"})]
        self.large: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.ignored = ""
        """Paths that end so are left out of commits, as by a .gitignore."""
        self.before_commit: Any = None
        """Called once before the next commit is taken: another's commit may come first."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]]:
        return next((c for c in self.commits if c[0] == revision), self.commits[-1])

    def add(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, {**self.files, **files}))
        return sha

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: FakeHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def item(self, path: str, data: bytes) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if path.endswith(".zip"):
            item["oid"] = blob_id(b"a pointer to " + data)
            item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        item["lastCommit"] = {"id": "0" * 40, "title": "t", "date": "2026-01-02T03:04:05.000Z"}
        return item

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self.answer({"id": REPO, "sha": self.hub.commits[-1][0], "private": False, "tags": [], "siblings": []})
        elif path.startswith(f"{api}/tree/"):
            revision, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            self.list(revision, folder, parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1"))
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            sha, tree = self.hub.tree(revision)
            if name not in tree:
                self.missing("EntryNotFound")
                return
            digest = hashlib.sha256(tree[name]).hexdigest()
            self.answer(tree[name], headers={"X-Repo-Commit": sha, "ETag": f'"{digest}"'})
        else:
            self.missing("RepoNotFound")

    def list(self, revision: str, folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {p: d for p, d in self.hub.tree(revision)[1].items() if p.startswith(prefix)}
        if not inside:
            self.missing("EntryNotFound")
            return
        folders = {prefix + p.removeprefix(prefix).split("/")[0] for p in inside if "/" in p.removeprefix(prefix)}
        near = {p: d for p, d in inside.items() if recursive or "/" not in p.removeprefix(prefix)}
        found = [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
        self.answer(found + [self.item(p, d) for p, d in near.items()])

    def do_PUT(self) -> None:
        oid, data = self.path.rsplit("/", 1)[1], self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self.hub.uploads[oid] += 1
        self.answer(b"")

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        api = f"/api/datasets/{REPO}"
        if path.startswith(f"{api}/preupload/"):
            files = [file["path"] for file in json.loads(data)["files"]]
            self.answer({"files": [self.mode(name) for name in files]})
        elif path == f"/datasets/{REPO}.git/info/lfs/objects/batch":
            self.answer({"objects": [self.upload(thing) for thing in json.loads(data)["objects"]]})
        elif path.startswith(f"{api}/paths-info/"):
            asked = parse_qs(data.decode())["paths"]
            _, tree = self.hub.tree(path.rsplit("/", 1)[1])
            self.answer([self.item(name, tree[name]) for name in asked if name in tree])
        elif path.startswith(f"{api}/commit/"):
            self.commit([json.loads(line) for line in data.splitlines()])
        else:
            self.missing("RepoNotFound")

    def mode(self, name: str) -> dict[str, Any]:
        ignored = bool(self.hub.ignored) and name.endswith(self.hub.ignored)
        return {"path": name, "uploadMode": "lfs" if name.endswith(".zip") else "regular", "shouldIgnore": ignored}

    def upload(self, thing: dict[str, Any]) -> dict[str, Any]:
        if thing["oid"] in self.hub.large:
            return thing
        return {**thing, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}", "header": {}}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        with self.hub.lock:
            first, self.hub.before_commit = self.hub.before_commit, None
            if first is not None:
                first()
            values = {kind: [line["value"] for line in lines if line["key"] == kind] for kind in ("file", "lfsFile")}
            if lines[0]["value"].get("parentCommit") != self.hub.commits[-1][0]:
                self.answer({"error": "the branch has moved"}, 412)
                return
            added = {file["path"]: base64.b64decode(file["content"]) for file in values["file"]}
            added |= {file["path"]: self.hub.large[file["oid"]] for file in values["lfsFile"]}
            sha = self.hub.add(added)
        self.answer({"commitOid": sha, "commitUrl": f"{self.hub.url}/datasets/{REPO}/commit/{sha}", "success": True})

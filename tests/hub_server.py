"""A small Hugging Face Hub: folders on disk, served as dataset repositories to the real client libraries.

    with hub_server.serve(root) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

The folder `root/user/name` is the repository `user/name`. It can be read with `datasets.load_dataset` (streaming or
not), through `hf://` paths, by ranges of bytes, and with `hf_hub_download`, and written to with `create_repo` and
`create_commit` of new files, given any token, unless the Hub is `read_only`. A commit's hash is that of the names,
sizes and times of the files on disk. There is one branch, `main`, and no LFS: uploads come within the commit.
"""

import base64
import hashlib
import io
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


REPO, REVISION = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)", r"(?P<revision>[^/]+)"
API = f"/api/datasets/{REPO}"
ROUTES = [
    (f"(GET|HEAD) /datasets/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    (f"GET {API}(/revision/{REVISION})?", "info"),
    (f"GET {API}/tree/{REVISION}(/(?P<path>.+))?", "tree"),
    (f"POST {API}/paths-info/{REVISION}", "paths_info"),
    ("POST /api/validate-yaml", "validate_yaml"),
    ("POST /api/repos/create", "create"),
    (f"POST {API}/preupload/{REVISION}", "preupload"),
    (f"POST {API}/commit/{REVISION}", "commit"),
]
NEEDS_TOKEN = {"create", "preupload", "commit"}


class HubError(Exception):
    """An answer that says no, with the `X-Error-Code` from which the client makes an exception of its own."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub(ThreadingHTTPServer):
    """The server: its `endpoint`; its `requests` in the order of arrival, `(method, path, range)` with None for all of
    a file; whether it is `read_only`; and `private`, `{repository: as asked}`."""

    request_queue_size = 128

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.endpoint = Path(os.path.abspath(root)), f"http://127.0.0.1:{self.server_port}"
        self.requests, self.read_only, self.private = [], threading.Event(), {}

    def environment(self, home):
        """Variables that point the clients of a new process here, with all of their caches below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up in the middle of a file
            super().handle_error(request, client_address)

    def snapshot(self, repo, revision):
        """Hash of a commit and the files in it, as `{path: entry of a listing}`."""
        folder = self.root / repo
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, stat = path.relative_to(folder).as_posix(), path.stat()
            oid = hashlib.sha1(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
            files[name] = {"type": "file", "path": name, "size": stat.st_size, "oid": oid}
        sha = hashlib.sha1(json.dumps([repo, files]).encode()).hexdigest()
        if revision not in ("main", sha):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, files


class Handler(BaseHTTPRequestHandler):
    """One method for each entry of `ROUTES`; its arguments are the named parts of the URL."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(url.path), self.headers["Range"]))
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            for pattern, name in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {url.path}"):
                    if name in NEEDS_TOKEN and not self.headers["Authorization"]:
                        raise HubError(401, "Invalid username or password.")
                    if name in NEEDS_TOKEN and self.server.read_only.is_set():
                        raise HubError(403, "The Hub is read-only at the moment.")
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**parts)
            raise HubError(404, "Not found", "RepoNotFound")
        except HubError as error:
            self.send_json({"error": str(error)}, error.status, error.headers)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def send_json(self, value, status=200, headers={}):
        content = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", **headers}
        self.send_content(io.BytesIO(content), len(content), status, headers)

    def send_content(self, file, length, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        while self.command != "HEAD" and length and (chunk := file.read(min(length, 65536))):
            self.wfile.write(chunk)
            length -= len(chunk)

    def resolve(self, repo, revision, path):
        sha, files = self.server.snapshot(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{files[path]["oid"]}"', "Accept-Ranges": "bytes"}
        with open(self.server.root / repo / path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, end, status = 0, size, 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                start, end = int(match[1]), min(int(match[2] or size) + 1, size)
                if start >= end:
                    raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
                status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
            file.seek(start)
            self.send_content(file, end - start, status, headers)

    def info(self, repo, revision="main"):
        sha, files = self.server.snapshot(repo, revision)
        siblings = [{"rfilename": name, "size": file["size"], "blobId": file["oid"]} for name, file in files.items()]
        about = {"private": self.server.private.get(repo, False), "gated": False, "tags": []}
        self.send_json({"id": repo, "sha": sha, "siblings": siblings, **about})

    def tree(self, repo, revision, path=""):
        _, files = self.server.snapshot(repo, revision)
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
        entries = {name: {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders} | files
        prefix = path + "/" if path else ""
        inside = sorted(name for name in entries if name.startswith(prefix))
        if path and not inside:
            raise HubError(404, "Entry not found", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            inside = [name for name in inside if "/" not in name[len(prefix) :]]
        self.send_json([entries[name] for name in inside])

    def paths_info(self, repo, revision):
        _, files = self.server.snapshot(repo, revision)
        self.send_json([files[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in files])

    def validate_yaml(self):
        self.send_json({"errors": [], "warnings": []})  # the Hub looks at the metadata of a README.md

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted.get("type") != "dataset" or not re.fullmatch(REPO, repo):
            raise HubError(400, "Only datasets can be created, and only by their full names")
        exists = (self.server.root / repo).is_dir()
        (self.server.root / repo).mkdir(parents=True, exist_ok=True)
        is_private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.private.setdefault(repo, bool(is_private))
        error = {"error": "You already created this dataset repo"} if exists else {}
        self.send_json({"url": f"{self.server.endpoint}/datasets/{repo}", **error}, 409 if exists else 200)

    def preupload(self, repo, revision):
        sha, _ = self.server.snapshot(repo, revision)
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        self.send_json({"files": modes, "commitOid": sha})

    def commit(self, repo, revision):
        if revision != "main" or "create_pr" in self.query:
            raise HubError(400, "Commits can only go to main")
        folder = self.server.root / repo
        _, *operations = map(json.loads, self.body.splitlines())
        for operation in operations:
            path = Path(os.path.abspath(folder / operation["value"]["path"]))
            if operation["key"] != "file" or folder not in path.parents:
                raise HubError(400, f"Not supported: {operation['key']} of {path}")
            path.unlink(missing_ok=True)  # one who is reading the old file reads it to its end
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(operation["value"]["content"]))
        sha, _ = self.server.snapshot(repo, revision)
        url = f"{self.server.endpoint}/datasets/{repo}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url})


@contextmanager
def serve(root):
    """Runs a `Hub` on a free port for as long as the block lasts."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

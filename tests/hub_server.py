"""A small Hugging Face Hub: folders on disk, served as repositories to the real client libraries.

    with hub_server.serve(root) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

The folder `root/user/name` is the data set, and the model, `user/name`. It can be read with `datasets.load_dataset`
(streaming or not), through `hf://` paths, by ranges of bytes, and with `hf_hub_download`, and written to with
`create_repo` and `create_commit` of new files, given any token, unless the Hub is `read_only`. A commit's hash is that
of the names, sizes and times of the files on disk. There is one branch, `main`, and no LFS: uploads come within the
commit.
"""

import base64
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from werkzeug import Request, Response
from werkzeug.exceptions import NotFound, abort
from werkzeug.routing import BaseConverter, Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file


class Repository(BaseConverter):
    regex, part_isolating = r"\w[\w.-]*/\w[\w.-]*", False


KIND = "<any(datasets, models):kind>"
ROUTES = Map(
    [
        Rule("/<repo:repo>/resolve/<revision>/<path:path>", endpoint="resolve"),
        Rule("/datasets/<repo:repo>/resolve/<revision>/<path:path>", endpoint="resolve"),
        Rule(f"/api/{KIND}/<repo:repo>", endpoint="info"),
        Rule(f"/api/{KIND}/<repo:repo>/revision/<revision>", endpoint="info"),
        Rule(f"/api/{KIND}/<repo:repo>/tree/<revision>", endpoint="tree"),
        Rule(f"/api/{KIND}/<repo:repo>/tree/<revision>/<path:path>", endpoint="tree"),
        Rule(f"/api/{KIND}/<repo:repo>/paths-info/<revision>", endpoint="paths_info"),
        Rule("/api/validate-yaml", endpoint="validate_yaml"),
        Rule("/api/repos/create", endpoint="create"),
        Rule("/api/datasets/<repo:repo>/preupload/<revision>", endpoint="preupload"),
        Rule("/api/datasets/<repo:repo>/commit/<revision>", endpoint="commit"),
    ],
    converters={"repo": Repository},
)
NEEDS_TOKEN = {"create", "preupload", "commit"}


def answer(value, status=200, headers=None):
    return Response(json.dumps(value), status, headers, content_type="application/json")


def refuse(status, message, code=None, **headers):
    """Answers with the `X-Error-Code` from which the client makes an exception of its own."""
    headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    abort(answer({"error": message}, status, headers))


class Quiet(WSGIRequestHandler):
    def log(self, *args):
        pass


class Hub:
    """Its `endpoint`; its `requests` in the order of arrival, `(method, path, range)` with None for all of a file;
    whether it is `read_only`; and `private`, `{repository: as asked}`. A method for each endpoint of `ROUTES`."""

    def __init__(self, root):
        self.root, self.requests, self.read_only, self.private = Path(os.path.abspath(root)), [], threading.Event(), {}
        self.http = make_server("127.0.0.1", 0, self.application, threaded=True, request_handler=Quiet)
        self.endpoint = f"http://127.0.0.1:{self.http.port}"

    def environment(self, home):
        """Variables that point the clients of a new process here, with all of their caches below `home`."""
        caches = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
        online = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        return {**online, "HF_TOKEN": "hf_test", "no_proxy": "127.0.0.1", **{k: str(v) for k, v in caches.items()}}

    @Request.application
    def application(self, request):
        self.requests.append((request.method, request.path, request.headers.get("Range")))
        try:
            name, parts = ROUTES.bind_to_environ(request.environ).match()
        except NotFound:
            refuse(404, "Not found", "RepoNotFound")
        if name in NEEDS_TOKEN and "Authorization" not in request.headers:
            refuse(401, "Invalid username or password.")
        if name in NEEDS_TOKEN and self.read_only.is_set():
            refuse(403, "The Hub is read-only at the moment.")
        parts.pop("kind", None)
        return getattr(self, name)(request, **parts)

    def snapshot(self, repo, revision):
        """Hash of a commit and the files in it, as `{path: entry of a listing}`."""
        folder = self.root / repo
        if not folder.is_dir():
            refuse(404, "Repository not found", "RepoNotFound")
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, stat = path.relative_to(folder).as_posix(), path.stat()
            oid = hashlib.sha1(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
            files[name] = {"type": "file", "path": name, "size": stat.st_size, "oid": oid}
        sha = hashlib.sha1(json.dumps([repo, files]).encode()).hexdigest()
        if revision not in ("main", sha):
            refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, files

    def resolve(self, request, repo, revision, path):
        sha, files = self.snapshot(repo, revision)
        if path not in files:
            refuse(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        response = send_file(self.root / repo / path, request.environ, etag=files[path]["oid"])
        response.headers["X-Repo-Commit"] = sha
        return response

    def info(self, request, repo, revision="main"):
        sha, files = self.snapshot(repo, revision)
        siblings = [{"rfilename": name, "size": file["size"], "blobId": file["oid"]} for name, file in files.items()]
        about = {"private": self.private.get(repo, False), "gated": False, "tags": []}
        return answer({"id": repo, "sha": sha, "siblings": siblings, **about})

    def tree(self, request, repo, revision, path=""):
        _, files = self.snapshot(repo, revision)
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
        entries = {name: {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders} | files
        prefix = path + "/" if path else ""
        inside = sorted(name for name in entries if name.startswith(prefix))
        if path and not inside:
            refuse(404, "Entry not found", "EntryNotFound")
        if request.args.get("recursive", "false").lower() != "true":
            inside = [name for name in inside if "/" not in name[len(prefix) :]]
        return answer([entries[name] for name in inside])

    def paths_info(self, request, repo, revision):
        _, files = self.snapshot(repo, revision)
        return answer([files[path] for path in request.form.getlist("paths") if path in files])

    def validate_yaml(self, request):
        return answer({"errors": [], "warnings": []})  # the Hub looks at the metadata of a README.md

    def create(self, request):
        wanted = request.get_json()
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted.get("type") != "dataset":
            refuse(400, "Only datasets can be created")
        exists = (self.root / repo).is_dir()
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        self.private.setdefault(repo, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        error = {"error": "You already created this dataset repo"} if exists else {}
        return answer({"url": f"{self.endpoint}/datasets/{repo}", **error}, 409 if exists else 200)

    def preupload(self, request, repo, revision):
        sha, _ = self.snapshot(repo, revision)
        names = [file["path"] for file in request.get_json()["files"]]
        modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        return answer({"files": modes, "commitOid": sha})

    def commit(self, request, repo, revision):
        if revision != "main" or "create_pr" in request.args:
            refuse(400, "Commits can only go to main")
        _, *operations = map(json.loads, request.get_data().splitlines())
        for operation in operations:
            if operation["key"] != "file":
                refuse(400, f"Not supported: {operation['key']}")
            path = self.root / repo / operation["value"]["path"]
            path.unlink(missing_ok=True)  # one who is reading the old file reads it to its end
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(operation["value"]["content"]))
        sha, _ = self.snapshot(repo, revision)
        url = f"{self.endpoint}/datasets/{repo}/commit/{sha}"
        return answer({"success": True, "commitOid": sha, "commitUrl": url})


@contextmanager
def serve(root):
    """Runs a `Hub` on a free port for as long as the block lasts."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        thread.join()
        hub.http.server_close()

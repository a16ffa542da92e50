"""The Hub of hub_server.py, asked by the real clients, each in a process of its own."""

import http.client
import inspect
import json
import os
import subprocess
import sys
import textwrap

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


SHARD = "data/train-00001-of-00003.parquet"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with three files of 40 rows for training and one for testing, of 50 KB a row."""
    root = tmp_path_factory.mktemp("root")
    (root / "ada" / "pairs" / "data").mkdir(parents=True)
    for name in [*(f"train-{i:05d}-of-00003" for i in range(3)), "test-00000-of-00001"]:
        columns = {"uid": [f"{name}, row {i}" for i in range(40)], "image": [os.urandom(50_000) for _ in range(40)]}
        pq.write_table(pa.table(columns), root / "ada" / "pairs" / "data" / f"{name}.parquet", row_group_size=10)
    return root


@pytest.fixture
def hub(root):
    with hub_server.serve(root) as hub:
        yield hub


def client(hub, home, function, *args):
    """Result of a function that uses nothing but its arguments and imports, in a new process whose Hub this is."""
    call = f"print(json.dumps({function.__name__}(*json.loads(sys.argv[1]))), flush=True)"
    leave = "os._exit(0)  # Arrow's threads may outlive Python's end, which aborts the process now and then"
    code = f"import json, os, sys\n{textwrap.dedent(inspect.getsource(function))}\n{call}\n{leave}"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(args)],
        env={**os.environ, **hub.environment(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def uids(root, name):
    return pq.read_table(root / "ada" / "pairs" / "data" / name, columns=["uid"])["uid"].to_pylist()


def test_load_dataset(hub, root, tmp_path):
    def load():
        import datasets

        builder = datasets.load_dataset_builder("ada/pairs")
        test = datasets.load_dataset("ada/pairs", split="test")
        train = datasets.load_dataset("ada/pairs", split="train", streaming=True)
        files = {split: [file.split("/")[-1] for file in names] for split, names in builder.config.data_files.items()}
        return files, test["uid"][:], test[7]["image"].hex(), [row["uid"] for row in train]

    files, test, image, train = client(hub, tmp_path, load)
    names = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert files == {"train": names, "test": ["test-00000-of-00001.parquet"]}
    assert train == [uid for name in names for uid in uids(root, name)]
    table = pq.read_table(root / "ada" / "pairs" / "data" / "test-00000-of-00001.parquet")
    assert test == table["uid"].to_pylist() and bytes.fromhex(image) == table["image"][7].as_py()


def test_a_small_column_is_a_small_part(hub, root, tmp_path):
    def read(path):
        import fsspec
        import huggingface_hub
        import pyarrow.parquet as pq

        with fsspec.open(f"hf://datasets/ada/pairs@main/{path}", block_size=2**14) as file:
            columns = pq.ParquetFile(file).read(columns=["uid"])
        with huggingface_hub.HfFileSystem().open(f"datasets/ada/pairs/{path}", cache_type="none") as file:
            group = pq.ParquetFile(file).read_row_group(2, columns=["uid"])
        return columns["uid"].to_pylist(), group["uid"].to_pylist()

    columns, group = client(hub, tmp_path, read, SHARD)
    expected = uids(root, "train-00001-of-00003.parquet")
    assert columns == expected and group == expected[20:30]
    fetched = [(method, asked) for method, path, asked in hub.requests if path.endswith(SHARD)]
    assert fetched and all(method == "GET" and asked for method, asked in fetched)
    size = (root / "ada" / "pairs" / SHARD).stat().st_size
    assert size > 2_000_000 and sum(len(uid) for uid in columns) < hub.bytes_sent < size / 8


def test_ranges(hub, root):
    content = (root / "ada" / "pairs" / SHARD).read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port)

    def get(asked, method="GET"):
        headers = {"Range": asked} if asked else {}
        connection.request(method, f"/datasets/ada/pairs/resolve/main/{SHARD}", headers=headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Range"), response.read()

    size = len(content)
    assert get(None) == (200, None, content)
    assert get("bytes=0-0") == (206, f"bytes 0-0/{size}", content[:1])
    assert get("bytes=100-299") == (206, f"bytes 100-299/{size}", content[100:300])
    assert get(f"bytes={size - 5}-{size + 5}") == (206, f"bytes {size - 5}-{size - 1}/{size}", content[-5:])
    assert get(f"bytes={size - 8}-") == (206, f"bytes {size - 8}-{size - 1}/{size}", content[-8:])
    assert hub.bytes_sent == size + 1 + 200 + 5 + 8
    assert get(f"bytes={size}-")[:2] == (416, f"bytes */{size}")
    assert get(None, "HEAD") == (200, None, b"")
    assert hub.requests[1] == ("GET", f"/datasets/ada/pairs/resolve/main/{SHARD}", "bytes=0-0")
    connection.close()


def test_download(hub, root, tmp_path, monkeypatch):
    def download(path):
        import datasets
        import huggingface_hub

        pinned = huggingface_hub.HfApi().dataset_info("ada/pairs").sha
        return [
            *datasets.DownloadManager().download([f"hf://datasets/ada/pairs@{pinned}/{path}"]),
            huggingface_hub.hf_hub_download("ada/pairs", path, repo_type="dataset", local_dir="local"),
            huggingface_hub.snapshot_download("ada/pairs", repo_type="dataset", allow_patterns="data/test*"),
        ]

    monkeypatch.chdir(tmp_path)
    *files, snapshot = client(hub, tmp_path, download, SHARD)
    for file in files:
        assert open(file, "rb").read() == (root / "ada" / "pairs" / SHARD).read_bytes()
    assert sorted(os.listdir(f"{snapshot}/data")) == ["test-00000-of-00001.parquet", os.path.basename(SHARD)]


def test_what_is_missing(hub, tmp_path):
    def ask():
        import datasets
        import fsspec
        import huggingface_hub as hh

        kind = {"repo_type": "dataset"}
        calls = [
            lambda: hh.hf_hub_download("ada/none", "x", **kind),
            lambda: hh.hf_hub_download("ada/pairs", "x", **kind),
            lambda: hh.hf_hub_download("ada/pairs", "x", revision="v1", **kind),
            lambda: hh.HfApi().upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="ada/none", **kind),
            lambda: hh.HfApi().create_repo("ada/none", token=False, **kind),
            lambda: fsspec.open("hf://datasets/ada/pairs/x").open(),
            lambda: datasets.load_dataset("ada/none"),
        ]
        names = []
        for call in calls:
            try:
                call()
            except Exception as error:
                names.append(type(error).__name__)
        return names

    # The newest huggingface_hub tells an entry that is missing on the Hub from one that is missing in the cache.
    assert [name.removeprefix("Remote") for name in client(hub, tmp_path, ask)] == [
        "RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError",
        "HfHubHTTPError", "FileNotFoundError", "DatasetNotFoundError",
    ]  # fmt: skip
    assert not (hub.root / "ada" / "none").exists()


@pytest.mark.parametrize("xet", ["0", "1"])
def test_write(tmp_path, monkeypatch, xet):
    def write(folder):
        import datasets
        import pytest
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        api, repo = HfApi(), {"repo_id": "bob/labels", "repo_type": "dataset"}
        repos = [api.create_repo(**repo, exist_ok=True).repo_id for _ in range(2)]
        first = api.upload_file(path_or_fileobj=b"1", path_in_repo="notes/a.txt", **repo).oid
        api.upload_file(path_or_fileobj=b"2", path_in_repo="notes/b.txt", **repo)
        assert open(hf_hub_download(filename="notes/a.txt", revision=first, **repo)).read() == "1"
        last = api.upload_folder(folder_path=folder, delete_patterns="notes/a*", **repo).oid
        assert last == api.upload_folder(folder_path=folder, **repo).oid == api.dataset_info("bob/labels").sha
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(filename="notes/b.txt", revision=first, **repo)
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            api.upload_file(path_or_fileobj=b"3", path_in_repo="c.txt", parent_commit=first, **repo)
        return repos, api.list_repo_files(**repo), datasets.load_dataset("bob/labels", split="train")["label"][:]

    monkeypatch.setenv("HF_HUB_DISABLE_XET", xet)
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table({"label": [0.25, 1.0]}), folder / "data" / "train.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub_server.serve(tmp_path / "root") as hub:
        repos, files, labels = client(hub, tmp_path / "home", write, str(folder))
    assert repos == ["bob/labels"] * 2 and files == ["README.md", "data/train.parquet", "notes/b.txt"]
    assert labels == [0.25, 1.0]
    for name in files[:2]:
        assert (tmp_path / "root" / "bob" / "labels" / name).read_bytes() == (folder / name).read_bytes()

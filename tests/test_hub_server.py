"""The Hub of hub_server.py, asked by the real clients in a process of its own."""

import inspect
import json
import os
import subprocess
import sys
import textwrap

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq


def client(hub, home, function, *args):
    """Result of a function that uses nothing but its arguments and imports, in a new process whose Hub this is."""
    call = f"print(json.dumps({function.__name__}(*json.loads(sys.argv[1]))), flush=True)"
    leave = "os._exit(0)  # Arrow's threads may outlive Python's end, which aborts the process now and then"
    code = f"import json, os, sys\n{textwrap.dedent(inspect.getsource(function))}\n{call}\n{leave}"
    environment = {**os.environ, **hub.environment(home)}
    command = [sys.executable, "-c", code, json.dumps(args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_write_and_read(tmp_path):
    """What was committed is listed and loaded; what is missing has the errors of the real Hub; ranges are ranges."""

    def ask(folder):
        import datasets
        import fsspec
        import huggingface_hub as hh
        import pyarrow.parquet as pq

        repo, path = {"repo_id": "bob/labels", "repo_type": "dataset"}, "data/train.parquet"
        repos = [hh.HfApi().create_repo(**repo, exist_ok=True).repo_id for _ in range(2)]
        hh.HfApi().upload_folder(folder_path=folder, **repo)
        loaded = datasets.load_dataset("bob/labels", split="train")["label"][:]
        streamed = [row["label"] for row in datasets.load_dataset("bob/labels", split="train", streaming=True)]
        with hh.HfFileSystem().open(f"datasets/bob/labels/{path}", cache_type="none") as file:
            group = pq.ParquetFile(file).read_row_group(2, columns=["label"])["label"].to_pylist()
        local = hh.hf_hub_download(filename=path, **repo)
        errors = []
        for call in [
            lambda: hh.hf_hub_download("ada/none", "x", repo_type="dataset"),
            lambda: hh.hf_hub_download(filename="x", **repo),
            lambda: hh.hf_hub_download(filename=path, revision="v1", **repo),
            lambda: hh.HfApi().create_repo("ada/none", token=False, repo_type="dataset"),
            lambda: fsspec.open("hf://datasets/bob/labels/x").open(),
            lambda: datasets.load_dataset("ada/none"),
        ]:
            try:
                call()
            except Exception as error:
                # The newest huggingface_hub tells an entry missing on the Hub from one missing in the cache.
                errors.append(type(error).__name__.removeprefix("Remote"))
        return repos, hh.HfApi().list_repo_files(**repo), loaded, streamed, group, local, errors

    labels = [i / 40 for i in range(40)]
    (tmp_path / "folder" / "data").mkdir(parents=True)
    columns = {"label": labels, "image": [os.urandom(50_000) for _ in labels]}
    pq.write_table(pa.table(columns), tmp_path / "folder" / "data" / "train.parquet", row_group_size=10)
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub_server.serve(tmp_path / "root") as hub:
        repos, names, loaded, streamed, group, local, errors = client(
            hub, tmp_path / "home", ask, str(tmp_path / "folder")
        )
        ranges = [asked for _, path, asked in hub.requests if path.endswith("train.parquet") and asked]
    assert repos == ["bob/labels"] * 2 and names == ["README.md", "data/train.parquet"]
    assert loaded == streamed == labels and group == labels[20:30] and ranges
    for name in names:
        written = (tmp_path / "folder" / name).read_bytes()
        assert (tmp_path / "root" / "bob" / "labels" / name).read_bytes() == written
    assert open(local, "rb").read() == (tmp_path / "folder" / "data" / "train.parquet").read_bytes()
    assert errors == [
        "RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError", "HfHubHTTPError",
        "FileNotFoundError", "DatasetNotFoundError",
    ]  # fmt: skip
    assert not (tmp_path / "root" / "ada").exists()

"""Which data is missing on a cluster's nodes, and the download of that data."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.execute.prefetch import missing, prefetch
from launch.plan.spec import Spec, load_spec, script_spec
from trainers.cifar10.config import CIFAR10_FILES
from trainers.contract.errors import UserError

HERE = ClusterConfig(name="here")


def load(task: str, *overrides: str, cluster: ClusterConfig = HERE) -> Spec:
    return load_spec(task, overrides, cluster=cluster, environment={})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAUNCH_DATA", raising=False)
    return tmp_path


# --- What is missing


def test_data_is_looked_for_where_the_ranks_look(folder, monkeypatch):
    def missing_on(*overrides: str, **settings) -> list[str]:
        cluster = ClusterConfig(name="there", **settings)
        return missing(load("cifar10", *overrides, cluster=cluster), cluster)

    assert missing_on() == [f"CIFAR-10 in {folder}/home/.cache/launch"]
    monkeypatch.setenv("LAUNCH_DATA", "/here")
    assert missing_on() == ["CIFAR-10 in /here"]
    assert missing_on(data="/shared") == ["CIFAR-10 in /shared"]
    assert missing_on(data="/shared", env={"LAUNCH_DATA": "/set"}) == ["CIFAR-10 in /set"]
    assert missing_on("data.root=mine", data="/shared") == [f"CIFAR-10 in {folder}/mine"]


def test_nothing_is_missing_once_all_files_are_there(folder):
    for file in CIFAR10_FILES:
        (folder / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / file).touch()
    assert missing(load("cifar10", "data.root=data"), HERE) == []
    (folder / "data" / CIFAR10_FILES[3]).unlink()
    assert missing(load("cifar10", "data.root=data"), HERE) == [f"CIFAR-10 in {folder}/data"]
    assert missing(load("cifar10", "data=sample"), HERE) == missing(load("cifar10", "data=/my/images"), HERE) == []


def test_a_script_downloads_its_own_data(folder):
    (folder / "train.py").touch()
    spec = script_spec("train.py", cluster=HERE)
    assert missing(spec, HERE) == []
    with pytest.raises(UserError, match="is a script"):
        prefetch(spec, HERE)


# --- A user's own task. It imports no torch, so these processes are quick


@pytest.fixture
def own_task(folder: Path):
    """A function that makes a task whose `prefetch` has the given body, and returns its spec."""
    def make(body: str) -> Spec:
        (folder / "mine.py").write_text(
            "import os\nfrom trainers.errors import UserError\n\nclass Mine:\n"
            f"    def __init__(self, config):\n        self.config = config\n\n    def prefetch(self):\n        {body}\n")
        (folder / "my.yaml").write_text("task: mine:Mine\nmodel: {hub: some/模型}\ntrain: {steps: 1}\n")
        return load("my.yaml")
    return make


def test_the_download_has_the_ranks_environment_without_offline_settings(own_task, monkeypatch, capfd):
    monkeypatch.setenv("HF_HOME", "/mine")
    spec = own_task("e = os.environ; return [f'{self.config.model[\"hub\"]}: {e[\"HF_HOME\"]}', "
                    "e['LAUNCH_DATA'], str([key for key in e if 'OFFLINE' in key])]")
    cluster = ClusterConfig(name="there", data="/shared", env={"HF_HOME": "/hub", "HF_HUB_OFFLINE": "1"})
    assert prefetch(spec, cluster) == 0
    assert capfd.readouterr() == ("some/模型: /hub\n/shared\n[]\n", "")


def test_its_lines_go_to_the_given_output(own_task, folder, capfd):
    with open(folder / "lines", "w") as file:
        assert prefetch(own_task("return ['one', 'two']"), HERE, file) == 0
    assert (folder / "lines").read_text() == "one\ntwo\n" and capfd.readouterr() == ("", "")
    assert prefetch(own_task("return []"), HERE) == 0
    assert capfd.readouterr().out == "my downloads nothing\n"


def test_a_download_that_fails(own_task, folder, capfd):
    assert prefetch(own_task("raise UserError('the hub says no', 'log in')"), HERE) == 2
    assert capfd.readouterr() == ("", "error: the hub says no\nhint: log in\n")
    assert prefetch(own_task("raise KeyError('a bug')"), HERE) == 1
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(UserError, match="was ended by SIGKILL"):
        prefetch(own_task("os.kill(os.getpid(), 9)"), HERE)
    (folder / "mine.py").write_text("import torhc\n")
    assert prefetch(load("my.yaml"), HERE) == 2
    assert "`mine` imports `torhc`, which is not installed" in capfd.readouterr().err
    (folder / "mine.py").write_text("Mine = 3\n")
    assert prefetch(load("my.yaml"), HERE) == 2
    assert "not a subclass of trainers.engine.task.Task" in capfd.readouterr().err


# --- CIFAR-10, by torchvision's own download


STAND_IN = """
import json
from pathlib import Path
from torchvision.datasets import CIFAR10
from trainers.cifar10.task import Cifar10

for key, value in json.loads(Path(__file__).with_suffix(".json").read_text()).items():
    setattr(CIFAR10, key, value)

class Small(Cifar10):
    pass
"""


def archive() -> tuple[bytes, dict]:
    """An archive of six files with one image each, and the attributes by which torchvision accepts it as CIFAR-10."""
    files = {name: {"data": [[7] * 3072], "labels": [3]} for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]}
    packed = {name: pickle.dumps(value) for name, value in {**files, "batches.meta": {"label_names": list("abcdefghij")}}.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in packed.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in packed.items()}
    return stream.getvalue(), {
        "tgz_md5": hashlib.md5(stream.getvalue()).hexdigest(), "test_list": [["test_batch", sums["test_batch"]]],
        "train_list": [[name, md5] for name, md5 in sums.items() if name.startswith("data")],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    }


@pytest.fixture
def small_cifar10(folder: Path):
    """Write small.yaml, the spec of a `cifar10` that downloads a small archive from a local server. Yields the server."""
    content, attributes = archive()

    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *words) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (folder / "small.json").write_text(json.dumps({**attributes, "url": f"http://127.0.0.1:{server.server_port}/c.tar.gz"}))
        (folder / "small.py").write_text(STAND_IN)
        (folder / "small.yaml").write_text(
            "task: small:Small\nconfig: trainers.cifar10.config:Cifar10Config\ntrain: {steps: 1}\n")
        yield server
        server.shutdown()


@pytest.mark.slow  # each process imports torch
def test_cifar10_is_downloaded_to_where_ranks_look(folder, small_cifar10, capfd):
    cluster = ClusterConfig(name="there", data=str(folder / "shared data"))
    spec = load("small.yaml", cluster=cluster)
    assert missing(spec, cluster) == [f"CIFAR-10 in {folder}/shared data"]
    assert prefetch(spec, cluster) == 0
    assert capfd.readouterr().out == f"CIFAR-10: fetched into {folder}/shared data\n"
    assert missing(spec, cluster) == []
    assert sorted(path.name for path in (folder / "shared data").iterdir()) == ["cifar-10-batches-py"]
    small_cifar10.shutdown()
    small_cifar10.server_close()
    assert prefetch(spec, cluster) == 0
    assert capfd.readouterr() == (f"CIFAR-10: already in {folder}/shared data\n", "")

    assert prefetch(spec, HERE) == 2  # the server is gone now
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    assert f"error: CIFAR-10 is not in {folder}/home/.cache/launch, and it could not be downloaded" in err
    assert "hint: put " in err


@pytest.mark.slow
def test_the_names_of_cifar10s_files_are_torchvisions():
    from torchvision.datasets import CIFAR10

    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]]
    assert CIFAR10_FILES == [f"{CIFAR10.base_folder}/{name}" for name in names]

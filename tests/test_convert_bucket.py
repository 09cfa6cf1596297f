"""Weights in and out of a bucket: a stand-in for Google's on this machine."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from converting import REPO, command
from hub import TIED, random_tensors, read_files, write_checkpoint

from tests.processes import finish, start
from tests.test_train import BASE, base_overrides, losses

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="wants the `parity` extra")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
pytest.importorskip("gcsfs", reason="wants the `gcs` extra")

pytestmark = pytest.mark.full


class Bucket:
    """The bucket gs://bucket and commands that see it."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Where gcsfs and TensorStore look for the service, and a token that both take as given.
        self.env = os.environ | {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "XLA_FLAGS": "",
        }

    def begin(self, *words: object) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command(*words), cwd=REPO, env=self.env, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *words: object, status: int = 0) -> str:
        """What a command says."""
        process = self.begin(*words)
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, err
        assert "Traceback" not in err
        return out if status == 0 else err

    def write(self, name: str, content: bytes) -> None:
        """Puts an object there."""
        url = f"{self.url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
        urllib.request.urlopen(urllib.request.Request(url, content, method="POST")).close()

    def read(self) -> dict[str, bytes]:
        """Every object, by name."""
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o") as answer:
            items = json.load(answer).get("items", [])
        found = {}
        for item in items:
            with urllib.request.urlopen(item["mediaLink"]) as answer:
                found[item["name"]] = answer.read()
        return found


def give_generation(download: Callable[..., None], request: Any, response: Any, store: Any) -> None:
    """Answers with an object and, in a header, its generation."""
    download(request, response, store)
    held = store.objects["bucket"].get(request.params["object_id"])
    if held:
        response["x-goog-generation"] = held["generation"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    # TensorStore lists what has a prefix as a range of names, which the stand-in does not know.
    monkeypatch.setattr(
        emulator.Request,
        "query",
        property(lambda self: {"prefix": self._query.get("startOffset", [""]), **self._query}),
    )
    # Nor does it say which generation of an object it gives out, as Google's service does.
    monkeypatch.setattr(objects, "download", partial(give_generation, objects.download))
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    yield Bucket(f"http://localhost:{server._api._httpd.server_port}")
    server.stop()


def test_through_a_bucket_and_back(tmp_path: Path, bucket: Bucket) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    words = ("import", "--source", source, "--target", "gs://bucket/a/model")
    assert "parameters" in bucket.run(*words)
    held = bucket.read()
    assert "a/model/checkpoints/0/commit_success.txt" in held
    assert not [name for name in held if "unfinished" in name or "finished/" in name]
    bucket.run(*words)  # nothing to do
    assert bucket.read() == held
    assert "every checksum agrees" in bucket.run("verify", "--source", "gs://bucket/a/model")
    assert "tie_word_embeddings: True" in bucket.run("inspect", "--source", "gs://bucket/a/model")
    more = ("--base", "none", "--source", "gs://bucket/a/model", "--target")
    bucket.run("export", *more, "gs://bucket/out")
    bucket.run("export", *more, tmp_path / "out")
    out = {k.removeprefix("out/"): v for k, v in bucket.read().items() if k.startswith("out/")}
    assert out == read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)
    # What came out is a source, too; and, byte for byte, the one of what is there.
    again = ("import", "--source", "gs://bucket/out", "--target")
    assert "parameters" in bucket.run(*again, "gs://bucket/b")
    held = bucket.read()
    assert "parameters" in bucket.run(*again, "gs://bucket/a/model")
    assert bucket.read() == held


def test_two_hosts_and_a_bad_value(tmp_path: Path, bucket: Bucket) -> None:
    tensors = random_tensors(TIED)
    good = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][0] = float("nan")
    source = write_checkpoint(tmp_path / "in", TIED, tensors=tensors)
    words = ("import", "--source", source, "--target", "gs://bucket/model")
    assert "NaN" in bucket.run(*words, status=2)
    for reader in ("verify", "inspect"):
        assert "not finished" in bucket.run(reader, "--source", "gs://bucket/model", status=2)
    shutil.rmtree(source)
    write_checkpoint(source, TIED, tensors=tensors | {"model.norm.weight": good})
    assert "something else" in bucket.run(*words, status=2)
    words = ("import", "--source", source, "--target", "gs://bucket/pair")
    parts = [bucket.begin(*words, f"--part={i}/2") for i in (2, 1)]
    texts = [part.communicate(timeout=900) for part in parts]
    assert [part.returncode for part in parts] == [0, 0], texts
    assert any("parameters" in out for out, _ in texts)
    assert "every checksum agrees" in bucket.run("verify", "--source", "gs://bucket/pair")


def test_what_is_not_ours_stays(tmp_path: Path, bucket: Bucket) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    bucket.run("import", "--source", source, "--target", "gs://bucket/thesis/chapter")
    held = bucket.read()
    words = ("--target", "gs://bucket/thesis")
    assert "move it away" in bucket.run("import", "--source", source, *words, status=2)
    more = ("export", "--source", "gs://bucket/thesis/chapter", "--base", "none")
    assert "move it away" in bucket.run(*more, *words, status=2)
    assert bucket.read() == held


BEAM = "--beam=--runner=DirectRunner --temp_location=gs://bucket/tmp"


@pytest.mark.parametrize("way", ["processes", "beam"])
def test_text_in_a_bucket_becomes_the_same_records(
    tmp_path: Path, bucket: Bucket, way: str
) -> None:
    if way == "beam":
        pytest.importorskip("apache_beam", reason="wants the `beam` extra")
    pyarrow = pytest.importorskip("pyarrow", reason="wants the `corpus` extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"架空の文書の{'長い' * (i % 50)}第{i}番" for i in range(300)]
    lines = (json.dumps({"id": text, "text": text, "more": "x" * 9000}) for text in texts)
    (tmp_path / "text/deep").mkdir(parents=True)
    (tmp_path / "text/one.jsonl").write_text("\n".join(lines))  # several parts
    (tmp_path / "text/deep/two.txt.gz").write_bytes(gzip.compress("圧縮した文書".encode()))
    parquet.write_table(pyarrow.table({"text": ["表の文書"]}), tmp_path / "text/deep/x.parquet")
    (tmp_path / "held.txt").write_text("held out")
    for path in [*tmp_path.glob("text/**/*.*"), tmp_path / "held.txt"]:
        bucket.write(str(path.relative_to(tmp_path)), path.read_bytes())
    records = []
    for place, more in ((str(tmp_path), ""), ("gs://bucket", BEAM if way == "beam" else "")):
        files = {
            "data__source": "files",
            "data__train": f"('{place}/text/*.jsonl', '{place}/text/**/*.*')",
            "data__heldout": f"('{place}/held.txt',)",
            "data__corpus__shard_mib": 1,
            "data__workers": 2,
        }
        workdir = tmp_path / f"runs-{len(records)}"
        words = [f"--config={BASE}", *base_overrides(workdir, **files), *[more][: bool(more)]]
        process = subprocess.run(
            [sys.executable, "-m", "rpo_jax.prepare", *words],
            cwd=REPO,
            env=bucket.env,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert "302 documents kept" in process.stdout
        shards = (workdir / "data").glob("rows-*/*array_record*")
        records.append({(path.parent.name, path.name): path.read_bytes() for path in shards})
    assert len(records[0]) == 5 and records[0] == records[1]


def test_a_run_keeps_its_checkpoints_in_a_bucket(tmp_path: Path, bucket: Bucket) -> None:
    arguments = base_overrides(
        tmp_path, train__steps=6, checkpoint__directory="gs://bucket/runs", checkpoint__keep=1
    )
    words = ["rpo_jax.train", f"--config={BASE}", *arguments]
    folder = tmp_path / "fictional-base"

    def run(count: int) -> dict[str, str]:
        processes = start(count, words, env=bucket.env)
        for process, (_, errors) in zip(processes, finish(processes), strict=True):
            assert process.returncode == 0, errors
        return json.loads((folder / "summary.json").read_text())

    summary = run(2)
    assert summary["paths"]["checkpoint"] == "gs://bucket/runs/fictional-base/6"
    assert not (folder / "checkpoints").exists()
    steps = {name.split("/")[2] for name in bucket.read()}
    assert steps == {"6"}
    # one process reads what two have written
    (folder / "summary.json").unlink()
    assert run(1) == summary
    assert list(losses(folder)) == list(range(1, 7))
    # what is exported is what the same files give on a disk
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    origin = json.loads((copy / "run.json").read_text())
    origin["config"]["checkpoint"]["directory"] = ""
    (copy / "run.json").write_text(json.dumps(origin))
    for name, content in bucket.read().items():
        path = copy / "checkpoints" / name.removeprefix("runs/fictional-base/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for source in (folder, copy):
        target = tmp_path / f"out-{source.name}"
        bucket.run("export", "--base", "none", "--source", source, "--target", target)
    out, other = (read_files(tmp_path / f"out-{source.name}") for source in (folder, copy))
    assert out["model.safetensors"] == other["model.safetensors"]
    # without its folder, nobody knows whose checkpoints those are
    shutil.rmtree(folder)
    (process,) = start(1, words, env=bucket.env)
    ((_, errors),) = finish([process])
    assert process.returncode == 2
    assert "gs://bucket/runs/fictional-base holds checkpoints, but" in errors

"""Fetching a source from the hub: a stand-in server on this machine that breaks off once."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub import read_files, write_checkpoint
from tiny import SHAPE

pytest.importorskip("huggingface_hub", reason="wants the `hub` extra")

REPO = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "Qwen/tiny"
CLIENT_STEP = 10 * 2**20  # bytes; what a client that breaks off has kept is a multiple


class Hub(ThreadingHTTPServer):
    """Serves one repository; `cuts` says how many answers for a file break off in the middle."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("localhost", 0), Answer)
        self.files = files
        self.commit = COMMIT
        self.cuts: dict[str, int] = {}
        self.starts: dict[str, list[int]] = {name: [] for name in files}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    cut = False

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            data = json.dumps(
                {"id": NAME, "sha": self.server.commit, "siblings": siblings}
            ).encode()
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(raw), "oid": tag(raw)}
                    for name, raw in self.server.files.items()
                ]
                data = json.dumps(entries).encode()
            self.send(200, data, body, {"Content-Type": "application/json"})
            return
        name = path.rpartition("/")[2]
        if "/resolve/" not in path or name not in self.server.files:
            self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        data, start = self.server.files[name], 0
        headers = {
            "ETag": f'"{tag(data)}"',
            "X-Repo-Commit": self.server.commit,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body:
            self.server.starts[name].append(start)
            self.cut = self.server.cuts.get(name, 0) > 0
            self.server.cuts[name] = self.server.cuts.get(name, 0) - 1
        self.send(206 if asked else 200, data[start:], body, headers)

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if self.cut:
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)


def tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def test_without_a_network(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rpo_jax.convert", "import", f"--source={NAME}"]
    done = subprocess.run(
        [*words, f"--target={tmp_path / 'model'}"],
        cwd=REPO,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 2
    assert "no such folder, and the hub cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("model*"))


@pytest.mark.full
def test_a_broken_download_resumes(tmp_path: Path) -> None:
    shape = replace(SHAPE, vocab_size=200_000)
    files = read_files(write_checkpoint(tmp_path / "hub", shape, shards=2))
    long, broken = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"
    assert len(files[long]) > 2 * CLIENT_STEP
    words = [sys.executable, "-m", "rpo_jax.convert", "import", f"--source={NAME}"]
    words += [f"--target={tmp_path / 'model'}"]
    with serve(files) as hub:
        env = os.environ | {
            "HF_ENDPOINT": f"http://localhost:{hub.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }

        def run(*changed: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                changed or words, cwd=REPO, env=env, capture_output=True, text=True, timeout=900
            )

        # What can be told from small files is told before a byte of the weights is fetched.
        described = run(*words[:3], "inspect", f"--source={NAME}")
        assert f"{NAME} at {COMMIT}" in described.stdout, described.stderr
        assert "vocab_size: 200000" in described.stdout and "BF16" in described.stdout
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.tex").touch()
        taken = run(*words[:-1], f"--target={tmp_path / 'taken'}")
        assert taken.returncode == 2 and "is there already" in taken.stderr
        config = hub.files["config.json"]
        hub.files["config.json"] = config.replace(b'"qwen2"', b'"llama"')
        hub.commit = COMMIT[::-1]
        other = run()
        assert other.returncode == 2 and "model_type='llama'" in other.stderr, other.stderr
        hub.files["config.json"], hub.commit = config, COMMIT
        assert not hub.starts[long] and not hub.starts[broken]
        hub.starts["config.json"] = [0]
        hub.cuts = {long: 1, broken: 1000}
        first = run()
        assert first.returncode == 2, first.stderr
        assert "error: Qwen/tiny" in first.stderr and "Traceback" not in first.stderr
        assert not (tmp_path / "model").exists()
        hub.cuts = {}
        second = run()
        assert second.returncode == 0, second.stderr
    # Within one command a file goes on where it broke off; the next one fetches what is missing.
    at_first, afterwards = hub.starts[long]
    assert at_first == 0 and afterwards >= CLIENT_STEP
    small = [starts for name, starts in hub.starts.items() if name not in (long, broken)]
    assert small == [[0]] * len(small)
    manifest = json.loads((tmp_path / "model" / "model" / "manifest.json").read_text())
    assert manifest["source"] == NAME
    # Now the base of the card is known.
    words = [sys.executable, "-m", "rpo_jax.convert", "export", f"--source={tmp_path / 'model'}"]
    subprocess.run([*words, f"--target={tmp_path / 'out'}"], cwd=REPO, check=True)
    out = read_files(tmp_path / "out")
    assert f"base_model: {NAME}\n" in out.pop("README.md").decode()
    assert out == files

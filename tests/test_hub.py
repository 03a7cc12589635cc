import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files.model_file import save
from momconv.zoo.networks import build, replace_head

BESIDE = ("README.md", "config.json", "report.html", "plots/curves.png")


class Hub(ThreadingHTTPServer):
    """Stands for the hub: keeps what is uploaded, and refuses it if so wanted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.repo: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        hub, body = self.server, self._read()
        hub.asked.append(self.path)
        if hub.refuses:
            return self._answer({"error": "You don't have the rights"}, 403)
        address = f"http://127.0.0.1:{hub.server_address[1]}/me/ants"
        if self.path.endswith("/repos/create"):
            hub.repo = json.loads(body)
            return self._answer({"url": address, "id": "1", "name": "me/ants"})
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            whole = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
            ]
            return self._answer({"files": whole})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            return self._answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/0"}
            )
        return self._answer({"errors": [], "warnings": []})  # of the card

    def do_GET(self) -> None:
        self._answer({"id": "me/ants", "sha": "0" * 40, "siblings": [], "xetEnabled": False})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, document: object, code: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)  # as HF_ENDPOINT does
        monkeypatch.setenv("HF_TOKEN", "of-nobody")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, folder = build("cifar_resnet20"), tmp_path_factory.mktemp("runs")
    replace_head(network, ("ants", "bees"))
    save(network, folder / "best.safetensors")
    (folder / "plots").mkdir()
    for name in BESIDE:
        (folder / name).write_text(name)
    (folder / "state.safetensors").touch()
    return folder


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, words)])


def test_a_dry_run_says_what_would_be_uploaded(run_folder: Path, hub: Hub) -> None:
    document = json.loads(run(run_folder, "me/ants", "--dry-run", "--json").stdout)
    assert document["uploaded"] is False
    assert document["url"].endswith("/me/ants")
    assert list(document["files"]) == ["best.safetensors", *BESIDE]
    without = json.loads(run(run_folder, "me/ants", "--dry-run", "--json", "--no-report").stdout)
    assert list(without["files"]) == ["best.safetensors", "README.md", "config.json"]
    assert "would go to http://127.0.0.1:" in run(run_folder, "me/ants", "--dry-run").stdout
    assert hub.asked == []


def test_all_files_arrive_as_they_are(run_folder: Path, hub: Hub) -> None:
    ran = run(run_folder, "me/ants", "--private")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].endswith("/me/ants/commit/0")
    assert (hub.repo["name"], hub.repo["organization"]) == ("ants", "me")
    assert hub.repo.get("private") or hub.repo.get("visibility") == "private"
    assert hub.files == {
        name: (run_folder / name).read_bytes() for name in ("best.safetensors", *BESIDE)
    }


def test_what_the_hub_refuses_is_told(run_folder: Path, hub: Hub) -> None:
    hub.refuses = True
    ran = run(run_folder, "me/ants")
    assert ran.exit_code == 5
    assert ran.stderr.startswith("error: cannot upload to http://127.0.0.1:")
    assert "You don't have the rights" in ran.stderr


@pytest.mark.parametrize(
    ("words", "code"), [(["m e/ants"], 2), (["a/b/c"], 2), (["me/ants", "--offline"], 2)]
)
def test_what_cannot_be_is_refused_before(
    run_folder: Path, hub: Hub, words: list[str], code: int
) -> None:
    assert run(run_folder, *words).exit_code == code
    assert hub.asked == []


def test_offline_nothing_is_uploaded(
    run_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOMCONV_OFFLINE", "1")
    ran = run(run_folder, "me/ants")
    assert (ran.exit_code, hub.asked) == (5, [])

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.zoo import checkpoints
from momconv.zoo.description import describe
from momconv.zoo.networks import build, preprocessing_of
from momconv.zoo.weights import load_network

RESNET18 = ResNet18_Weights.IMAGENET1K_V1


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of resnet18 that carries its own hash in its name, as published ones do."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(build("resnet18").half().state_dict(), folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    return (folder / "new.pth").rename(folder / f"resnet18-{digest[:8]}.pth")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch's folder of checkpoints, empty and not yet there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _publish_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RESNET18.value, "url", url)


def test_published_weights_are_downloaded_once_and_described(
    published: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with _serving(published.parent) as server:
        _publish_at(f"{server}/{published.name}", monkeypatch)
        network = load_network("resnet18")
    assert [file.name for file in cache.iterdir()] == [published.name]
    again = load_network("resnet18", "ResNet18_Weights.IMAGENET1K_V1")  # nobody serves any more
    assert torch.equal(network.get_parameter("fc.weight"), again.get_parameter("fc.weight"))
    description = describe(network)
    assert description.source == "ResNet18_Weights.IMAGENET1K_V1"
    assert description.source_sha256 == hashlib.sha256(published.read_bytes()).hexdigest()
    assert description.classes is not None
    assert description.classes[:2] == ("tench", "goldfish")
    assert capsys.readouterr().out == ""


def test_a_published_file_given_by_path_keeps_its_classes(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish_at(f"http://127.0.0.1/{published.name}", monkeypatch)
    description = describe(load_network("resnet18", published))
    assert description.source == "ResNet18_Weights.IMAGENET1K_V1"
    assert description.classes == tuple(RESNET18.meta["categories"])


def test_a_download_with_another_hash_leaves_nothing_behind(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resnet18-00000000.pth").write_bytes(b"not what was promised")
    with _serving(tmp_path) as server:
        _publish_at(f"{server}/resnet18-00000000.pth", monkeypatch)
        with pytest.raises(ResourceError, match='invalid hash value \\(expected "00000000"'):
            load_network("resnet18")
    assert list(cache.iterdir()) == []


def test_a_damaged_copy_is_fetched_again_if_that_is_asked_for(
    published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    (cache / published.name).write_bytes(b"junk")
    monkeypatch.setenv("MOMCONV_REFETCH", "1")
    with _serving(published.parent) as server:
        _publish_at(f"{server}/{published.name}", monkeypatch)
        load_network("resnet18")
    assert (cache / published.name).read_bytes() == published.read_bytes()
    load_network("resnet18")  # the copy is whole, and nobody serves any more
    (cache / published.name).write_bytes(b"junk")
    monkeypatch.setenv("MOMCONV_OFFLINE", "1")
    assert _failure("resnet18").kind == "weights.bad_cache"


@pytest.mark.parametrize("gone", ["file", "server"])
def test_an_unreachable_file_comes_with_a_way_out(
    gone: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _serving(tmp_path) as server:
        url = f"{server}/resnet18-f37072fd.pth"
        _publish_at(url, monkeypatch)
        if gone == "file":
            error = _failure("resnet18")
    if gone == "server":
        error = _failure("resnet18")
    reason = {"file": "HTTP Error 404", "server": "Connection refused"}[gone]
    assert error.message.startswith("cannot download ResNet18_Weights.IMAGENET1K_V1\n")
    assert reason in error.message
    assert error.fix is not None
    path = cache / "resnet18-f37072fd.pth"
    assert error.fix == f"curl --create-dirs -o {path} {url}\n--weights FILE"
    assert list(cache.iterdir()) == []


def test_offline_nothing_is_asked_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOMCONV_OFFLINE", "1")
    with _serving(tmp_path) as server:
        _publish_at(f"{server}/resnet18-f37072fd.pth", monkeypatch)
        assert "not asked for, as momconv is --offline" in _failure("resnet18").message
    assert not cache.exists()


def _failure(name: str) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        load_network(name)
    return caught.value


def test_a_cache_that_cannot_be_written_is_a_resource_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file where a folder should be")
    _publish_at("http://127.0.0.1/resnet18-f37072fd.pth", monkeypatch)
    assert _failure("resnet18").kind == "weights.unreachable"


def test_a_damaged_cached_file_is_never_unpickled(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    path = cache / Path(RESNET18.url).name
    path.write_bytes(b"junk")
    monkeypatch.setattr(checkpoints, "read_state", pytest.fail)
    error = _failure("resnet18")
    assert f"the cached file {path} is damaged" in error.message
    assert "expected f37072fd" in error.message
    assert error.fix == f"--refetch\nrm {path}"


@pytest.mark.parametrize("name", ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1", "resnet50"])
def test_unknown_weights_are_answered_with_the_valid_names(name: str) -> None:
    valid = (
        r"valid: DEFAULT \(= IMAGENET1K_V2\), IMAGENET1K_V1 \(76.1 % top-1\), "
        r"IMAGENET1K_V2 \(80.9 % top-1\), a file, or none"
    )
    with pytest.raises(UsageError, match=valid):
        load_network("resnet50", name)


def test_the_cifar_family_has_no_default_weights() -> None:
    with pytest.raises(UsageError, match="weights are a file or none"):
        load_network("cifar_resnet20")


def test_an_unknown_network_is_told_before_its_weights() -> None:
    with pytest.raises(UsageError, match="did you mean resnet50"):
        load_network("resnet5O", "IMAGENET1K_V9")


def test_no_weights_are_random_and_keep_the_preprocessing() -> None:
    network = load_network("resnet50", "none")
    assert describe(network).source == "none"
    assert describe(network).preprocessing.resize == 232


def test_members_of_one_enum_keep_their_own_preprocessing() -> None:
    first = preprocessing_of(ResNet50_Weights.IMAGENET1K_V1)
    second = preprocessing_of(ResNet50_Weights.IMAGENET1K_V2)
    assert (first.resize, second.resize) == (256, 232)


def _save(network: nn.Module, path: Path) -> Path:
    state: dict[str, Any] = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("file", ["net.pth", "net.th", "net.pt", "net.safetensors"])
def test_a_file_decides_the_number_of_classes(tmp_path: Path, file: str) -> None:
    original = build("cifar_resnet20", num_classes=3)
    path = _save(original, tmp_path / file)
    network = load_network("cifar_resnet20", str(path))
    assert describe(network).num_classes == 3
    assert describe(network).classes is None
    assert describe(network).source == file
    assert describe(network).source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize("asked", ["cifar_resnet32", "resnet50"])
def test_weights_of_another_network_are_recognised(tmp_path: Path, asked: str) -> None:
    path = _save(build("cifar_resnet20"), tmp_path / "my weights.pth")
    with pytest.raises(ModelFileError, match="it looks like cifar_resnet20") as caught:
        load_network(asked, path)
    assert caught.value.fix == f"momconv convert cifar_resnet20 --weights '{path}'"


def test_weights_of_no_network_name_the_first_tensors(tmp_path: Path) -> None:
    path = _save(nn.Linear(2, 2), tmp_path / "linear.pth")
    with pytest.raises(ModelFileError, match=r"missing: conv1.weight, .*unexpected: weight, bias"):
        load_network("cifar_resnet20", path)


def test_a_converted_file_is_to_be_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(build("cifar_resnet20").state_dict(), path, metadata={"momconv.schema": "1"})
    with pytest.raises(ModelFileError, match="already converted") as caught:
        load_network("cifar_resnet20", path)
    assert caught.value.kind == "model_file.already_converted"
    assert f"--from {path}" in (caught.value.fix or "")


def test_a_missing_file_is_not_taken_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="file does not exist: nowhere"):
        load_network("resnet18", "nowhere.pth")
    with pytest.raises(ModelFileError, match="file does not exist"):
        load_network("resnet18", tmp_path / "nowhere")

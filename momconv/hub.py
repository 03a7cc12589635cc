"""Publishing a model on the Hugging Face Hub, with what a run wrote beside it.

The library ``huggingface_hub`` knows the user's token, and ``HF_ENDPOINT`` where there is another
hub.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momconv.errors import ResourceError, UsageError
from momconv.exhaustion import is_exhaustion
from momconv.files.model_file import read_description
from momconv.opening import find_model_file
from momconv.zoo.offline import is_offline

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_BESIDE = ("README.md", "config.json", "report.html", "confusion.csv")  # of a run's model
_PICTURES = "plots/*.png"


@dataclass(frozen=True, slots=True)
class Upload:
    """What is published, and where.

    Attributes:
        repo: Its name on the hub, as ``user/name``.
        url: Its address there.
        files: Those on this machine, by their names there.
    """

    repo: str
    url: str
    files: dict[str, Path]


def prepare(model: Path, repo: str, *, report: bool = True) -> Upload:
    """Return what would be uploaded; nothing is.

    Args:
        model: A model file of momconv's, or a run's folder. What lies beside it goes along.
        repo: As ``user/name``.
        report: Whether the page and the pictures do too, which show some of the images.

    Raises:
        UsageError: ``huggingface_hub`` is not installed, or there cannot be such a name.
        ModelFileError: The file is missing, damaged, or no model of momconv's.
    """
    hub = _import()
    model = find_model_file(model)
    read_description(model)
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise UsageError(str(error), kind="usage.bad_repo", fix="user/name") from error
    names = _BESIDE if report else tuple(name for name in _BESIDE if name != "report.html")
    pictures = sorted(model.parent.glob(_PICTURES)) if report else []
    paths = [model, *(model.parent / name for name in names), *pictures]
    files = {p.relative_to(model.parent).as_posix(): p for p in paths if p.is_file()}
    return Upload(repo, f"{_endpoint(hub)}/{repo}", files)


def push(upload: Upload, *, private: bool = False) -> str:
    """Upload, all or nothing, and return the address of what is there then.

    Raises:
        ResourceError: The hub cannot be reached, or refuses.
    """
    hub = _import()
    if is_offline():
        raise _failed(upload, "not asked for, as momconv is --offline")
    operations: list[CommitOperationAdd] = [
        hub.CommitOperationAdd(name, path) for name, path in upload.files.items()
    ]
    api = hub.HfApi(endpoint=_endpoint(hub), library_name="momconv")
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        message = f"Upload {next(iter(upload.files))} with momconv"
        done = api.create_commit(upload.repo, operations, commit_message=message)
    except Exception as error:  # of several libraries, which have no kind of their own in common
        if is_exhaustion(error):
            raise
        raise _failed(upload, " ".join(str(error).split())) from error
    return str(done.commit_url)


def _import() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UsageError(
            "to push a model takes huggingface_hub, which is not installed",
            kind="usage.missing_extra",
            fix="pip install 'momconv[hub]'",
        ) from error
    return huggingface_hub


def _endpoint(hub: Any) -> str:
    return str(hub.constants.ENDPOINT)


def _failed(upload: Upload, reason: str) -> ResourceError:
    return ResourceError(
        f"cannot upload to {upload.url}\n{reason}", kind="hub.failed", fix="hf auth login"
    )

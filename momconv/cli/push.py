"""``momconv push``."""

from typing import Annotated

import typer
from rich.text import Text

from momconv.cli._console import err, out, print_json
from momconv.cli._options import JsonOption, ModelArgument
from momconv.units import format_bytes
from momconv.words import printable


def push(
    *,
    file: ModelArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to, as user/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Let others not see it, if it is new.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="With the page and pictures, which show some images.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded, and stop.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Upload a model, with its card and its page, to the Hugging Face Hub."""
    from momconv.hub import prepare
    from momconv.hub import push as upload_

    upload = prepare(file, repo, report=report)
    url = upload.url
    if not dry_run:
        with err.status(f"uploading to {url}"):
            url = upload_(upload, private=private)
    if json_output:
        files = {name: path.stat().st_size for name, path in upload.files.items()}
        print_json({"ok": True, "uploaded": not dry_run, "url": url, "files": files})
        return
    for name, path in upload.files.items():
        size = format_bytes(path.stat().st_size)
        out.print(Text(f"{printable(name):<32} {size:>10}"), soft_wrap=True)
    what = "would go to" if dry_run else "uploaded to"
    out.print(Text(f"{what} {url}"), soft_wrap=True)

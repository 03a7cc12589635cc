import json
import re

import pytest
from typer.testing import CliRunner

from momconv.cli import app


@pytest.mark.parametrize(
    ("line", "kind", "message", "fix"),
    [
        (
            "finetune --epohcs 3",
            "usage.unknown_option",
            "momconv finetune has no option --epohcs — did you mean --epochs?",
            "momconv finetune --help",
        ),
        ("--nope", "usage.unknown_option", "momconv has no option --nope", "momconv --help"),
        (
            "finetune photos --config c.yaml",
            "usage.unknown_option",
            "momconv finetune has no option --config — did you mean --recipe?",
            "momconv finetune --help",
        ),
        (
            "train photos",
            "usage.unknown_command",
            "momconv has no command train — did you mean finetune?",
            "momconv finetune --help",
        ),
        (
            "upload runs/x",
            "usage.unknown_command",
            "momconv has no command upload — did you mean push?",
            "momconv push --help",
        ),
        (
            "inspct x",
            "usage.unknown_command",
            "momconv has no command inspct — did you mean inspect?",
            "momconv inspect --help",
        ),
        (
            "recipes lss",
            "usage.unknown_command",
            "momconv recipes has no command lss — did you mean ls?",
            "momconv recipes ls --help",
        ),
        (
            "recipes qqq",
            "usage.unknown_command",
            "momconv recipes has no command qqq\ncommands: ls, show, cp",
            "momconv recipes --help",
        ),
        (
            "predict m x --top abc",
            "usage.bad_value",
            "--top: 'abc' is not a valid integer",
            "momconv predict --help",
        ),
        (
            "predict m x --top=0",
            "usage.bad_value",
            "--top: '0' is not greater than or equal to 1",
            "momconv predict --help",
        ),
        (
            "eval m --data x --split foo",
            "usage.bad_value",
            "--split: 'foo' is not one of 'val', 'test', 'train'",
            "momconv eval --help",
        ),
        (
            "predict m",
            "usage.missing_argument",
            "momconv predict: PATH… is missing",
            "momconv predict [OPTIONS] FILE PATH…...",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_a_fix(
    line: str, kind: str, message: str, fix: str
) -> None:
    plain = CliRunner().invoke(app, line.split())
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert plain.stderr == f"error: {message}\nfix: {fix}\n"
    document = CliRunner().invoke(app, [*line.split(), "--json"])
    error = {"code": 2, "kind": kind, "message": message, "hints": [fix]}
    assert (document.exit_code, document.stderr) == (2, "")
    assert json.loads(document.stdout) == {"ok": False, "error": error}


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("-q --json finetune photos", "-q finetune photos --json"),
        ("--lr 3 finetune photos", "finetune photos --lr 3"),
        ("--lr=3 finetune photos", "finetune photos --lr=3"),
        ("recipes --json ls", "recipes ls --json"),
    ],
)
def test_an_option_in_front_of_its_command_is_moved_behind_it(line: str, moved: str) -> None:
    (option,) = {"--json", "--lr"} & {word.split("=")[0] for word in line.split()}
    ran = CliRunner().invoke(app, line.split())
    assert re.search(f"has no option {option}: it goes after (finetune|ls)", ran.output)
    assert f"momconv {moved}" in ran.output


@pytest.mark.parametrize(
    "line", ["models --sort", "finetune a b", "eval m --data=", "-qj4 finetune"]
)
def test_whatever_else_is_wrong_is_told_so_too(line: str) -> None:
    ran = CliRunner().invoke(app, line.split())
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert "╭" not in ran.stderr
    assert json.loads(CliRunner().invoke(app, [*line.split(), "--json"]).stdout)["ok"] is False

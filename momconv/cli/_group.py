"""The commands as a group, whose wrong command lines end as all other errors do."""

import difflib
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from momconv.cli._console import fail
from momconv.errors import MomconvError, UsageError
from momconv.words import abridge, printable, quoted

# Of whatever click Typer brings.
_ParameterError: Any = typer.BadParameter
_CommandLineError: Any = _ParameterError.__mro__[1]
_ClickError: Any = _ParameterError.__mro__[2]

# What other tools call these commands.
_SYNONYMS = {
    "finetune": ("train", "fit", "fine-tune", "tune", "resume"),
    "eval": ("test", "val", "validate", "evaluate", "score"),
    "predict": ("infer", "inference", "classify", "run"),
    "inspect": ("info", "summary"),
    "models": ("list", "ls", "networks"),
    "profile-memory": ("profile", "memory", "estimate-memory", "plan"),
    "push": ("upload", "publish"),
    "doctor": ("checks", "check", "env", "version"),
    "recipes": ("recipe", "config", "cfg"),
}
_BY_SYNONYM = {word: name for name, words in _SYNONYMS.items() for word in words}

# And these options.
_OPTIONS = {
    "--recipe": ("--config", "--cfg"),
    "--resolution": ("--img-size", "--imgsz", "--image-size"),
    "--precision": ("--amp", "--half", "--fp16", "--bf16"),
    "--output": ("--project", "--output-dir"),
}
_BY_OTHER_NAME = {word: name for name, words in _OPTIONS.items() for word in words}


class Commands(TyperGroup):
    """Refuses empty arguments: as a path, what an unset variable leaves were the current folder."""

    def main(
        self,
        args: Sequence[str] | None = None,
        *rest: Any,
        standalone_mode: bool = True,
        **options: Any,
    ) -> Any:
        """Run the command line, and leave the program with its code if it stands alone."""
        words = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False  # so that errors come here
        if not standalone_mode:
            return super().main(words, *rest, **options)
        try:
            code = super().main(words, *rest, **options)
        except typer.Abort:
            code = 1
        except (_ClickError, MomconvError) as error:
            code = _refuse(error, words)
        sys.exit(code if isinstance(code, int) else 0)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options in front of a command."""
        for before, argument in pairwise(["momconv", *args]):
            option = argument.removesuffix("=") if argument.startswith("--") else argument
            if not argument or option != argument:
                raise UsageError(f"what follows {option or before} is empty", kind="usage.empty")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that ``args`` begin with."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name.lower(), self.commands, n=1)
            meant = _BY_SYNONYM.get(name.lower()) if "finetune" in self.commands else None
            if meant := meant or next(iter(near), None):
                hint = f" — did you mean {meant}?"
            else:
                hint = f"\ncommands: {', '.join(self.commands)}"
            shown = abridge(printable(name), 80)
            raise UsageError(
                f"{ctx.command_path} has no command {shown}{hint}",
                kind="usage.unknown_command",
                fix=f"{ctx.command_path} {meant or ''} --help".replace("  ", " "),
            )
        return super().resolve_command(ctx, args)


def _refuse(error: Any, words: Sequence[str]) -> int:
    """Tell what is wrong with a command line, and return the code to exit with."""
    if type(error).__name__ == "NoArgsIsHelpError":  # which has printed it
        return 2
    wrong = error if isinstance(error, MomconvError) else _explain(error, words)
    return fail(wrong, as_json="--json" in words)


def _explain(error: Any, words: Sequence[str]) -> UsageError:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "momconv"
    help_ = f"{command} --help"
    if hasattr(error, "possibilities"):
        return _explain_option(error, words, command)
    if hasattr(error, "param_type"):
        usage = " ".join(error.ctx.command.collect_usage_pieces(error.ctx))
        name = _name(error.param)
        return UsageError(
            f"{command}: {name} is missing",
            kind="usage.missing_argument",
            fix=f"{command} {usage.replace('{', '').replace('}', '')}",
        )
    if getattr(error, "param", None) is not None:
        return UsageError(_explain_value(error, words), kind="usage.bad_value", fix=help_)
    text = abridge(printable(error.format_message().strip().rstrip(".")), 800)
    return UsageError(f"{text[:1].lower()}{text[1:]}", kind="usage.command_line", fix=help_)


def _explain_option(error: Any, words: Sequence[str], command: str) -> UsageError:
    """Return the error for an option that ``command`` does not have."""
    option, fix = error.option_name, f"{command} --help"
    known = [flag for param in error.ctx.command.params for flag in param.opts]
    meant = _BY_OTHER_NAME.get(option)
    if meant not in known:
        meant = _find_alike(option, known)
    hint = f" — did you mean {meant}?" if meant else ""
    program, commands = error.ctx.find_root().info_name, getattr(error.ctx.command, "commands", {})
    later = next((word for word in words if word in commands), None)
    if later and (moved := _move_back(option, words, commands[later])):
        hint, fix = f": it goes after {later}", f"{program} {shlex.join(moved)}"
    message = f"{command} has no option {abridge(printable(option), 80)}{hint}"
    return UsageError(message, kind="usage.unknown_option", fix=fix)


def _find_alike(option: str, known: Iterable[str]) -> str | None:
    """Return the option most like ``option``, if one is; dashes make no likeness."""
    names = {flag.lstrip("-"): flag for flag in known}
    near = difflib.get_close_matches(option.lstrip("-"), names, n=1)
    return names[near[0]] if near else None


def _move_back(option: str, words: Sequence[str], command: Any) -> list[str] | None:
    """Return ``words`` with an option of ``command`` at their end; None if it has no such."""
    param = next((param for param in command.params if option in param.opts), None)
    first = next((n for n, word in enumerate(words) if word.split("=", 1)[0] == option), None)
    if param is None or first is None:  # it is not there, or among other letters of one word
        return None
    end = first + (1 if param.is_flag or "=" in words[first] else 2)
    return [*words[:first], *words[end:], *words[first:end]]


def _explain_value(error: Any, words: Sequence[str]) -> str:
    """Return what is wrong with the value of an option or argument, which pydantic has read."""
    reason = error.message.removeprefix("Value error, ").split(", unable to")[0].rstrip(".")
    pairs = [*pairwise(words), *(word.split("=", 1) for word in words if "=" in word)]
    values = [value for option, value in pairs if option in error.param.opts]
    if values and reason.startswith("Input should be"):
        reason = f"{quoted(values[-1])} is not{reason.removeprefix('Input should be')}"
    return f"{_name(error.param)}: {abridge(reason, 800)}"


def _name(param: Any) -> str:
    """Return how a parameter is typed."""
    return str(param.opts[0] if param.param_type_name == "option" else param.display_name_raw)

"""
The command line: assembles the commands, and turns what fails into one line. Never imports torch.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failure with one clear line, 2 usage.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from typing import Annotated

import typer

from fpo.commands.align import align_command
from fpo.commands.cache import cache_command
from fpo.commands.compare import compare_command
from fpo.commands.data import data_command
from fpo.commands.evaluate import evaluate_command
from fpo.commands.features import features_command
from fpo.commands.generate import generate_command
from fpo.commands.judge import judge_command
from fpo.commands.merge import merge_command
from fpo.commands.schema import schema_command
from fpo.commands.store import store_app
from fpo.errors import FpoError

app = typer.Typer(
    help="Offline preference optimisation with sparse features: run the reference once, cache it, train from it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("data")(data_command)
app.command("cache")(cache_command)
app.command("align")(align_command)
app.command("evaluate")(evaluate_command)
app.command("compare")(compare_command)
app.command("features")(features_command)
app.command("generate")(generate_command)
app.command("judge")(judge_command)
app.command("merge")(merge_command)
app.command("schema")(schema_command)
app.add_typer(store_app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fpo {version('fpo')}")
        raise typer.Exit()


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """
    Run the command line. Whatever fails is one line and exit code 1; FPO_DEBUG=1 leaves what was not expected to
    Python, which prints its traceback.
    """
    try:
        app()
    except FpoError as error:
        print(_expected(error), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FPO_DEBUG"):
            raise
        print(f"error: {_unexpected(error)}", file=sys.stderr)
        sys.exit(1)


def _expected(error: FpoError) -> str:
    """What the error says; names in it may be a stranger's."""
    from fpo.store import printable

    return "\n".join(printable(line, 10_000) for line in f"error: {error}".split("\n"))


def _unexpected(error: Exception) -> str:
    """One line about a failure that no command expects, and where its traceback is."""
    said = " ".join(str(error).split())[:300]
    # safetensors wraps what the disk says in an error of its own.
    if isinstance(error, OSError) or type(error).__module__.startswith("safetensors"):
        what = f"{said or type(error).__name__}; mend that and give the same command again"
    else:
        what = f"this is a bug, or a case that fpo does not know: {type(error).__name__}: {said}"
    return f"{what}; the traceback is {_kept_traceback(error)}"


def _kept_traceback(error: Exception) -> str:
    """Where it lies; a temporary folder can be written where a home cannot."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fpo-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.writelines([f"{shlex.join(sys.argv)}\n", *traceback.format_exception(error)])
    except OSError:
        return "shown with FPO_DEBUG=1"
    return f"in {file.name}"

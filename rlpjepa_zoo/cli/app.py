"""The command `rlpjepa`: its sub-commands, exit codes and logging. Results go to stdout, progress and log to stderr, an error is one line.

Commands import what they need when they run, so `--help` answers within half a second.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from typing import Annotated, Any

import typer

from ..errors import OutputError, UsageError, ZooError
from . import bench, embed, evaluate, hub, train, zoo
from .options import with_imports
from .terminal import ReaderGone, results_on_stdout, set_up, show_error, show_traceback

app = typer.Typer(
    name="rlpjepa", help="Sparse, non-negative image embeddings of a density you choose (Rectified LpJEPA on timm).",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for function, name in (
    (train.demo, "demo"),
    (with_imports(train.check), "check"),
    (with_imports(train.train), "train"),
    (with_imports(train.finetune), "finetune"),
    (with_imports(embed.embed), "embed"),
    (with_imports(embed.dial), "dial"),
    (with_imports(evaluate.predict), "predict"),
    (with_imports(evaluate.evaluate), "eval"),
    (with_imports(evaluate.report), "report"),
    (hub.list_, "list"),
    (with_imports(hub.card), "card"),
    (with_imports(hub.push), "push"),
    (with_imports(hub.export), "export"),
):
    app.command(name=name)(function)
app.add_typer(bench.bench_app, name="bench")
app.add_typer(zoo.zoo_app, name="zoo")

_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"rlpjepa_zoo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also accepted after the command).")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")] = False,
) -> None:
    pass


def _invoke(arguments: list[str]) -> int:
    """Run one command line without error handling. click's own `main` would end a process whose pipe was closed with exit code 1."""
    command = typer.main.get_command(app)
    with results_on_stdout():
        try:
            with command.make_context("rlpjepa", [*arguments]) as context:
                command.invoke(context)
        except typer.Exit as end:
            return end.exit_code
        except _ClickError as error:
            if type(error).__name__ != "NoArgsIsHelpError":
                raise
            print(error.format_message())
            return UsageError.exit_code
        return 0


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code (see `rlpjepa_zoo.errors`)."""
    debug = "--debug" in arguments
    try:
        return _invoke([a for a in arguments if a != "--debug"])
    except (KeyboardInterrupt, typer.Abort):
        show_error("interrupted")
        return 130
    except ReaderGone:
        return 141
    except Exception as error:
        if isinstance(error, _ClickError):
            command = error.ctx.command_path if getattr(error, "ctx", None) else "rlpjepa"
            show_error(error.format_message(), f"see {command} --help")
            return UsageError.exit_code
        if debug:
            raise
        if isinstance(error, ZooError):
            show_error(str(error))
            return error.exit_code
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            show_error(f"{error.filename or 'output'}: disk full")
            return OutputError.exit_code
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # a path that was given, at any check of it
            show_error(f"{error.filename}: {error.strerror}")
            return UsageError.exit_code
        show_traceback()
        show_error(f"{type(error).__name__}: {error}", "this is a bug of rlpjepa_zoo, please report it with the lines above")
        return ZooError.exit_code


def main() -> None:
    """Entry point of `rlpjepa`: configure output, run the command line, exit with its code."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our log reports its retries, one line each
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that `bench loss` uses logs each start on stderr
    set_up()
    if "--quiet" in sys.argv or "--json" in sys.argv or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = run(sys.argv[1:])
    if any(thread.name == hub.PUSH_THREAD for thread in threading.enumerate()):
        # The Hub does not answer. A normal exit would wait for the threads of its client.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

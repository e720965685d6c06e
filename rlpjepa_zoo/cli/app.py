"""The command `rlpjepa`: its sub-commands, exit codes and logging. Results go to stdout, progress and log to stderr, an error is one line.

Commands import what they need when they run, so `--help` answers within half a second.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Annotated

import typer

from ..errors import OutputError, ZooError
from . import embed, evaluate, hub, train

app = typer.Typer(
    name="rlpjepa", help="Sparse, non-negative image embeddings of a density you choose (Rectified LpJEPA on timm).",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for function, name in (
    (train.demo, "demo"),
    (train.check, "check"),
    (train.train, "train"),
    (train.finetune, "finetune"),
    (embed.embed, "embed"),
    (embed.dial, "dial"),
    (evaluate.predict, "predict"),
    (evaluate.evaluate, "eval"),
    (evaluate.report, "report"),
    (hub.list_, "list"),
    (hub.card, "card"),
    (hub.push, "push"),
    (hub.export, "export"),
    (evaluate.bench, "bench"),
):
    app.command(name=name)(function)
app.add_typer(hub.zoo_app, name="zoo")


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


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code (see `rlpjepa_zoo.errors`)."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    click_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        outcome = typer.main.get_command(app).main(arguments, prog_name="rlpjepa", standalone_mode=False)
        sys.stdout.flush()
        if outcome == 130:  # typer returns this for Ctrl-C
            raise KeyboardInterrupt
        return outcome if isinstance(outcome, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe; print nothing more at exit
        return 141
    except Exception as error:
        if debug and not isinstance(error, click_error):
            raise
        if isinstance(error, ZooError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, click_error):
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())  # type: ignore[attr-defined]
                return 2
            return _fail(f"{error.format_message()} (see rlpjepa --help)", 2)  # type: ignore[attr-defined]
        if type(error).__name__ == "Abort":
            return _fail("interrupted", 130)
        if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
            return _fail(f"{error.filename or 'output'}: disk full", OutputError.exit_code)
        import traceback

        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}; this is a bug of rlpjepa_zoo, please report it with the lines above", 70)


def main() -> None:
    """Entry point of `rlpjepa`: configure logging, run the command line, exit with its code."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our log reports its retries, one line each
    if "--quiet" in sys.argv or "--json" in sys.argv or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("rlpjepa_zoo")
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False
    code = run(sys.argv[1:])
    if any(thread.name == hub.PUSH_THREAD for thread in threading.enumerate()):
        # The Hub does not answer. A normal exit would wait for the threads of its client.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

"""``pretrain``: read the command line, then run the command where ``launch=`` says."""

import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from data.fault import Fault, Notice
from data.files import denied
from data.redaction import redacted
from launch import failures, ranks
from launch.launcher import Launcher, run_here
from launch.sweeping import run_sweep
from pretrain import cli
from pretrain.run.launched import rank
from pretrain.settings import plugins
from pretrain.settings.sweeps import Sweep


def say_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of a defect of ours, as Python prints it, without what is private in a URL; for
    ``sys.excepthook``."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def show_warning(
    message: Warning | str,
    kind: type[Warning],
    file: str,
    number: int,
    stream: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A notice is a line; another program's warning is what Python makes of it. For ``warnings.showwarning``."""
    text = (
        str(message)
        if issubclass(kind, Notice)
        else warnings.formatwarning(message, kind, file, number, line).rstrip("\n")
    )
    print(redacted(text), file=stream or sys.stderr)


def run_command_line(arguments: list[str]) -> None:
    """Run one command line; a Fault ends it with one line and its exit code (1, or 2 for a mistake of the command
    line), Ctrl-C with 130."""
    try:
        ranks.settle()
        composed = cli.parse(arguments)
        if composed is None:
            sys.stdout.flush()
            return
        if isinstance(composed, Sweep):
            run_sweep(composed)
        elif composed.launch:
            plugins.build(composed.launch, base=Launcher).launch(composed)
        else:
            run_here(composed)
        sys.stdout.flush()
    except Fault as fault:
        failures.record(fault)
        cli.fail(fault)
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("pretrain: stopped; the same command continues.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and (said := denied(error)):
            failures.record(said)
            cli.fail(said)
        file = failures.record(error)
        if file is None or not failures.is_consequence(error):
            raise
        # Somebody else's traceback is the one to read; whoever started the ranks shows it.
        print(
            f"pretrain: rank {rank()} stopped because another did; what broke here is in {file}",
            file=sys.stderr,
        )
        sys.exit(1)

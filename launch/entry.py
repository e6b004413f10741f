"""``pretrain``: read the command line, then run the command where ``launch=`` says."""

import importlib
import os
import sys

from data.fault import Fault
from pretrain import cli
from pretrain.settings import stem


def main(arguments: list[str]) -> None:
    """Run one command line; a Fault ends it with one line and exit code 1, Ctrl-C with 130."""
    try:
        composed = cli.parse(arguments)
        if composed is None:
            sys.stdout.flush()
            return
        config = composed.object()
        importlib.import_module(f"pretrain.commands.{stem(composed.command)}").run(config)
        sys.stdout.flush()
    except Fault as fault:
        cli.fail(fault)
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("pretrain: stopped; the same command continues.", file=sys.stderr)
        sys.exit(130)

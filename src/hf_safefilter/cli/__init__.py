"""The command line, `hf-safefilter`. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__
from ..errors import SafefilterError, readable
from . import align, choose, demo, estimate, fit, mechanism, monitor, publish, report, score, shards, validate


class _Parser(argparse.ArgumentParser):
    """Usage errors end with exit code 1: 2 means that the work failed."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="hf-safefilter",
        description="Find the harmless-looking fine-tuning rows that would make an aligned chat model stop refusing.",
        epilog="exit codes: 0 ok, 1 usage or bad input, 2 failed or could not evaluate, 3 a safety threshold was crossed",
    )
    parser.add_argument("--version", action="version", version=f"hf-safefilter {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, for machines")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for module in (demo, estimate, score, shards, fit, choose, report, publish, monitor, align, validate, mechanism):
        module.add_commands(commands, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.quiet:
            _silence()
        return args.run(args)
    except SafefilterError as error:
        return _failed(args, str(error), error.exit_code)
    except OSError as error:  # a folder that cannot be written, a full disk
        return _failed(args, f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    except KeyboardInterrupt:
        return _failed(args, "interrupted", 130)
    except Exception as error:
        return _failed(args, f"unexpected {type(error).__name__}: {error} (--debug shows where)", 2)


def _failed(args: argparse.Namespace, message: str, exit_code: int) -> int:
    if args.debug:
        raise  # noqa: PLE0704  # called from an except block only
    print(f"hf-safefilter: error: {readable(' '.join(message.split()))}", file=sys.stderr)
    return exit_code


def _silence() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

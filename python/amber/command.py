"""What the commands share: exit codes (0 done, 1 failure, 2 usage, 130 interrupted), messages."""

import argparse
import sys
from collections.abc import Callable, Sequence

from .errors import AmberError, ArgumentError

INTERRUPTED = 130


class UsageError(Exception):
    """A command line that cannot be meant."""


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Runs a command and turns what it raises into a message and an exit code."""
    try:
        return run(parser.parse_args(argv))
    except (UsageError, ArgumentError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except (AmberError, OSError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1

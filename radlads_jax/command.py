"""A command line of absl flags whose mistakes, like every refusal, end in one paragraph and exit code 1."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from rich.console import Console

from radlads_jax import storage

EXIT_FAILED = 1


def run(define: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]) -> NoReturn:
    """Defines a module's flags, reads the command line and runs main.

    To be called where the module is __main__: modules that are imported define no flags, so that two of them may have
    one of the same name.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    define(flags.FLAGS)
    app.run(lambda _: sys.exit(guarded(main, flags.FLAGS)), flags_parser=parsed)
    raise AssertionError("app.run does not return")


def parsed(argv: list[str]) -> list[str]:
    """absl's reading of the command line; arguments that are no flags are refused."""
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(f"got the argument {rest[0]!r}; expected flags alone. Write it as --name=value.")
    except (flags.Error, ValueError) as error:
        sys.exit(refuse(error))
    if flags.FLAGS["verbosity"].using_default_value:
        # The libraries tell much about every checkpoint.
        logging.set_verbosity(logging.WARNING)
    return argv


def guarded(main: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> int:
    """Runs main; returns the exit code."""
    try:
        main(values)
    except (ValueError, NotImplementedError, OSError) as error:
        return refuse(error)
    except storage.access_errors() as error:
        return refuse(error)
    return 0


def refuse(error: Exception) -> int:
    """Prints the error as one paragraph; --verbosity=1 shows where it was raised."""
    text = " ".join(str(error).split())
    Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    logging.debug("where it was raised", exc_info=True)
    return EXIT_FAILED

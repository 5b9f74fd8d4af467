"""A command line of absl flags whose mistakes, like every refusal, end in one paragraph and exit code 1.

Where a network or a service does not answer the code is 75, sysexits.h's EX_TEMPFAIL: the same command may succeed.
"""

import difflib
import functools
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.system import outage, storage
from radlads_jax.system.stopping import leave_on_signals, leave_with_readers, outlive_readers
from radlads_jax.system.untrusted import brief

EXIT_FAILED, _EXIT_OUTAGE = 1, 75
_HELP = re.compile(r"--?(\?|help(short|full|xml)?)(=.*)?")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


_Main = Callable[[flags.FlagValues], int | None]


def run(
    define: Callable[[flags.FlagValues], None], main: _Main, *, config: str | None = None, writes: bool = False
) -> NoReturn:
    """Defines a module's flags, reads the command line and runs main, which may return an exit code.

    To be called where the module is __main__: modules that are imported define no flags, so that two of them may have
    one of the same name.
    config: what --config is, of a command that reads one. Such a command works for minutes in compiled code, where
    Python hears no Ctrl-C: a signal ends it at once.
    writes: it works for the files that it writes, and goes on when nobody reads what it prints.
    """
    leave_with_readers()
    define(flags.FLAGS)
    if config is not None:
        # The flag is the module's, whose help has it.
        flags.disclaim_key_flags()
        config_flags.DEFINE_config_file("config", None, config)
        leave_on_signals()

    def begin(_: list[str]) -> NoReturn:
        if writes:
            outlive_readers()
        sys.exit(guarded(main, flags.FLAGS))

    app.run(begin, flags_parser=functools.partial(_flags_alone, _read if config is None else parse_flags))
    raise AssertionError("app.run does not return")


def _flags_alone(read: Callable[[list[str]], list[str]], argv: list[str]) -> list[str]:
    """Reads the command line; arguments that are no flags are refused."""
    try:
        rest = read(argv)[1:]
        if rest:
            raise ValueError(f"got the argument {rest[0]!r}; expected flags alone. Write it as --name=value.")
    except (flags.Error, ValueError) as error:
        sys.exit(refuse(error))
    _quieten()
    return argv


def _read(argv: list[str]) -> list[str]:
    """What is left of the command line behind absl's flags; --help ends the process with 0, as elsewhere."""
    # Last, so that --config is read before.
    words = sorted(argv, key=lambda word: bool(_HELP.fullmatch(word)))
    try:
        return flags.FLAGS(words)
    except SystemExit:
        # absl's help leaves with 1. A config file may leave too, with a code of its own.
        if not _HELP.fullmatch(words[-1]):
            raise
        _print_fields(flags.FLAGS["config"].value if "config" in flags.FLAGS else None)
        sys.exit(0)


def _print_fields(config: ConfigDict | None) -> None:
    """A config file's fields, as the command line takes them."""
    if config is not None:
        print("\nfields of --config (configs/README.md says more):")
        for name, value in _flat(config.to_dict(), "config"):
            print(f"  --{name}: {value}")


def _flat(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield from _flat(value, f"{where}.{name}") if isinstance(value, dict) else [(f"{where}.{name}", value)]


def _quieten() -> None:
    if flags.FLAGS["verbosity"].using_default_value:
        # The libraries tell much about every checkpoint.
        logging.set_verbosity(logging.WARNING)


def guarded(main: _Main, values: flags.FlagValues) -> int:
    """Runs main; returns the exit code."""
    try:
        return main(values) or 0
    except refusals() as error:
        return refuse(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped by SIGINT.", style="yellow", highlight=False)
        return 128 + signal.SIGINT


def refusals(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What ends a command in one paragraph: what is wrong or can not be, what cannot be read or written, and others."""
    return (NotImplementedError, *storage.access_errors(), *others)


def refuse(error: Exception | str, said: str | None = None) -> int:
    """Prints the error as one paragraph; returns the exit code. --verbosity=1 shows where it was raised.

    said: in the place of what it says itself.
    """
    text = " ".join((said or str(error)).split())
    Console(stderr=True).print(
        f"error: {text}", style="red", markup=False, emoji=False, highlight=False, soft_wrap=True
    )
    logging.debug("where it was raised", exc_info=True)
    return _EXIT_OUTAGE if isinstance(error, Exception) and outage.is_outage(error) else EXIT_FAILED


def parse_flags(argv: list[str]) -> list[str]:
    """absl's reading of the command line, but that a mistake there or in the config file is one paragraph."""
    try:
        for override in filter(None, map(_OVERRIDE.match, argv[1:])):
            config_lib.check_override(override[1], override[2])
        words = [_with_home(word) for word in argv]
        _require_config_file(words)
        positional = _read(words)
    except SyntaxError as error:
        sys.exit(refuse(error, f"{error.filename}, line {error.lineno}: {error.msg}"))
    # A locked ConfigDict raises AttributeError or KeyError for a field that it lacks, TypeError for a value's type; a
    # config file of one's own the others.
    except (flags.Error, ValueError, OSError, AttributeError, LookupError, TypeError, ImportError, NameError) as error:
        sys.exit(refuse(error, _explain(error)))
    _quieten()
    return positional


def _with_home(word: str) -> str:
    """--config=~/my.py, of which a shell leaves the tilde as it is."""
    flag, _, value = word.partition("=")
    return f"{flag}={storage.whole_name(value)}" if flag in ("--config", "-config") and value.startswith("~") else word


def _require_config_file(words: list[str]) -> None:
    """Raises ValueError where --config names no file."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, has_value, value = word.partition("=")
        name = (value if has_value else following).partition(":")[0]
        file = pathlib.Path(name)
        if flag not in ("--config", "-config") or not name or file.is_file():
            continue
        beside = [other.name for other in file.parent.glob("*.py")]
        meant = [str(file.with_name(other)) for other in difflib.get_close_matches(file.name, beside, 1)]
        raise ValueError(
            f"--config is {brief(name)}, which {'is a directory' if file.is_dir() else 'does not exist'}; expected a "
            f"Python file with a function get_config, such as {(meant or ['configs/convert.py'])[0]}. Correct the path."
        )


def _explain(error: BaseException) -> str:
    """The message of an error in reading the configuration; with file and line, if the config file raised it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AttributeError) and cause.name == "get_config":
            return "the file of --config has no function get_config; expected one, as configs/convert.py has. Add it."
        frames = [
            frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name in ("get_config", "<module>")
        ]
        if frames:
            return f"{frames[-1].filename}, line {frames[-1].lineno}: {_message(cause)}"
        cause = cause.__context__
    return _message(error)


def _message(error: BaseException) -> str:
    """An error's last line: ml_collections puts tracebacks and lists of all fields before it, and nests errors."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    is_lookup = isinstance(error, AttributeError | KeyError)
    # str() of a KeyError is a quoted repr, with its line ends escaped.
    lines = str(error.args[0] if is_lookup and error.args else error).split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)
    return f"no such field: {last}" if is_lookup else last

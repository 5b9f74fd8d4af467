"""The whole way from a teacher to an exported student, or from where an earlier run of the same command stopped.

python -m radlads_jax.launch --config configs/demo.py --workdir runs/demo [--config.stage1.tokens=200000 ...]
"""

import dataclasses
import functools
import json
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax import fields
from radlads_jax.run.settings import with_whole_paths
from radlads_jax.system import huge_pages, storage
from radlads_jax.system.command import explain, parse_flags, refuse
from radlads_jax.system.stopping import leave_on_signals, outlive_readers

_CONFIG = config_flags.DEFINE_config_file("config", None, "A Python file with get_config(arg), e.g. configs/demo.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the export go; made when missing.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "off", ["off", "auto"], "auto: one of a cluster's hosts, found by itself."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes run as one.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_PREFLIGHT_ONLY = flags.DEFINE_bool("preflight_only", False, "Stop after the checks before the run.")
flags.DEFINE_alias("preflight-only", "preflight_only")
_FORCE = flags.DEFINE_bool("force", False, "Begin although one of these checks found a problem.")

# What may differ between a run and its continuation: none of it changes the result, but for the rounding of sums.
_SAMPLES = ("sample_prompts", "sample_tokens")
_FREE_OF_TRAIN = ("log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "wandb_project", *_SAMPLES)
FREE_FIELDS = (*_FREE_OF_TRAIN, "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "accumulate", "remat")
# Where a run that knows what it depends on by contents may find the same elsewhere.
PATH_FIELDS = ("teacher.path", "teacher.revision", "data.path", "data.revision", "data.tokenizer")
EXIT_STOPPED = 128
# What switches of the student were before they were true, false or none.
_FORMER_SWITCHES = {"": None, "on": True, "off": False}


def main(argv: list[str], join: Callable[[], None] = lambda: None) -> int:
    """Returns the exit code: 0 done, 1 refused or failed, 128 + signal when stopped by one (start it again).

    join: makes this process one of several, once the settings are known to be sound.
    """
    try:
        if len(argv) > 1:
            raise ValueError(
                f"got the argument {argv[1]!r}; expected flags alone. Write settings as --config.name=value."
            )
        if _WORKDIR.value is None or _CONFIG.value is None:
            raise ValueError(
                "expected --config FILE and --workdir DIR, e.g. --config configs/demo.py --workdir runs/demo."
            )
        workdir = storage.as_path(_WORKDIR.value)
        keep_begun_rules(workdir, _CONFIG.value)
        run = with_whole_paths(config_lib.validate(_CONFIG.value))
        settings = run.settings()
        storage.require_writable(workdir)
        check_same_config(workdir, settings)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        return refuse(explain(error))
    except storage.access_errors() as error:
        return refuse(error)
    # Imported late: the models and their compiler take seconds that a typo should not.
    try:
        from radlads_jax.run import preflight
        from radlads_jax.run.job import make_job
        from radlads_jax.run.train import Interrupted, TooManyNonFinite, convert
        from radlads_jax.system import backend, hosts, process_memory
        from radlads_jax.system.workdir import held
    # A variable for jax whose value is none.
    except ValueError as error:
        return refuse(error)

    process_memory.install()
    try:
        join()
        backend.require()
        hosts.require_same(flat_settings(_CONFIG.value.to_dict()))
        with held(workdir):
            job = make_job(run, workdir)
            teacher = preflight.check(job, force=_FORCE.value, whole=_PREFLIGHT_ONLY.value)
            if _PREFLIGHT_ONLY.value:
                return 0

            @functools.cache
            def begun() -> None:
                # Only now: a run that could not begin leaves the directory to the corrected command.
                if hosts.is_first():
                    remember_config(workdir, settings)

            convert(job, teacher, begun)
    except Interrupted as stop:
        Console(stderr=True).print(str(stop), style="yellow", markup=False, emoji=False, soft_wrap=True)
        return EXIT_STOPPED + stop.signum
    except (ValueError, NotImplementedError, TooManyNonFinite, OSError) as error:
        return refuse(error)
    except storage.access_errors() as error:
        return refuse(error)
    return 0


def join_hosts() -> None:
    """Joins the other hosts' processes, if the flags ask for it."""
    from radlads_jax.system import hosts

    hosts.start(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def keep_begun_rules(workdir: storage.AnyPath, config: ConfigDict) -> None:
    """Gives fields that follow others by a rule what DIR's run began with, whose version may have had another rule."""
    begun = begun_settings(workdir)
    for name, (group, field) in fields.following(config).items():
        if name in begun:
            group[field] = begun[name]


def begun_settings(workdir: storage.AnyPath) -> dict[str, Any]:
    """Every setting of DIR/config.json by its name, as this version writes them; empty where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    settings = flat_settings(_with_whole_paths(json.loads(storage.read_text(path))))
    for name, hint in typing.get_type_hints(config_lib.Student).items():
        setting = f"config.student.{name}"
        if hint == bool | None and settings.get(setting) in ("", "on", "off"):
            settings[setting] = _FORMER_SWITCHES[settings[setting]]
    return settings


def check_same_config(workdir: storage.AnyPath, config: dict) -> None:
    """Raises ValueError where DIR belongs to a run with other settings; what it did not know yet had its default."""
    begun = begun_settings(workdir)
    if not begun:
        return
    defaults = config_lib.defaults().to_dict()
    known, given = (flat_settings(json.loads(json.dumps(settings))) for settings in (defaults, config))
    old, new = known | begun, known | given
    free = (*FREE_FIELDS, *(PATH_FIELDS if (workdir / "fingerprint.json").exists() else ()))
    names = [n for n in sorted(old.keys() | new.keys()) if not n.endswith(tuple(f".{f}" for f in free))]
    changed = [f"{n} was {old.get(n)!r} and is now {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run with other settings: {'; '.join(changed[:10])}. Repeat its settings to continue "
            "it, or choose another --workdir."
        )


def _with_whole_paths(settings: dict) -> dict:
    """Stored settings, whose paths an earlier version kept as they were typed."""
    teacher, data = settings.get("teacher", {}), settings.get("data", {})
    known = {name: data[name] for name in ("source", "path", "tokenizer") if name in data}
    run = config_lib.RunConfig(teacher=config_lib.Teacher(teacher.get("path", "")), data=config_lib.Data(**known))
    whole = dataclasses.asdict(with_whole_paths(run))
    changed = {"teacher": teacher | {"path": whole["teacher"]["path"]}} if "path" in teacher else {}
    return settings | changed | ({"data": data | {name: whole["data"][name] for name in known}} if known else {})


def remember_config(workdir: storage.AnyPath, config: dict) -> None:
    """Writes DIR/config.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write_text(workdir / "config.json", json.dumps(config, indent=2) + "\n")


def flat_settings(settings: dict, where: str = "config") -> dict[str, Any]:
    """Every setting by its name, "config.stage1.lr"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{where}.{key}"
        flat |= flat_settings(value, name) if isinstance(value, dict) else {name: value}
    return flat


def command_line() -> NoReturn:
    """What `python -m radlads_jax.launch` does, from its flags to its exit code."""
    huge_pages.restart_with()
    # `--help | head` ends quietly.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    leave_on_signals()
    app.run(lambda argv: sys.exit(_begun(argv)), flags_parser=parse_flags)
    raise AssertionError("app.run does not return")


def _begun(argv: list[str]) -> int:
    outlive_readers()
    return main(argv, join_hosts)


if __name__ == "__main__":
    command_line()

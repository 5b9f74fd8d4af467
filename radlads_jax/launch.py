"""The whole way from a teacher to an exported student, or from where an earlier run of the same command stopped.

python -m radlads_jax.launch --config configs/demo.py --workdir runs/demo [--config.stage1.tokens=200000 ...]
"""

import functools
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.run import settings as settings_lib
from radlads_jax.system import huge_pages, storage
from radlads_jax.system.command import parse_flags, refusals, refuse
from radlads_jax.system.stopping import Interrupted, leave_on_signals, outlive_readers

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A Python file with get_config(arg), e.g. configs/demo.py. Beside --help: its fields."
)
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

_EXIT_STOPPED = 128
_LESS_MEMORY = (
    "Set config.<stage>.accumulate=0 and config.<stage>.remat=full, or config.optim.moment_dtype=bfloat16, lower "
    "config.train.eval_batch_size, or split it over more devices: config.mesh.fsdp, config.mesh.tensor."
)


def main(argv: list[str], join: Callable[[], None] = lambda: None) -> int:
    """Returns the exit code: 0 done, 1 refused or failed, 128 + signal when stopped by one (start it again).

    75 where a network or a service did not answer (start it again). An error of one of several processes ends all.
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
        settings_lib.keep_begun_rules(workdir, _CONFIG.value)
        run = settings_lib.with_whole_paths(config_lib.validate(_CONFIG.value))
        settings = run.settings()
        storage.require_writable(workdir)
        settings_lib.check_same_config(workdir, settings)
        # Imported late: the models and their compiler take seconds that a typo should not.
        from radlads_jax.run import preflight, softmax_layers
        from radlads_jax.run.display import say
        from radlads_jax.run.job import make_job
        from radlads_jax.run.teacher_weights import TeacherWeights
        from radlads_jax.run.train import TooManyNonFinite, convert
        from radlads_jax.system import backend, failing, hosts, process_memory
        from radlads_jax.system.workdir import held
    # Also a variable for jax whose value is none.
    except refusals() as error:
        return refuse(error)

    process_memory.install()
    try:
        join()
        backend.require()
        hosts.require_same({"--workdir": str(workdir)} | settings_lib.flat_settings(_CONFIG.value.to_dict()))
        with held(workdir), backend.room_for("the run does", _LESS_MEMORY):
            job = make_job(run, workdir)
            teacher = TeacherWeights(job)
            # Once more, for until now another process may have trained here.
            changed = settings_lib.check_same_config(workdir, settings)
            if changed:
                say(f"goes on with other settings of what has not begun: {'; '.join(changed)}")
            whole = _PREFLIGHT_ONLY.value or bool(hosts.agreed(int(bool(changed))))
            preflight.check(job, teacher, force=_FORCE.value, whole=whole)
            if _PREFLIGHT_ONLY.value:
                return 0

            @functools.cache
            def begun() -> None:
                # Only now: a run that could not begin leaves the directory to the corrected command.
                if hosts.is_first():
                    settings_lib.remember_config(workdir, settings)

            job = softmax_layers.decide(job, teacher)
            convert(job, teacher, begun)
            # The others stay until the first one has written its pages.
            hosts.barrier()
    except Interrupted as stop:
        Console(stderr=True).print(str(stop), style="yellow", markup=False, emoji=False, soft_wrap=True)
        return _EXIT_STOPPED + stop.signum
    except refusals(TooManyNonFinite) as error:
        return failing.end_all(refuse(error))
    return 0


def _join_hosts() -> None:
    """Joins the other hosts' processes, if the flags ask for it."""
    from radlads_jax.system import hosts

    hosts.start(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


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
    return main(argv, _join_hosts)


if __name__ == "__main__":
    command_line()

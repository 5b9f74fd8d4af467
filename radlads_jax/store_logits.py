"""Writes what a teacher says of a run's tokens, once, so that stage 2 of any student reads it in the teacher's place.

python -m radlads_jax.store_logits --config configs/convert.py --config.teacher.path=Qwen/Qwen2.5-7B-Instruct
    --config.data.source=binidx --config.data.path=tokens/ --output logits/ [--config.teacher.top_k=64]

With the same config, --config.teacher.logits=logits/ then trains stage 2 without the teacher's weights. Tokens are best
made by radlads_jax.prepare first, as here: of a text they are made in logits/data/, and once more by the run. Stopped,
the same command goes on. --output may be in a bucket; over several hosts every one is started with the same command.
"""

import dataclasses
from typing import Any

from absl import flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.system import command, storage

_PRECISIONS = ("float16", "float32")
_LESS_MEMORY = (
    "Lower config.train.eval_batch_size, or split the teacher over more devices: config.mesh.fsdp, config.mesh.tensor."
)


def define_flags(values: flags.FlagValues) -> None:
    """The command line, but for --config."""
    put: Any = {"flag_values": values}
    written = "A directory, or one in a bucket, for logits.json and rows-*.bin, and of a text data/ with its tokens."
    flags.DEFINE_string("output", None, written, **put)
    flags.DEFINE_enum("precision", "float16", _PRECISIONS, "Of the stored log-probabilities.", **put)
    flags.DEFINE_enum("distributed", "off", ["off", "auto"], "As of radlads_jax.launch.", **put)
    flags.DEFINE_string("coordinator", None, "As of radlads_jax.launch.", **put)
    flags.DEFINE_integer("num_processes", None, "As of radlads_jax.launch.", **put)
    flags.DEFINE_integer("process_id", None, "As of radlads_jax.launch.", **put)


def main(values: flags.FlagValues) -> int:
    """Returns the exit code: 0 stored, now or before; 1 failed; 75 where a network did not answer.

    One of several processes that fails ends all of them. Raises ValueError for settings that are wrong.
    """
    if values.config is None or values.output is None:
        raise ValueError("expected --config FILE and --output DIR, e.g. --config configs/convert.py --output logits/.")
    run, output = config_lib.validate(values.config), storage.as_path(values.output)
    storage.require_writable(output)
    # Imported late: the models and their compiler take seconds that a typo should not.
    from radlads_jax.run import settings, storing
    from radlads_jax.run.job import make_job
    from radlads_jax.system import backend, failing, hosts
    from radlads_jax.system.workdir import held

    run = settings.with_whole_paths(run)
    try:
        hosts.start(values.distributed, values.coordinator, values.num_processes, values.process_id)
        backend.require()
        hosts.require_same({"--output": str(output)} | settings.flat_settings(values.config.to_dict()))
        with held(output), backend.room_for("teacher and rows do", _LESS_MEMORY):
            # Nothing of the student is asked for, nor logits that are there.
            teacher = dataclasses.replace(run.teacher, logits="")
            student = dataclasses.replace(run.student, init_from="")
            job = make_job(dataclasses.replace(run, teacher=teacher, student=student), output)
            stored = storing.store(job, output, values.precision)
    except command.refusals() as error:
        return failing.end_all(command.refuse(error))
    if hosts.is_first():
        Console(soft_wrap=True, highlight=False).print(
            f"the top {stored.top_k} tokens of {stored.num_rows:,} rows are in {output}. A run reads them with "
            f"--config.teacher.logits={output} --config.teacher.top_k={stored.top_k}.",
            markup=False,
        )
    return 0


if __name__ == "__main__":
    command.run(define_flags, main, config="The run's own, e.g. configs/convert.py.", writes=True)

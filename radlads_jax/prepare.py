"""Tokenises a run's text before the run: on any machine, so that no pod waits for it.

python -m radlads_jax.prepare --config configs/convert.py --config.teacher.path=Qwen/Qwen2.5-0.5B-Instruct
    --config.data.path=corpus/ --output tokens/

With the same config, --config.data.source=binidx --config.data.path=tokens/ then is the same run. Interrupted, the same
command goes on. --output may be in a bucket (gs://...).
"""

import sys

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.system import storage
from radlads_jax.system.command import parse_flags, refusals, refuse
from radlads_jax.system.stopping import leave_on_signals

_OUTPUT = flags.DEFINE_string("output", None, "A directory, or one in a bucket, for NAME.bin, NAME.idx and NAME.json.")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 prepared, now or before; 1 refused or failed."""
    try:
        chosen = flags.FLAGS["config"].value
        if len(argv) > 1 or chosen is None or _OUTPUT.value is None:
            raise ValueError(
                "expected --config FILE and --output DIR alone, e.g. --config configs/convert.py --output tokens/."
            )
        run, output = config_lib.validate(chosen), storage.as_path(_OUTPUT.value)
        storage.require_writable(output)
        # Imported late: the models and their compiler take seconds that a typo should not.
        from radlads_jax.run import tokens

        made = tokens.prepare_tokens(run, output)
    except refusals() as error:
        return refuse(error)
    Console(soft_wrap=True, highlight=False).print(
        f"{made.file.num_tokens:,} tokens of {tokens.described(made.file, made.recipe)} are in {output}. A run takes "
        f"them with --config.data.source=binidx --config.data.path={output}.",
        markup=False,
    )
    return 0


if __name__ == "__main__":
    # Defined here: another module of this process may have a flag of that name.
    config_flags.DEFINE_config_file("config", None, "The run's own, e.g. configs/convert.py.")
    leave_on_signals()
    app.run(lambda argv: sys.exit(main(argv)), flags_parser=parse_flags)

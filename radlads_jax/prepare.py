"""Tokenises a run's text before the run: on any machine, so that no pod waits for it.

python -m radlads_jax.prepare --config configs/convert.py --config.teacher.path=Qwen/Qwen2.5-0.5B-Instruct
    --config.data.path=corpus/ --output tokens/

With the same config, --config.data.source=binidx --config.data.path=tokens/ then is the same run; what told how the
text is read (name, split, revision, text_field, separator, documents, max_tokens of config.data) is left out there.
Interrupted, the same command goes on. --output may be in a bucket (gs://...).
"""

from absl import flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.system import command, storage
from radlads_jax.text import of_text_alone


def define_flags(values: flags.FlagValues) -> None:
    """The command line, but for --config."""
    written = "A directory, or one in a bucket, for NAME.bin, NAME.idx and NAME.json."
    flags.DEFINE_string("output", None, written, flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong, and for text that is none."""
    if values.config is None or values.output is None:
        raise ValueError("expected --config FILE and --output DIR, e.g. --config configs/convert.py --output tokens/.")
    run, output = config_lib.validate(values.config), storage.as_path(values.output)
    storage.require_writable(output)
    # Imported late: the models and their compiler take seconds that a typo should not.
    from radlads_jax.run import tokens

    made = tokens.prepare_tokens(run, output)
    left_out = of_text_alone(run.data)
    without = f", and without {', '.join(f'--{name}' for name in left_out)}" if left_out else ""
    Console(soft_wrap=True, highlight=False).print(
        f"{made.file.num_tokens:,} tokens of {tokens.described(made.file, made.recipe)} are in {output}. A run takes "
        f"them with --config.data.source=binidx --config.data.path={output}{without}.",
        markup=False,
    )


if __name__ == "__main__":
    command.run(define_flags, main, config="The run's own, e.g. configs/convert.py.", writes=True)

"""How a conversion went, on one page that needs nothing but itself: DIR/report/index.html.

python -m radlads_jax.report --workdir runs/demo [--usd_per_hour=12.5]
"""

from absl import flags

from radlads_jax.distill.stages import stage_losses
from radlads_jax.models.mixers import mixer_titles
from radlads_jax.reporting.sections import write_report
from radlads_jax.system import command


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "The run's directory; it may be unfinished.", flag_values=values)
    flags.DEFINE_float("usd_per_hour", None, "Price of the whole machine, for the cost.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Writes the page and prints its path."""
    if values.workdir is None:
        raise ValueError("expected --workdir DIR, the directory of a run, e.g. --workdir runs/demo.")
    words = {"losses": stage_losses(), "mixers": mixer_titles()}
    print(write_report(values.workdir, usd_per_hour=values.usd_per_hour, **words))


if __name__ == "__main__":
    command.run(define_flags, main)

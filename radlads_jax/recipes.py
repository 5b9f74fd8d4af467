"""The paper's recipe (RADLADS section 1), which its configs start from, and the rates of one with fewer tokens."""

from ml_collections import ConfigDict

from radlads_jax.config import STAGE_NAMES, WARMUP, defaults, parse_arg
from radlads_jax.fields import follow

PAPER_RATE = 1e-5
# Tokens from which stage 2 has the paper's rate, which was chosen for 500M.
PAPER_RATE_TOKENS = 50_000_000
_LARGEST_RATE = 1e-4
PAPER_RATE_ALIGNING = 1e-3
PAPER_RATE_ALIGNING_TOKENS = 3_000_000
_LARGEST_RATE_ALIGNING = 3e-3


def paper(teacher: str, mixer: str, arg: str | None = None, *, tensor: int = 1) -> ConfigDict:
    """The paper's recipe for a teacher's hub id: DCLM, stages 1, 2 and 3; with the argument "long=true" 1 and 2a.

    tensor: the least devices along tensor, where a model's weights are too many for every device to gather them all.
    """
    known = parse_arg(arg, long=False)
    config = defaults()
    config.teacher.path = teacher
    config.student.mixer = mixer
    config.stages = ("stage1", "stage2a") if known.long else ("stage1", "stage2", "stage3")
    config.data.source = "hf"
    # The same documents as dclm-baseline-1.0, whose .jsonl.zst files want one more package to be read.
    config.data.path = "mlfoundations/dclm-baseline-1.0-parquet"
    config.data.streaming = True
    # The published runs let a row's documents see each other.
    config.data.cross_document = True
    config.mesh.tensor = tensor
    for name in STAGE_NAMES:
        config[name].warmup_steps = WARMUP
    # One long row at a time on every group of devices: a whole batch is more than any machine's memory holds.
    config.stage2a.accumulate = config.stage3.accumulate = 0
    return config


def rate_for(tokens: int) -> float:
    """Stage 2's learning rate: the paper's 1e-5 from 50M tokens on, with fewer 1e-5 * 50M / tokens, at most 1e-4.

    So a short stage covers the distance that 50M tokens cover. The most is what gave the best student of 1.7B in 1B
    tokens in HALO's sweep (arXiv 2601.22156, table 9; 3e-4 was worse than 1e-5), and what 135M took here at 0.1M
    tokens. Wider teachers take less: HALO's peaks are 5e-5 for 4B and 3e-5 for 8B.
    """
    return min(_LARGEST_RATE, PAPER_RATE * max(1.0, PAPER_RATE_TOKENS / max(tokens, 1)))


def rate_for_aligning(tokens: int) -> float:
    """Stage 1's rate to begin with: the paper's 1e-3 from 3M tokens on, with fewer 1e-3 * 3M / tokens, at most 3e-3.

    The most is what was best of 1e-3, 3e-3 and 1e-2 for the layers of a 135M in 0.15M tokens (docs/RESULTS.md, Rates).
    """
    few = PAPER_RATE_ALIGNING * PAPER_RATE_ALIGNING_TOKENS / max(tokens, 1)
    return min(_LARGEST_RATE_ALIGNING, max(PAPER_RATE_ALIGNING, few))


def let_aligning_rates_follow(stage: ConfigDict) -> None:
    """The rate that a stage 1 begins with, by its tokens; what is set stays as set."""
    for name in ("lr", "mixer_lr"):
        follow(stage, name, rate_for_aligning, "tokens")


def let_rates_follow(stage: ConfigDict) -> None:
    """The rate of a stage 2 by its tokens, the same for all weights from first to last; what is set stays as set."""
    follow(stage, "lr", rate_for, "tokens")
    for name in ("lr_final", "mixer_lr"):
        follow(stage, name, float, "lr")
    follow(stage, "mixer_lr_final", float, "lr_final")

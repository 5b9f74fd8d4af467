"""The paper's recipe (RADLADS section 1), which its configs start from, and the rates of one with fewer tokens."""

from typing import NamedTuple

from ml_collections import ConfigDict

from radlads_jax.config import STAGE_NAMES, WARMUP, defaults, parse_arg
from radlads_jax.fields import follow


class FollowingRate(NamedTuple):
    """A learning rate that follows its stage's tokens: the paper's from `from_tokens` on, larger with fewer.

    field: of the stage's recipe. paper: the paper's rate, which was chosen for papers_tokens. largest: where it ends.
    """

    field: str
    paper: float
    papers_tokens: str
    from_tokens: int
    largest: float

    def of(self, tokens: int) -> float:
        """The rate of a stage of so many tokens: paper * from_tokens / tokens, within paper and largest."""
        return min(self.largest, self.paper * max(1.0, self.from_tokens / max(tokens, 1)))


# Stage 2: a short one covers the distance that 50M tokens cover. The most is what gave the best student of 1.7B in 1B
# tokens in HALO's sweep (arXiv 2601.22156, table 9; 3e-4 was worse than 1e-5), and what 135M took here at 0.1M tokens.
# Wider teachers take less: HALO's peaks are 5e-5 for 4B and 3e-5 for 8B.
DISTILLING = FollowingRate("lr", 1e-5, "500M", from_tokens=50_000_000, largest=1e-4)
# What stage 1 begins with. The most is what was best of 1e-3, 3e-3 and 1e-2 for the layers of a 135M in 0.15M tokens
# (docs/RESULTS.md, Rates).
ALIGNING = FollowingRate("mixer_lr", 1e-3, "100M", from_tokens=3_000_000, largest=3e-3)
FOLLOWING_RATES = {"stage1": ALIGNING, "stage2": DISTILLING, "stage2a": DISTILLING}


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


def let_documents_follow(data: ConfigDict, count: int) -> None:
    """So many documents of the synthetic source, unless others are set; any other source has what it has."""
    usual = data.documents
    follow(data, "documents", lambda source: count if source == "synthetic" else usual, "source")


def let_aligning_rates_follow(stage: ConfigDict) -> None:
    """The rate that a stage 1 begins with, by its tokens; what is set stays as set."""
    for name in ("lr", "mixer_lr"):
        follow(stage, name, ALIGNING.of, "tokens")


def let_rates_follow(stage: ConfigDict) -> None:
    """The rate of a stage 2 by its tokens, the same for all weights from first to last; what is set stays as set."""
    follow(stage, "lr", DISTILLING.of, "tokens")
    for name in ("lr_final", "mixer_lr"):
        follow(stage, name, float, "lr")
    follow(stage, "mixer_lr_final", float, "lr_final")

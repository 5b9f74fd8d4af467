"""The paper's recipe (RADLADS section 1), which its configs start from."""

from ml_collections import ConfigDict

from radlads_jax.config import defaults, parse_arg


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
    # One long row at a time on every group of devices: a whole batch is more than any machine's memory holds.
    config.stage2a.accumulate = config.stage3.accumulate = 0
    return config

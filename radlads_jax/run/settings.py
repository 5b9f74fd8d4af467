"""A run's settings as its work directory keeps them."""

import dataclasses

from radlads_jax.config import RunConfig
from radlads_jax.system import storage


def with_whole_paths(run: RunConfig) -> RunConfig:
    """The run with every path by a name that means the same from any working directory; ids of the hub as they are."""
    name_of_data = storage.whole_name_or_id if run.data.source in ("hf", "synthetic") else storage.whole_name
    teacher = dataclasses.replace(run.teacher, path=storage.whole_name_or_id(run.teacher.path))
    data = dataclasses.replace(
        run.data, path=name_of_data(run.data.path), tokenizer=storage.whole_name_or_id(run.data.tokenizer)
    )
    return dataclasses.replace(run, teacher=teacher, data=data)

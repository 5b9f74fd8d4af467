"""What an export asks of a format: one Writer a format, in a file of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.tree import ParamPath
from radlads_jax.porting.safetensors_write import PlannedTensor
from radlads_jax.system.storage import AnyPath

_USE = "## Use\n\nradlads_jax wrote this directory in a format for other programs; they say how they read it."


def _nothing(cfg: ModelConfig, directory: AnyPath | None) -> list[str]:
    """No obstacle."""
    del cfg, directory
    return []


@dataclasses.dataclass(frozen=True)
class Writer:
    """A format that a model is written in: a directory of safetensors, config.json, tokenizer.

    obstacles(cfg, directory): what of the model, or of the tokenizer's files in that directory (where it is given), the
    format has no place for, or its readers would compute otherwise. expected: what a model without obstacles is.
    tensors(parameters by path, cfg, dtype), config(cfg, base config.json), files(cfg): what is written.
    written(cfg): the model that a reader of it finds, which computes the same.
    use(cfg): the model card's section on how to use it; "" where transformers runs the files' own code. readers(cfg):
    of engines that load the format, why they do not load this model as it is written; nothing where they do.
    remarks(cfg): where those that load it do not run it, or not fast. forms: the format as one engine reads it, by the
    engine's name.
    """

    name: str
    tensors: Callable[[dict[ParamPath, Any], ModelConfig, str | None], list[PlannedTensor]]
    config: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]]
    files: Callable[[ModelConfig], list[Path]] = lambda cfg: []
    obstacles: Callable[[ModelConfig, AnyPath | None], list[str]] = _nothing
    expected: str = "any model"
    written: Callable[[ModelConfig], ModelConfig] = lambda cfg: cfg
    use: Callable[[ModelConfig], str] = lambda cfg: _USE
    readers: Callable[[ModelConfig], dict[str, list[str]]] = lambda cfg: {}
    remarks: Callable[[ModelConfig], list[str]] = lambda cfg: []
    forms: Mapping[str, "Writer"] = dataclasses.field(default_factory=dict)

    def require(self, cfg: ModelConfig, directory: AnyPath | None) -> None:
        """Raises ValueError naming, in one line, all obstacles."""
        if obstacles := self.obstacles(cfg, directory):
            raise ValueError(
                f"the model has what {self.name} has no place for: {'; '.join(obstacles)}. Expected {self.expected}; "
                "convert again to that, or choose another format."
            )

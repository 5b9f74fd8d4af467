"""Which layers of a teacher a hybrid student should keep as softmax attention, by forward passes alone.

python -m radlads_jax.choose --model TEACHER --keep N [--student RUN] [--data TEXT] [--out DIR]

Prints every layer's figures; --out gets choice.json and a picture, choice.svg. In the layers that are not kept stands a
window of keys, which needs no training; in a run the same is --config.student.attention_layers=auto:N. Or, with
--student, the mixers of a run of stage 1 alone whose every layer is converted.
"""

import time
from typing import Any

from absl import flags

from radlads_jax.decoding.loaded import DTYPES, load_model, model_directory, read_model_config
from radlads_jax.evaluation.layer_choice import KINDS, Sizes, choose_layers, prompts, said, table, text_batch, windows
from radlads_jax.evaluation.swaps import Student
from radlads_jax.models.window import WindowOptions
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.reporting.bars import layers_picture
from radlads_jax.run import fingerprint
from radlads_jax.run.settings import trained_stages
from radlads_jax.system import backend, command, storage, terminal
from radlads_jax.system.json_files import write_json


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    usual, window = Sizes(), WindowOptions()
    put: Any = {"flag_values": values}
    flags.DEFINE_string("model", None, "The teacher's directory, or a hub id.", **put)
    flags.DEFINE_integer("keep", None, "How many layers stay softmax attention.", **put)
    flags.DEFINE_string("student", None, "A run of stage 1 alone: its mixers in the place of windows.", **put)
    flags.DEFINE_string("data", None, "A text file for the KL. Default: made-up tales.", **put)
    flags.DEFINE_string("out", None, "A directory for choice.json and choice.svg.", **put)
    flags.DEFINE_integer("prompts", usual.prompts, "Of each kind: passkey, multi-key needle, recall.", **put)
    flags.DEFINE_integer("texts", usual.texts, "Rows of text.", **put)
    flags.DEFINE_integer("tokens", usual.tokens, "Of each prompt and row.", **put)
    flags.DEFINE_integer("sinks", window.sinks, "Keys at the beginning that a window sees.", **put)
    flags.DEFINE_integer("window", window.window, "The latest keys that it sees.", **put)
    flags.DEFINE_integer("seed", usual.seed, "Of prompts, rows and bootstrap.", lower_bound=0, **put)
    flags.DEFINE_integer("batch_size", usual.batch_size, "Rows that are read at once.", **put)
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: bfloat16, on a CPU float32.", **put)


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong, before the weights are read."""
    if values.model is None or values.keep is None:
        raise ValueError(
            "expected --model DIR and --keep N, e.g. --model HuggingFaceTB/SmolLM2-135M-Instruct --keep 7."
        )
    sizes = Sizes(values.prompts, values.texts, values.tokens, values.batch_size, values.seed)
    options = WindowOptions(values.sinks, values.window)
    cfg = read_model_config(values.model)
    if cfg.recurrent_mixer is not None or not 1 <= values.keep < cfg.num_layers:
        kind = f"has layers of {cfg.recurrent_mixer} itself" if cfg.recurrent_mixer else f"has {cfg.num_layers} layers"
        raise ValueError(
            f"--keep is {values.keep} and --model {kind}; expected a model of softmax attention alone, and 1 to "
            f"{cfg.num_layers - 1} of them to keep. Change --keep or --model."
        )
    if sizes.tokens > cfg.max_position_embeddings:
        raise ValueError(
            f"--tokens is {sizes.tokens:,} and --model reads {cfg.max_position_embeddings:,}; expected rows no longer "
            "than that. Lower it."
        )
    if values.student is not None:
        _check_student(values)
    if values.data and not storage.as_path(values.data).is_file():
        raise ValueError(f"--data {values.data} is no file; expected a text file. Check the path.")
    tokenizer = load_tokenizer(model_directory(values.model))
    prompts(tokenizer, sizes, KINDS)
    batch = text_batch(tokenizer, sizes, storage.as_path(values.data) if values.data else None)
    out = storage.as_path(values.out) if values.out else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with backend.room_for("the model does", "Lower --batch_size."):
        model = load_model(values.model, dtype=values.dtype)
        student = load_model(values.student, dtype=values.dtype) if values.student else None
        swapped = windows(model.cfg, model.params, options) if student is None else Student(student.cfg, student.params)
        begun = time.monotonic()
        choice = choose_layers(
            model.cfg, model.params, model.tokenizer, [batch], values.keep, student=swapped, sizes=sizes
        )
    seconds = time.monotonic() - begun
    console = terminal.tables()
    console.print(table(choice))
    console.print(f"{said(choice)}. {choice['passes']:,} passes of {sizes.batch_size} rows in {seconds:,.0f} s.")
    if out is not None:
        write_json(out / "choice.json", choice, indent=1)
        storage.write_text(out / "choice.svg", layers_picture(choice["single"], choice["layers"], choice["warning"]))


def _check_student(values: flags.FlagValues) -> None:
    """Raises ValueError for a --student whose mixers were not trained beside every layer of this teacher."""
    if wrong := _misfit(storage.as_path(values.student), values.model):
        raise ValueError(
            f"--student {values.student} {wrong}; expected a run of this teacher with --config.stages=stage1 and every "
            "layer converted, whose mixers can stand in any layer. Make one, or leave --student out."
        )
    if named := [name for name in ("sinks", "window") if values[name].present]:
        raise ValueError(
            f"--{named[0]} and --student are both given; expected one of them, for there are no windows beside a "
            "student's mixers. Leave one out."
        )


def _misfit(run: storage.AnyPath, model: str) -> str:
    """Why a run's mixers can not stand in any layer of the teacher; nothing where they can."""
    trained = trained_stages(run)
    if trained is None:
        return "is no run that is done"
    if trained != ["stage1"]:
        return f"has trained {', '.join(trained)}"
    student = read_model_config(run)
    if student.softmax_layers:
        return f"has softmax attention in the layers {', '.join(map(str, student.softmax_layers))}"
    directory = model_directory(model)
    if fingerprint.written(run).get("teacher") != fingerprint.of_teacher(directory, read_config(directory)):
        return f"was made of another teacher than --model {model}"
    return ""


if __name__ == "__main__":
    command.run(define_flags, main)

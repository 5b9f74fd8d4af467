"""What each engine that serves Qwen3.5's format is told of, and the directory that is written for it."""

import ast
import dataclasses
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from untrained import TEACHER, random_params, save_tokenizer, student_of

from radlads_jax.config import Export, RunConfig
from radlads_jax.models.config import ModelConfig, RopeScaling
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.porting import gguf
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_card import with_use, write_model_card
from radlads_jax.porting.save import save_params
from radlads_jax.porting.writers import WRITERS, writer_for
from radlads_jax.run import ending, exporting, preflight
from radlads_jax.run.job import Job

QWEN3 = ModelConfig("qwen3", 259, 32, 48, 4, 2, 16, (("attention", 4),), qk_norm=True, max_position_embeddings=128)
LLAMA = dataclasses.replace(QWEN3, family="llama", qk_norm=False, head_dim=8)
SCALED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0))
HYBRID, PADDED = student_of(QWEN3, "gdn", (1, 3)), student_of(LLAMA, "gdn", (1, 3))
# As a published checkpoint might be.
WIDE = dataclasses.replace(HYBRID, family="qwen3_5_text", mixer=GdnOptions(4, 4, 16, 32))
USUAL = WRITERS["qwen3_5"]


def saved(directory, cfg: ModelConfig, params=None, **options):
    base = {"model_type": cfg.family, "eos_token_id": 0}
    return save_params(params or random_params(cfg), cfg, directory, base_config=base, dtype="float32", **options)


def written(directory) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("cfg", "engine", "named"),
    [
        (student_of(QWEN3, "gdn", (0, 3)), "mlx", "softmax layers [0, 3]"),
        (student_of(QWEN3, "gdn", (0, 3)), "sglang", "softmax layers [0, 3]"),
        (student_of(QWEN3, "gdn"), "llama.cpp", "no softmax layer"),
        (student_of(QWEN3, "gdn"), "mlx", "no softmax layer"),
        (student_of(QWEN3, "gdn"), "transformers", "no softmax layer"),
        (QWEN3, "llama.cpp", "no recurrent layer"),
        (QWEN3, "mlx", "no recurrent layer"),
        (PADDED, "sglang", "biases of q, k and v"),
        (student_of(SCALED, "gdn", (1, 3)), "llama.cpp", "llama3"),
        (WIDE, "llama.cpp", "keys of 16 and values of 32 channels"),
    ],
)
def test_what_an_engine_does_not_load_is_named_and_refused(cfg, engine, named):
    (reason,) = USUAL.readers(cfg)[engine]
    assert named in reason
    with pytest.raises(ValueError, match=rf"{USUAL.name} for {engine} .*{re.escape(named)}"):
        USUAL.forms[engine].require(cfg, None)


@pytest.mark.parametrize("engine", USUAL.forms)
@pytest.mark.parametrize("cfg", [HYBRID, PADDED], ids=["qwen3", "padded"])
def test_a_directory_for_one_engine_is_read_by_it(cfg, engine, tmp_path):
    form, params = USUAL.forms[engine], random_params(cfg)
    if engine == "sglang" and cfg is PADDED:
        assert form.readers(cfg)[engine]
        return
    assert form.readers(cfg)[engine] == []
    target = saved(tmp_path / "for", cfg, params, writer=engine)
    keys, tensors = read_config(target), written(target)
    assert (keys["model_type"] == "qwen3_5") == (engine == "mlx")
    o_bias = cfg is PADDED and engine != "llama.cpp"
    assert any("o_proj.bias" in name for name in tensors) == o_bias
    back = model_config_from_hf(keys)
    assert back.o_bias == o_bias
    load_params(target, back)
    usual = written(saved(tmp_path / "usual", cfg, params))
    for name in usual.keys() & tensors.keys():
        np.testing.assert_array_equal(usual[name], tensors[name])


def test_one_engines_directory_becomes_anothers(tmp_path):
    """Biases of o that are 0 go and come back; the card says anew what loads it."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", 259)
    first = saved(tmp_path / "mlx", PADDED, writer="mlx", tokenizer_from=tokenizer)
    second = exporting.export_again(first, tmp_path / "llama.cpp", writer="llama.cpp")
    third = exporting.export_again(second, tmp_path / "again", writer="mlx")
    assert written(third).keys() == written(first).keys() > written(second).keys()
    np.testing.assert_equal(written(third), written(first))
    assert read_config(third) == read_config(first)
    cards = [(place / "README.md").read_text() for place in (first, second, third)]
    assert "- llama.cpp: another form" in cards[0] and "- mlx: another form" in cards[1]
    assert cards[2] == cards[0]


def test_another_form_is_written_from_the_hosts_memory(tmp_path, monkeypatch):
    """A model that a pod has trained fits into no single device."""
    first, load, places = saved(tmp_path / "first", HYBRID), exporting.load_params, []

    def noted(*args, shardings, **options):
        places.append(shardings)
        return load(*args, shardings=shardings, **options)

    monkeypatch.setattr(exporting, "load_params", noted)
    exporting.export_again(first, tmp_path / "second", writer="mlx")
    (place,) = places
    assert {device.platform for device in place.device_set} == {"cpu"}


def test_a_bias_of_o_that_is_not_0_does_not_go(tmp_path):
    source = saved(tmp_path / "mlx", PADDED, writer="mlx")
    cfg = model_config_from_hf(read_config(source))
    params = random_params(cfg)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        saved(tmp_path / "other", cfg, params, writer="llama.cpp")
    assert USUAL.obstacles(student_of(dataclasses.replace(LLAMA, o_bias=True), "gdn", (1, 3)), None)


def test_the_card_says_what_loads_it_and_what_does_not():
    card = write_model_card(PADDED, use=USUAL.use(PADDED))
    assert "vllm serve" in card and "- sglang: biases of q, k and v" in card and "trust_remote_code" not in card
    assert "llama-server" not in card and "- llama.cpp: another form (--for=llama.cpp)" in card
    assert "- mlx: another form (--for=mlx)" in card
    assert with_use(card, USUAL.use(HYBRID)).count("## Use") == 1
    # Heads of 8 and 16 channels.
    assert "- vllm: its build for CPUs does not run it: heads have 8 channels, and 64, 128 are taken there" in card
    assert "on a CUDA GPU" not in USUAL.use(HYBRID) and "on a CUDA GPU" in USUAL.forms["llama.cpp"].use(PADDED)
    assert not USUAL.remarks(student_of(dataclasses.replace(QWEN3, head_dim=64), "gdn", (1, 3)))
    assert "trust_remote_code" in write_model_card(student_of(QWEN3, "rad_rwkv7"))


def test_an_engine_is_known_by_name():
    assert writer_for(HYBRID) is writer_for(HYBRID, "") is USUAL
    assert writer_for(HYBRID, "mlx") is USUAL.forms["mlx"]
    rwkv = student_of(TEACHER, "rad_rwkv6")
    assert writer_for(rwkv, "llama.cpp") is WRITERS["llama.cpp"]
    assert writer_for(rwkv, "transformers").name == "huggingface"
    with pytest.raises(ValueError, match=r"'vllm'.*huggingface"):
        writer_for(rwkv, "vllm")


def job_of(student: ModelConfig, engine: str) -> Job:
    job = object.__new__(Job)
    for name, value in {"student": student, "run": RunConfig(export=Export(engine=engine))}.items():
        object.__setattr__(job, name, value)
    return job


@pytest.mark.parametrize(
    ("student", "engine", "problem"),
    [
        (student_of(QWEN3, "gdn", (0, 3)), "", ""),
        (student_of(QWEN3, "gdn", (0, 3)), "mlx", "softmax layers [0, 3]"),
        (student_of(QWEN3, "gdn", (0, 3)), "llama.cpp", ""),
        (student_of(QWEN3, "gdn"), "llama.cpp", "no softmax layer"),
        (student_of(SCALED, "gdn", (1, 3)), "llama.cpp", "llama3"),
        (HYBRID, "llama.cpp", ""),
    ],
)
def test_what_an_engine_can_not_load_is_said_before_the_run(student, engine, problem):
    finding = preflight.export_format(job_of(student, engine))
    assert (problem in finding.problem) if problem else not finding.problem
    if not engine:
        assert "vllm: its build for CPUs does not run it: heads have 16 channels" in finding.result
        assert "vllm" in finding.result and "mlx does not: softmax layers [0, 3]" in finding.result


def test_a_run_for_an_engine_that_reads_no_such_student_ends_before_it_begins(monkeypatch):
    monkeypatch.setattr(ending.heldout, "batches", lambda job: [{"loss_mask": np.ones(1, bool)}])
    job = job_of(student_of(TEACHER, "rad_rwkv7"), "vllm")
    object.__setattr__(job, "workdir", ending.storage.as_path("nowhere"))
    object.__setattr__(job, "tokenizer_dir", None)
    with pytest.raises(ValueError, match="'vllm'"):
        ending.check(job)


CONVERTER = """
import pathlib, sys

def main():
    target = sys.argv[sys.argv.index("--outfile") + 1]
    if "bf16" in sys.argv:
        sys.exit("chkhsh:  0123abc\\nBPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    pathlib.Path(target).write_text(" ".join(sys.argv[1:]))
"""


def test_gguf_is_llama_cpps_own_converters(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf.*-e '\.\[gguf\]'"):
        gguf.require_converter(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.syspath_prepend(tmp_path / "bin")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    file = tmp_path / "model.gguf"
    gguf.require_converter(file)
    with pytest.raises(ValueError, match=rf"--gguf .*{re.escape(str(tmp_path / 'missing' / 'model.gguf'))}"):
        gguf.require_converter(tmp_path / "missing" / "model.gguf")
    gguf.convert(tmp_path, file, "float32")
    assert f"{tmp_path} --outtype f32" in file.read_text() and "--no-mtp" in file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path}.*0123abc"):
        gguf.convert(tmp_path, file, "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "config.json"]


# As the packaged converter's writer, before it has a place for the layers; and as a later one, which writes them first.
WRITER = """
class GGUFWriter:
    arch = "qwen35"

    def __init__(self):
        self.kv_data = [{}]

    def add_array(self, key, value):
        assert key not in self.kv_data[0]
        self.kv_data[0][key] = value

    def add_full_attention_interval(self, interval):
        self.kv_data[0]["qwen35.full_attention_interval"] = interval
"""
# As in a checkout of llama.cpp, where gguf lies beside it.
CONVERTER_OF_LAYERS = """
import pathlib, sys
sys.path.insert(1, str(pathlib.Path(__file__).parent / "gguf-py"))
import gguf

def main():
    writer = gguf.GGUFWriter()
    if "bf16" in sys.argv:
        writer.add_array("qwen35.attention.recurrent_layers", "its own")
    writer.add_full_attention_interval(4)
    pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(repr(writer.kv_data))
"""


def test_gguf_says_which_layers_are_recurrent(tmp_path, monkeypatch):
    (tmp_path / "gguf-py").mkdir()
    for name, text in {"convert_hf_to_gguf": CONVERTER_OF_LAYERS, "gguf-py/gguf": WRITER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    target, file = saved(tmp_path / "model", student_of(QWEN3, "gdn", (0, 3))), tmp_path / "model.gguf"
    for dtype, written in {"float32": [False, True, True, False], "bfloat16": "its own"}.items():
        gguf.convert(target, file, dtype)
        (keys,) = ast.literal_eval(file.read_text())
        assert keys["qwen35.attention.recurrent_layers"] == written
    # Of other formats there is nothing to say.
    (target / "config.json").write_text('{"layer_types": ["full_attention"]}')
    gguf.convert(target, file, "float32")
    assert ast.literal_eval(file.read_text()) == [{"qwen35.full_attention_interval": 4}]

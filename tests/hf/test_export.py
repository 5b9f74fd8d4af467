"""What an export holds beside its weights: code, model card; exporting again; the check for llama.cpp."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import save_tokenizer

from radlads_jax.config import RunConfig, Teacher
from radlads_jax.models import MIXERS, ModelConfig
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import nest
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.save import save_params
from radlads_jax.porting.writers import WRITERS
from radlads_jax.run import exporting
from radlads_jax.run.exporting import export_again
from radlads_jax.student import Student

TEACHER = ModelConfig("qwen2", 259, 32, 48, 4, 2, 8, (("attention", 3),), qkv_bias=True, max_position_embeddings=256)
SUMMARY = {
    "student": {"loss": 1.25, "top1": 0.5, "kl": 0.125, "agreement": 0.75},
    "teacher": {"loss": 1.0, "top1": 0.625},
    "relative_top1": 0.8,
    "tokens": 4096,
    "stages": [
        {"name": name, "tokens": 1000 + i, "trains": "everything", "loss": "KL to the teacher"}
        for i, name in enumerate(("stage1", "stage2", "stage3"))
    ],
}


def student(mixer: str = "rad_rwkv6", layers: tuple[int, ...] = (), base: ModelConfig = TEACHER, **switches):
    return base.as_student(mixer, MIXERS[mixer].choose(base.hidden_size, **switches), layers)


def run_settings(path: str = "Qwen/Qwen2.5-0.5B-Instruct") -> dict:
    run = RunConfig(teacher=Teacher(path), student=Student("rad_rwkv6"))
    return json.loads(json.dumps(dataclasses.asdict(run)))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 259)
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_dir):
    """(a run's directory with export/, settings and summary; its student's parameters)."""
    workdir, cfg = tmp_path_factory.mktemp("run"), student()
    rng = np.random.default_rng(0)
    shapes = param_shapes(cfg).items()
    params = nest({path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes})
    # A head that has moved a little from the embedding, as that of a tied teacher's student.
    params["head"]["kernel"] = 1.25 * params["embed"]["embedding"].T
    save_params(params, cfg, workdir / "export", base_config={"eos_token_id": 0}, tokenizer_from=tokenizer_dir)
    (workdir / "config.json").write_text(json.dumps(run_settings()))
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    return workdir, params


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7", "window", "window_rwkv7"])
def test_config_names_classes_that_the_files_hold(mixer, tmp_path):
    cfg = student(mixer)
    params = nest({path: jnp.zeros(shape) for path, shape in param_shapes(cfg).items()})
    save_params(params, cfg, tmp_path / "b", base_config={"layer_types": ["full_attention"] * 3})
    config = read_config(tmp_path / "b")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for place in config["auto_map"].values():
        module, name = place.split(".")
        assert f"class {name}(" in (tmp_path / "b" / f"{module}.py").read_text()
    # transformers 5.6 and earlier copy no others.
    modules = {place.split(".")[0] for place in config["auto_map"].values()}
    sources = "".join((tmp_path / "b" / f"{module}.py").read_text() for module in modules)
    imported = set(re.findall(r"^from \.(\w+) import", sources, re.MULTILINE))
    assert {path.stem for path in (tmp_path / "b").glob("*.py")} == modules | imported
    # A list of the teacher's, which would call the recurrent layers softmax attention.
    assert "layer_types" not in config
    assert (tmp_path / "b" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_model_card_of_a_run():
    card = write_model_card(student(layers=(2,)), run=run_settings(), summary=SUMMARY)
    header = card.split("---")[1]
    assert "base_model: Qwen/Qwen2.5-0.5B-Instruct" in header
    assert "# RAD-RWKV6 student of Qwen/Qwen2.5-0.5B-Instruct" in card
    assert "3, of which number 2 is softmax attention" in card
    # Two recurrent layers of 4 heads of 8 x 8 float32 and the last inputs in bfloat16; one softmax layer, 2 kv heads.
    assert re.search(r"\b2\.18 kB\b.*\b64 B a token\b", card)
    # The tokens that were read, which fill whole batches, not those that were asked for.
    assert "| stage2 | everything, KL to the teacher | 1,001 | 512 | 96 | 1e-05 to 1e-05, 1e-05 to 1e-05 |" in card
    assert "| teacher | 1.0000 | 62.50% | | |" in card and "| student | 1.2500 | 50.00% | 0.1250 | 75.00% |" in card
    assert "Top-1 relative to the teacher's: 80.00%" in card
    assert {line.count("|") for line in card.split("## Scores")[1].splitlines() if "|" in line} == {6}


def test_model_card_leaves_out_what_is_not_known():
    card = write_model_card(student("rad_rwkv7"))
    assert "base_model" not in card and "## Recipe" not in card and "## Scores" not in card


@pytest.mark.parametrize("path", ["/home/me/mine", "gs://bucket/models/mine/", "~/mine"])
def test_model_card_keeps_to_itself_where_things_lay(path):
    run = run_settings(path)
    run["data"]["path"] = "/home/me/corpus.txt"
    card = write_model_card(student("rad_rwkv7"), run=run)
    assert "base_model" not in card and "student of mine\n" in card and "100,000,000" in card
    assert "Text: corpus.txt." in card and "/home" not in card and "gs://" not in card


def test_a_run_is_exported_again_in_another_dtype(exported, tmp_path):
    workdir, params = exported
    target = export_again(workdir, tmp_path / "b", dtype="bfloat16", writer="llama.cpp")
    config = read_config(target)
    assert config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 0 and config["auto_map"]
    read = load_params(target, model_config_from_hf(config), dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("bfloat16")), read, params)
    assert (target / "tokenizer.json").read_bytes() == (workdir / "export" / "tokenizer.json").read_bytes()
    assert "Qwen/Qwen2.5-0.5B-Instruct" in (target / "README.md").read_text()


def test_more_digits_than_were_written_are_not_promised(exported, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(exporting.logging, "warning", lambda words, *values: said.append(words % values))
    short = export_again(exported[0], tmp_path / "short", dtype="bfloat16")
    assert not said
    export_again(short, tmp_path / "wide", dtype="float32")
    assert len(said) == 1 and "are bfloat16: float32 writes the same values" in said[0]


def test_a_head_of_its_own_is_not_left_out(exported, tmp_path):
    workdir, params = exported
    other = params | {"head": {"kernel": jnp.roll(params["head"]["kernel"], 1, axis=1)}}
    cfg = model_config_from_hf(read_config(workdir / "export"))
    save_params(other, cfg, tmp_path / "untied", base_config={})
    with pytest.raises(ValueError, match=r"--retie for .*untied.*by 1\d\d% of its size"):
        export_again(tmp_path / "untied", tmp_path / "tied", retie=True)


def test_a_head_is_left_out_and_written_again(exported, tmp_path):
    workdir, params = exported
    (workdir / "export" / "README.md").write_text("my own words")
    tied = export_again(workdir / "export", tmp_path / "tied", retie=True)
    assert read_config(tied)["tie_word_embeddings"] is True and (tied / "README.md").read_text() == "my own words"
    (workdir / "export" / "README.md").write_text("# A student\n\n## Scores\n\nloss 1\n")
    export_again(workdir / "export", tmp_path / "scored", retie=True)
    said = (tmp_path / "scored" / "README.md").read_text()
    assert re.search(r"## Scores\n\nOf the student with its own head, .*\n\nloss 1\n", said)
    untied = export_again(tied, tmp_path / "untied", untie=True, writer="llama.cpp")
    cfg = model_config_from_hf(read_config(untied))
    assert not cfg.tie_embeddings
    expected = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    jax.tree.map(np.testing.assert_array_equal, load_params(untied, cfg), expected)


def test_a_model_that_llama_cpp_takes():
    assert WRITERS["llama.cpp"].obstacles(student(), None) == []


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (TEACHER, "the mixer attention"),
        (student("rad_rwkv7"), "the mixer rad_rwkv7"),
        (student(layers=(0, 2)), "softmax layers [0, 2]"),
        (student(use_rope=True), "RoPE"),
        (student(token_shift=False), "token shift"),
        (student(gate="low_rank"), "gate"),
        (student(gate="none"), "gate"),
        (student(balance_state=False), "state balancing"),
        (dataclasses.replace(student(), tie_embeddings=True), "--untie"),
        (student(base=dataclasses.replace(TEACHER, qk_norm=True)), "norms of q and k"),
        (student(qk_norm=True), "student.qk_norm"),
        (student(base=dataclasses.replace(TEACHER, o_bias=True)), "bias of o"),
        (student(base=dataclasses.replace(TEACHER, head_dim=16)), "4 x 16 in a width of 32"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_named(cfg, named):
    (obstacle,) = WRITERS["llama.cpp"].obstacles(cfg, None)
    assert named in obstacle


def test_all_obstacles_are_named_before_anything_is_written(exported, tmp_path):
    workdir, _ = exported
    (tmp_path / "a").mkdir()
    source, config = workdir / "export", read_config(workdir / "export")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"use_rope": True, "tie_word_embeddings": True}))
    (tmp_path / "a" / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "a" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ValueError, match=r"RoPE.*tied.*WordPiece") as raised:
        export_again(tmp_path / "a", tmp_path / "b", writer="llama.cpp")
    assert "\n" not in str(raised.value) and not (tmp_path / "b").exists()


def test_contradicting_options_are_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="--retie and --untie"):
        export_again(exported[0], tmp_path / "b", retie=True, untie=True)

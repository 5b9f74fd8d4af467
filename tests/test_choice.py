"""The choice of softmax layers: scores, ties, and that a planted layer is found; what a run keeps of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from absl import flags
from untrained import TEACHER, random_params, save_teacher, save_tokenizer

from radlads_jax import choose, config
from radlads_jax.config import RunConfig, validate
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.evaluation import floor, layer_choice
from radlads_jax.evaluation.layer_choice import Sizes, choose_layers, unevenness, windows
from radlads_jax.evaluation.probes import Example
from radlads_jax.evaluation.swaps import Measured, Rows, Swaps, prompt_rows
from radlads_jax.models import bind
from radlads_jax.models.window import WindowOptions
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.reporting.bars import layers_picture
from radlads_jax.run import choice_file, preflight, softmax_layers, train
from radlads_jax.run.job import make_job
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.student import Student

CFG = dataclasses.replace(TEACHER, stacks=(("attention", 4),), max_position_embeddings=256)
LENGTH = 24
# Where attention sees nothing at all, a layer's windows change it most.
OPTIONS = WindowOptions(sinks=0, window=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def planted(layer: int):
    """A model of which one layer's attention alone writes anything."""
    params = random_params(CFG)
    kernel = params["stacks"][0]["mixer"]["o"]["kernel"]
    params["stacks"][0]["mixer"]["o"]["kernel"] = kernel * (np.arange(4) == layer)[:, None, None]
    return params


def asking(params):
    """Prompts of random tokens whose answer is what the model itself says: a window can only make it less likely."""
    read = jax.jit(lambda ids: _logits(params, ids))

    def example(text, length):
        ids = text.rng.integers(5, 200, length - 1)
        return Example([*ids.tolist(), int(jnp.argmax(read(ids)[-1]))], length - 1)

    return example


def rows(count: int = 3):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 300, (count, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return [{"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}]


@pytest.mark.parametrize(("keep", "layer"), [(1, 0), (2, 3)])
def test_the_layer_that_reads_is_kept_first_and_the_same_seed_chooses_the_same(keep, layer, tokenizer, monkeypatch):
    params, sizes = planted(layer), Sizes(prompts=6, texts=2, tokens=LENGTH, batch_size=6)
    monkeypatch.setattr(layer_choice, "KINDS", ("short",))
    monkeypatch.setitem(layer_choice.probes.PROBES, "short", asking(params))
    found = [
        choose_layers(
            CFG, params, tokenizer, rows(), keep, student=windows(CFG, params, OPTIONS), sizes=sizes, quiet=True
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0]["order"][0]["layer"] == layer
    assert [step["by"] for step in found[0]["order"]] == ["single", "greedy"][:keep]
    assert len(set(found[0]["layers"])) == keep and found[0]["layers"] == sorted(found[0]["layers"])
    changes = [line["kl"] for line in found[0]["single"]]
    assert changes[layer] > 1e-3 and sum(changes) - changes[layer] < 1e-4
    assert found[0]["these kept"] == pytest.approx(found[0]["teacher"], abs=1e-4)
    assert found[0]["none kept"]["kl"] == pytest.approx(changes[layer], rel=1e-3)
    # The teacher's on text; the layers one by one and nothing kept, and the kept ones or the other three one by one.
    assert found[0]["passes"] == 1 + 2 * (5 + 1 + (1 if keep == 1 else 4))


def test_an_answers_nll_is_that_of_its_tokens(tokenizer):
    examples = [Example([5, 9, 3, 7, 8], 3), Example([4, 4, 6], 2)]
    batches, count = prompt_rows(examples, 2, LENGTH)
    params = planted(1)
    swaps = Swaps(CFG, params, Rows([], batches, 0, count), windows(CFG, params, OPTIONS))
    logits = [np.asarray(_logits(params, e.ids), np.float64) for e in examples]
    expected = [
        np.mean([_nll(of_row[t - 1], e.ids[t]) for t in range(e.start, len(e.ids))])
        for e, of_row in zip(examples, logits, strict=True)
    ]
    nll = np.concatenate([swaps._batch(batch, np.zeros(4, bool), (), None) for batch in swaps._placed[1]], axis=-1)[0]
    np.testing.assert_allclose(nll[0], expected, rtol=1e-5)
    best = [
        all(row[t - 1].argmax() == e.ids[t] for t in range(e.start, len(e.ids)))
        for e, row in zip(examples, logits, strict=True)
    ]
    assert nll[1].tolist() == best


def _logits(params, ids):
    decoder = bind(CFG, params)
    return decoder.logits(decoder.hidden(jnp.asarray(ids)[None])[0])[0]


def _nll(logits, token):
    return np.log(np.exp(logits - logits.max()).sum()) - (logits[token] - logits.max())


def test_a_tie_goes_to_even_spacing_and_a_clear_lead_does_not():
    draws = layer_choice._Draws(4, np.ones(12, bool), 12, 0)
    # The first layer's windows cost one prompt much and another nearly as much less; the others' cost nothing.
    noise = np.tile([3.0, -2.9], 6)

    def scores(lead):
        changes = [Measured(np.full(4, 0.1), (noise + lead) * (i == 0), np.zeros(12)) for i in range(5)]
        return draws.scores(changes)

    tied = layer_choice._best(scores(0.0), range(5), [], 5)
    assert (tied.layer, tied.tied) == (2, [0, 1, 2, 3, 4])
    clear = layer_choice._best(scores(50.0), range(5), [], 5)
    assert (clear.layer, clear.tied) == (0, [0]) and clear.score == pytest.approx(4)
    # Whichever is added to the middle one, the gaps are as uneven: the better score decides.
    assert layer_choice._best(scores(0.0), range(5), [2], 5)[0::2] == (0, [0, 1, 3, 4])
    assert unevenness([1, 3], 5) < unevenness([0, 1], 5)


@pytest.mark.parametrize("keep", [0, 4])
def test_a_number_that_leaves_nothing_to_choose_is_refused(keep, tokenizer):
    with pytest.raises(ValueError, match=rf"{keep} softmax layers .*of 4; expected 1 to 3"):
        choose_layers(CFG, {}, tokenizer, rows(), keep)


def test_prompts_without_room_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompts of 20 tokens.*expected more"):
        layer_choice.prompts(tokenizer, Sizes(tokens=20), layer_choice.KINDS)


def test_a_kind_that_the_teacher_can_not_answer_does_not_count():
    # One in ten by lot, and as many right; then all right, none likely; then none right, all far likelier than a guess.
    examples = [Example([1, 2, 3], 2, 0.1)] * 30
    right = np.concatenate([np.arange(10) == 0, np.ones(10), np.zeros(10)])
    nll = np.concatenate([np.full(10, 9.6), np.full(10, 9.6), np.full(10, 0.9)])
    kinds = floor.of_kinds(("low", "right", "likely"), examples, Measured(np.zeros(2), nll, right), 896)
    assert [kind["at the floor"] for kind in kinds] == [True, False, False]
    assert kinds[0]["guess"] == pytest.approx(np.log(10)) and kinds[0]["chance"] == 0.1
    said = floor.warning({"recall": kinds})
    assert "low 10% right (chance 10%)" in said and "likely" not in said and "attention_every" not in said
    counted = floor.counted(kinds, 30)
    changes = [Measured(np.full(2, float(i)), np.where(counted, 0.0, 99.0 * (i == 0)), right) for i in range(3)]
    # What the teacher can not answer would have chosen the first; by all three kinds at the floor the text decides.
    for of in (counted, np.zeros(30, bool)):
        scores = layer_choice._Draws(2, of, 10, 0).scores(changes)[0]
        np.testing.assert_allclose(scores, [-1.224745, 0, 1.224745], rtol=1e-5)


def test_the_command_chooses_writes_and_says_where_a_teacher_is_at_chance(tmp_path, capsys):
    teacher = save_teacher(tmp_path, dataclasses.replace(CFG, max_position_embeddings=512))
    (tmp_path / "text.txt").write_text("A king lived in the wood. " * 200)
    values = flags.FlagValues()
    choose.define_flags(values)
    sizes = ["--prompts=2", "--texts=2", "--tokens=448", "--window=8", "--batch_size=2"]
    values(["choose", f"--model={teacher}", "--keep=1", f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path}", *sizes])
    choose.main(values)
    found = json.loads((tmp_path / "choice.json").read_text())
    assert found["layers"] == [found["order"][0]["layer"]] and found["mixer"] == {
        "name": "window",
        "sinks": 4,
        "window": 8,
    }
    # Of random weights nothing else can be.
    assert [kind["at the floor"] for kind in found["recall"]] == [True] * 3
    printed = " ".join(capsys.readouterr().out.split())
    picture = (tmp_path / "choice.svg").read_text()
    for said in (found["warning"], printed, picture):
        assert "at chance in all of the prompts" in said and "attention_every" in said
    assert f"softmax: layers {found['layers'][0]} (of 0 to 3)" in printed


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--keep=4", r"--keep is 4\b.*\b1 to 3\b"),
        ("--prompts=0", "prompts is 0"),
        ("--tokens=40", "prompts of 40 tokens"),
        ("--tokens=513", r"--tokens is 513 and --model reads 512; expected rows no longer"),
        ("--data={place}/none.txt", r"--data .*none\.txt is no file"),
        ("--data={place}/short.txt", r"--data .*short\.txt holds too little text .*\b4,096 tokens"),
        ("--data={place}/latin.txt", r"latin\.txt is not UTF-8"),
    ],
)
def test_the_command_refuses_before_the_weights_are_read(flag, words, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("A king.")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9_000)
    monkeypatch.setattr(choose, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    reads_512 = dataclasses.replace(CFG, max_position_embeddings=512)
    values = flags.FlagValues()
    choose.define_flags(values)
    values(["choose", f"--model={save_teacher(tmp_path, reads_512)}", "--keep=1", flag.format(place=tmp_path)])
    with pytest.raises((ValueError, OSError), match=words):
        choose.main(values)


def test_the_picture_has_two_bars_a_layer_and_the_kept_ones_in_another_colour():
    picture = layers_picture([{"layer": i, "kl": 0.1 * i, "nll": i - 1.0} for i in range(3)], [2])
    assert picture.count("<rect x=") == 6 and picture.count("#c2410c") == 2 and picture.startswith("<svg")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("auto:x",), "'auto:x'; expected int"),
        (("auto:1", 2), "'auto:1'; expected int"),
        ((2.5,), r"attention_layers.*2\.5.*\bint\b"),
    ],
)
def test_what_is_no_choice_is_refused(layers, expected):
    with pytest.raises(ValueError, match=expected):
        validate(_run_settings({"student.attention_layers": layers}))


def test_it_goes_with_no_interval():
    with pytest.raises(ValueError, match=r"attention_every is 2 and .*auto:1.*expected one of them"):
        validate(_run_settings({"student.attention_layers": ("auto:1",), "student.attention_every": 2}))


@pytest.mark.parametrize(
    ("count", "mixer", "expected"),
    [
        (0, "gdn", "auto:1 to auto:1"),
        (2, "gdn", "auto:1 to auto:1"),
        (1, "attention", r"auto:1\b.*config\.student\.mixer .*'attention'"),
    ],
)
def test_numbers_and_mixers_without_a_choice_are_refused(count, mixer, expected):
    run = RunConfig(student=Student(mixer=mixer, attention_layers=(f"auto:{count}",)))
    with pytest.raises(ValueError, match=expected):
        make_student_config(TEACHER, run)


def test_until_they_are_chosen_as_many_are_evenly_spaced():
    teacher = dataclasses.replace(TEACHER, stacks=(("attention", 30),))
    student = make_student_config(teacher, RunConfig(student=Student(attention_layers=("auto:7",))))
    kept = [i for i, mixer in enumerate(student.layer_mixers) if mixer == "attention"]
    assert kept == [3, 7, 11, 16, 20, 24, 29]


def _run_settings(more):
    chosen_settings = config.defaults()
    base = {"teacher.path": "t", "data.source": "synthetic"}
    for name, value in (base | more).items():
        group, field = name.split(".")
        chosen_settings[group][field] = value
    return chosen_settings


STEPS = {"stage1": 1}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Jobs of one teacher and one work directory, and how often layers were chosen."""
    place = tmp_path_factory.mktemp("run")
    settings = tiny_run.settings(save_teacher(place), "window", STEPS) | {"student.attention_layers": ("auto:1",)}
    return place / "run", settings


def _job(workdir, settings):
    values = config.defaults()
    values.update_from_flattened_dict(settings)
    return make_job(config.validate(values), workdir)


def test_an_engine_that_wants_an_interval_is_told_before_the_choice(run_of, tmp_path):
    job = _job(tmp_path, run_of[1] | {"student.mixer": "gdn", "export.engine": "mlx"})
    said = preflight.export_format(job)
    assert "softmax layers [0], which are not those with" in said.result + said.problem
    # The evenly spaced ones, which are counted until then, would do.
    said = preflight.export_format(dataclasses.replace(job, to_choose=0))
    assert "softmax layers" not in said.result + said.problem


def test_a_run_chooses_once_and_goes_on_with_what_it_chose(run_of, monkeypatch):
    workdir, settings = run_of
    asked, read = [], []

    def choose(cfg, params, tokenizer, texts, keep, **more):
        asked.append((cfg.stacks, keep, more["seed"]))
        read.extend(texts)
        return {"layers": [0]}

    monkeypatch.setattr(softmax_layers, "choose_for_run", choose)
    monkeypatch.setattr(softmax_layers, "table", str)
    job = _job(workdir, settings)
    assert job.to_choose == 1 and job.teacher.stacks == (("attention", 2),)
    assert job.student.layer_mixers == ("window", "attention")
    said = preflight.layers(job)
    assert "1 of 2 will be chosen" in said.result and "evenly spaced: 1" in said.result
    with pytest.raises(ValueError, match=r"'auto:1'.*softmax_layers\.decide"):
        train.convert(job)
    teacher = TeacherWeights(job)
    decided = softmax_layers.decide(job, teacher)
    assert teacher._params is None and teacher.job is decided and asked == [((("attention", 2),), 1, 0)]
    # What the first stage reads first, and nothing of what is held out.
    np.testing.assert_array_equal(read[0]["tokens"][: tiny_run.ROWS], next(job.batches("stage1"))["tokens"])
    assert decided.student.layer_mixers == ("attention", "window") and decided.to_choose == 0
    assert decided.teacher.stacks == (("attention", 1), ("attention", 1))
    assert decided.run.settings()["student"]["attention_layers"] == ("auto:1",)

    summary = train.convert(decided)
    again = _job(workdir, settings)
    assert again.student == decided.student and softmax_layers.decide(again, TeacherWeights(again)) is again
    assert len(asked) == 1
    exported = json.loads((workdir / "export" / "config.json").read_text())
    assert exported["attention_layers"] == [0] and summary["stages"][0]["steps"] == 1
    card = (workdir / "export" / "README.md").read_text()
    assert "number 0 is softmax attention" in card and "chosen by forward passes of the teacher" in card


def test_every_host_goes_on_with_the_first_ones_choice(run_of, tmp_path, monkeypatch):
    said = []

    def first(text):
        said.append(json.loads(text)["layers"])
        return json.dumps({"layers": [1]})

    monkeypatch.setattr(softmax_layers.hosts, "said_by_first", first)
    monkeypatch.setattr(softmax_layers, "choose_for_run", lambda *rest, **more: {"layers": [0]})
    monkeypatch.setattr(softmax_layers, "table", str)
    job = _job(tmp_path, run_of[1])
    decided = softmax_layers.decide(job, TeacherWeights(job))
    assert said == [[0]] and decided.student.layer_mixers == ("window", "attention")
    assert json.loads((tmp_path / choice_file.FILE).read_text())["layers"] == [1]


def test_a_choice_that_is_gone_or_wrong_is_refused_once_the_run_has_begun(run_of):
    workdir, settings = run_of
    path = workdir / choice_file.FILE
    text = path.read_text()
    # As the command writes it after the first step.
    (workdir / "config.json").write_text("{}")
    path.write_text(json.dumps(json.loads(text) | {"layers": [5]}))
    with pytest.raises(ValueError, match=r"layers is \[5\]; expected different layer numbers from 0 to 1"):
        _job(workdir, settings)
    path.unlink()
    with pytest.raises(ValueError, match=r"choice\.json"):
        _job(workdir, settings)
    path.write_text(text)
    assert _job(workdir, settings).to_choose == 0


def test_a_choice_for_another_text_is_none(tmp_path):
    depends, run = {"teacher": "a", "tokenizer": "b", "data": "c"}, RunConfig()
    choice_file.write(tmp_path, run, {"layers": [1]}, 1, depends)
    assert choice_file.read(tmp_path, run, 1, 2, depends) == (1,)
    assert choice_file.read(tmp_path, run, 1, 2, depends | {"data": "d"}) == ()
    assert choice_file.read(tmp_path, dataclasses.replace(run, seed=1), 1, 2, depends) == ()

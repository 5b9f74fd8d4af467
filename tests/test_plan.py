"""Plans: the arithmetic of work, memory and money, the smallest slices, and what is refused."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from rich.console import Console

from radlads_jax import plan
from radlads_jax.config import Mesh, RunConfig, StageConfig, Teacher
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill import program
from radlads_jax.models import MIXERS, ModelConfig, abstract_params, bind, sharding
from radlads_jax.models.placement import abstract
from radlads_jax.planning import chips, cost, display, hlo, memory, plans
from radlads_jax.planning import planner as planner_lib
from radlads_jax.planning import stage as stage_lib
from radlads_jax.planning.hlo import Counts
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.known_models import KNOWN_CONFIGS

ROOT = Path(__file__).parent.parent
TEACHER = ModelConfig("qwen2", 64, 32, 48, 4, 2, 8, (("attention", 3),), qkv_bias=True)


def test_what_a_remat_policy_computes_again():
    """Layers forward and backward are three passes of matmuls; "dots" keeps their results, "full" makes a fourth pass.

    Scores are products of batches, which "dots" does not keep; what down gives is needed by nothing in a backward pass.
    """
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def compiled(remat: str):
        def loss(params, tokens):
            return bind(TEACHER, params).hidden(tokens, remat=remat)[0].sum()

        return jax.jit(jax.grad(loss)).lower(abstract_params(TEACHER), tokens).compile()

    layers = 48 * 2 * (cost.matmul_weights(TEACHER) - 32 * 64)
    scores = 48 * 2 * cost.mixing_flops(TEACHER, 24)
    flops = {remat: hlo.count(compiled(remat).as_text()).flops for remat in ("none", "dots", "full")}
    down = 48 * 2 * 3 * 32 * 48
    assert flops["none"] == pytest.approx(3 * layers + 3 * scores, rel=0.01)
    assert flops["dots"] == pytest.approx(3 * layers + 4 * scores, rel=0.01)
    assert flops["full"] == pytest.approx(4 * layers + 4 * scores - down, rel=0.01)


def test_a_forward_pass_by_hand_and_as_compiled():
    """The teacher's matrices and scores; a compiled pass over whole rows counts every score, not the causal half."""
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64
    assert cost.matmul_weights(TEACHER) == weights
    assert cost.mixing_flops(TEACHER, 24) == 3 * 2 * 24 * 32
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def forward(params, tokens):
        decoder = bind(TEACHER, params)
        return decoder.logits(decoder.hidden(tokens)[0])

    compiled = jax.jit(forward).lower(abstract_params(TEACHER), tokens).compile()
    expected = 48 * (2 * weights + 2 * cost.mixing_flops(TEACHER, 24))
    assert hlo.count(compiled.as_text()).flops == pytest.approx(expected, rel=0.01)


def test_flops_of_the_stages():
    student = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32), (0,))
    teacher = TEACHER.as_teacher_of(student)
    own = 2 * cost.matmul_weights(student) + cost.mixing_flops(student, 128)
    others = 2 * cost.matmul_weights(teacher) + cost.mixing_flops(teacher, 128)
    assert cost.mixing_flops(student, 128) == 2 * 128 * 32 + 2 * 9 * 8 * 32
    assert cost.model_flops(student, teacher, "stage2", 128) == 3 * own + others
    # The head is not computed again.
    assert cost.model_flops(student, teacher, "stage3", 128, remat=True) == 4 * own - 2 * 64 * 32
    mixer = 2 * 32 * 32 + 2 * 32 * 16 + 4 * (32 * 32 + 32 * 32)  # q, o; k, v; decay, iclr, value and gate of rank 32
    assert student.mixer is not None and student.mixer.rank_gate == student.mixer.rank_decay == 32
    alone = 2 * 2 * mixer + 2 * 9 * 8 * 32
    # Of what a mixer reads no gradient is wanted: q, k, v and the first halves of the others.
    unwanted = 2 * 2 * (32 * 32 + 2 * 32 * 16 + 4 * 32 * 32)
    assert cost.model_flops(student, teacher, "stage1", 128) == others - 2 * 64 * 32 + 3 * alone - unwanted
    # A learned token shift stands before RAD-RWKV6's projections, and learns by the gradient of what they read.
    shifted = TEACHER.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(32))
    plain = dataclasses.replace(shifted, mixer=dataclasses.replace(shifted.mixer, token_shift=False))
    assert cost.first_matrices(shifted) == 3 * 32 * 5 * 32
    assert cost.first_matrices(plain) == 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 32)


def test_flops_of_gdn():
    student = TEACHER.as_student("gdn", MIXERS["gdn"].choose(32), (0,))
    # q, z, o; k, v; beta and the decay of 4 heads. Of the first layer attention's q, o, k, v.
    mixer, attention = 3 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 4, 2 * 32 * 32 + 2 * 32 * 16
    mlps_and_head = 3 * 3 * 32 * 48 + 64 * 32
    assert cost.matmul_weights(student) == 2 * mixer + attention + mlps_and_head
    # Of a head of 8 x 8: decay, key, outer product and output; four taps of q, k and v.
    assert cost.mixing_flops(student, 128) == 2 * 128 * 32 + 2 * (7 * 8 * 32 + 8 * (32 + 2 * 16))


@pytest.mark.parametrize("name", [name for name, spec in MIXERS.items() if spec.operator])
def test_a_plan_knows_what_every_kernel_takes(name):
    operator = MIXERS[name].operator
    assert operator.cycles.keys() == {f"{operator.name}_forward", f"{operator.name}_backward"}
    assert cost.step_time(chips.CHIPS["v6e"], hlo.Counts(kernels=dict.fromkeys(operator.cycles, 1e9))).compute > 0


def test_known_models_have_their_published_sizes():
    sizes = {
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
        "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
        "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
        "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
        "Qwen/QwQ-32B": 32_763_876_352,
        "Qwen/Qwen3-8B": 8_190_735_360,
    }
    assert sizes.keys() == KNOWN_CONFIGS.keys()
    for name, values in KNOWN_CONFIGS.items():
        params = abstract_params(model_config_from_hf(values))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sizes[name], name


def test_the_papers_configs_name_known_models():
    files = [f for f in (ROOT / "configs").glob("*.py") if "paper(" in f.read_text() and "ablation" not in f.name]
    assert len(files) == 20
    assert all(any(f'"{name}"' in file.read_text() for name in KNOWN_CONFIGS) for file in files)


def test_bytes_of_a_shard():
    run = dataclasses.replace(RunConfig(), stages=())
    mesh = mesh_lib.make_mesh(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, fsdp=4, tensor=2)))
    params = abstract_params(TEACHER)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory.shard_bytes(params) == whole
    assert whole / 8 <= memory.shard_bytes(abstract(mesh, params, TEACHER)) < whole / 6


def test_prices():
    assert chips.prices({"v5p": 2.0}) | {"v5e": 0} == chips.prices({"v5p": 2.0, "v5e": 0.0})
    with pytest.raises(ValueError, match=r"v9=1\.0"):
        chips.prices({"v9": 1.0})
    with pytest.raises(ValueError, match="'v5p=cheap'"):
        plan._parse_prices(["v5p=cheap"])


def test_what_the_compiler_says_of_memory():
    said = "RESOURCE_EXHAUSTED: CompileTimeHbmOom: the program's (36.38G) exceeds available HBM (15.75G)"
    also = "Ran out of memory in memory space hbm. Used 36.38G of 15.75G hbm."
    for text in (said, also):
        assert stage_lib.oom_bytes(text) == int(36.38 * 2**30)
    assert stage_lib.oom_bytes("something else") is None


def test_teachers_without_a_network(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["Qwen/Qwen3-8B"]))
    for path in ("Qwen/Qwen3-8B", str(tmp_path)):
        run = dataclasses.replace(RunConfig(), teacher=Teacher(path=path))
        assert planner_lib.teacher_config(run).hidden_size == 4096
    with pytest.raises(ValueError, match=r"some/model\b.*config\.json\b.*Qwen/Qwen3-8B"):
        planner_lib.teacher_config(dataclasses.replace(RunConfig(), teacher=Teacher(path="some/model")))
    planner = planner_lib.make_planner(dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen3-8B")), {})
    for topology, words in (("gpu:8", r"'gpu:8'.*\bv6e\b"), ("v5e:2by2", r"'v5e:2by2'.*\bv5p:4x4x8\b")):
        with pytest.raises(ValueError, match=words):
            planner.topology(topology)


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[str, int]]:
    """Which stages were "compiled" on how many chips: a compiler that says by rule what a step takes."""
    made: list[tuple[str, int]] = []

    def compiled(plan):
        made.append((plan.name, plan.mesh.size))
        record = stage_lib.by_arithmetic(plan)
        counts = dataclasses.asdict(Counts(flops=record["ideal_flops"]))
        return {
            "peak_bytes": 1.5 * record["peak_bytes_by_hand"],
            "temp_bytes": 0,
            "counts": counts,
            "compile_seconds": 1.0,
        }

    def devices(topology):
        count = plans.chip_count(topology) * chips.CHIPS[topology.split(":")[0]].devices
        return np.array(jax.devices() * 32)[:count]

    monkeypatch.setattr(stage_lib, "compiled", compiled)
    monkeypatch.setattr(plans, "topology_devices", devices)
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda run, devices: mesh_lib.make_abstract_mesh(run, len(devices)))
    return made


def test_the_smallest_slices_are_found_and_kept(compilations, tmp_path):
    """Of 7B stage 1 goes on fewer chips than stage 2, and that on fewer than stage 3.

    What can not fit by hand is not compiled, on what is no multiple of the mesh's least nothing is tried, and what was
    compiled is read from the file.
    """
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-7B-Instruct"))
    results = tmp_path / "plans.jsonl"
    smallest = planner_lib.make_planner(run, {"v6e": 2.0}, results).smallest("v6e")
    each = [(stage["name"], stage["topology"], stage["fits"]) for stage in smallest["stages"]]
    assert each == [("stage1", "v6e:2x2", True), ("stage2", "v6e:4x4", True), ("stage3", "v6e:8x8", True)]
    assert compilations == [("stage1", 4), ("stage2", 8), ("stage2", 16), ("stage3", 32), ("stage3", 64)]
    assert smallest["usd"] == pytest.approx(2 * smallest["chip_hours"])
    spread = dataclasses.replace(run, mesh=Mesh(tensor=8))
    assert planner_lib.make_planner(spread, {}).smallest("v6e")["stages"][0]["topology"] == "v6e:2x4"
    with pytest.raises(ValueError, match=r"\b7 devices.*\bv6e:2x2\b"):
        planner_lib.make_planner(dataclasses.replace(run, mesh=Mesh(tensor=7)), {}).smallest("v6e")
    compilations.clear()
    again = planner_lib.make_planner(run, {"v6e": 2.0}, results).smallest("v6e")
    assert again == smallest and not compilations
    results.write_text("[1]\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(results))} .*--results"):
        planner_lib.make_planner(run, {}, results)


def test_two_runs_share_a_file_of_results(compilations, tmp_path):
    results, path = tmp_path / "plans.jsonl", "Qwen/Qwen2.5-7B-Instruct"
    runs = [
        dataclasses.replace(RunConfig(), teacher=Teacher(path=path), stages=(name,)) for name in ("stage1", "stage2")
    ]
    planners = [planner_lib.make_planner(run, {}, results) for run in runs]
    topologies = [planner.topology("v6e:4x4") for planner in planners]
    assert len(compilations) == 2 and len(results.read_text().splitlines()) == 2
    assert [planner_lib.make_planner(run, {}, results).topology("v6e:4x4") for run in runs] == topologies
    assert len(compilations) == 2


def test_chips_are_ranked_by_cost(compilations, capsys):
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-72B-Instruct"), stages=("stage2",))
    ranking = planner_lib.make_planner(run, {"a100": 1e6}).auto()
    costs = [choice["usd_counted"] for choice in ranking]
    priced = [name for name, price in chips.prices({}).items() if price is not None]
    assert len(ranking) == len(priced) and costs == sorted(costs) and ranking[-1]["chip"] == "a100"
    by_chip = {choice["chip"]: choice for choice in ranking}
    # One share of every peak, so that slices differ by what a FLOP costs; a GPU has nothing else.
    for name in ("v6e", "h100"):
        work = by_chip[name]["usd_counted"] * chips.CHIPS[name].flops / chips.CHIPS[name].price
        assert work == pytest.approx(by_chip["b200"]["usd_counted"] * chips.CHIPS["b200"].flops / 6.0, rel=1e-6)
    assert (
        by_chip["h100"]["usd"] == pytest.approx(by_chip["h100"]["usd_counted"]) and by_chip["h100"]["usd_spot"] is None
    )
    assert by_chip["v6e"]["usd_spot"] == pytest.approx(by_chip["v6e"]["usd"] * 0.96 / 2.70)
    display.show_ranking(ranking, chips.prices({"tpu7x": 9.0}), Console(width=200))
    shown = capsys.readouterr().out
    assert all(choice["stages"][0]["topology"] in shown for choice in ranking)
    assert "arithmetic" in shown and "compiler" in shown and "without a known price" not in shown


def test_a_bill_is_a_range_and_a_step_the_measured_one(compilations, monkeypatch):
    """The factor is of compiled steps alone."""
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-7B-Instruct"), stages=("stage2",))

    def planned(topology, **changed):
        chip = topology.split(":")[0]
        monkeypatch.setitem(chips.CHIPS, chip, dataclasses.replace(chips.CHIPS[chip], **changed))
        return planner_lib.make_planner(run, {chip: 1.0}).topology(topology)["stages"][0]

    for topology, factor in (("v6e:4x4", 2.0), ("h100:16", 1.0)):
        plain, slower = (planned(topology, step_factor=each, step_spread=0.1) for each in (1.0, 2.0))
        assert slower["step_seconds"] == factor * plain["step_seconds"] == factor * slower["raw_step_seconds"]
        assert slower["mfu"] == pytest.approx(plain["mfu"] / factor) and slower["usd"] == factor * plain["usd"]
        hours = slower["hours"]
        assert slower["usd_low"] == pytest.approx(16 * (0.9 * hours + 0.05))
        assert slower["usd_high"] == pytest.approx(16 * (1.1 * 1.05 * hours + 0.25 * (1 + hours / 24)))


def test_a_chip_of_two_devices_is_priced_by_the_chip_and_only_with_a_price(compilations, capsys):
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-7B-Instruct"), stages=("stage2",))
    planned = planner_lib.make_planner(run, {}).topology("tpu7x:2x2x1")
    assert (planned["chips"], planned["mesh"]["fsdp"], compilations) == (4, 8, [("stage2", 8)])
    stage = planned["stages"][0]
    assert stage["chip_hours"] == pytest.approx(4 * stage["hours"]) and (stage["usd"], planned["usd"]) == (None, None)
    display.show(planned, Console(width=200))
    assert "--price tpu7x=USD" in capsys.readouterr().out
    priced = planner_lib.make_planner(run, {"tpu7x": 9.0})
    assert priced.topology("tpu7x:2x2x1")["usd"] == pytest.approx(9.0 * stage["chip_hours"])
    display.show_ranking(planner_lib.make_planner(run, {}).auto(), chips.prices({}), Console(width=200))
    assert "without a known price: tpu7x" in capsys.readouterr().out
    assert "tpu7x" in {choice["chip"] for choice in priced.auto()}


def test_chips_without_a_slice_for_the_mesh_are_left_out(compilations, capsys):
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-7B-Instruct"), stages=("stage1",))
    stage1 = dataclasses.replace(run.stage1, batch_size=128)
    run = dataclasses.replace(run, mesh=Mesh(data=128), stage1=stage1)
    ranking = planner_lib.make_planner(run, {}).auto()
    assert {choice["chip"] for choice in ranking} == {"v5e", "v5p", "v6e"}
    display.show_ranking(ranking, chips.prices({}), Console(width=200))
    assert "config.mesh: a100, h100, h200, b200." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\b7 devices.*\bv5e:2x2\b.*\bb200:64\b"):
        planner_lib.make_planner(dataclasses.replace(run, mesh=Mesh(data=7)), {}).auto()


def test_a_gpu_is_planned_by_arithmetic(compilations):
    run = dataclasses.replace(RunConfig(), teacher=Teacher(path="Qwen/Qwen2.5-7B-Instruct"), stages=("stage2",))
    planned = planner_lib.make_planner(run, {}).topology("h100:8")
    (only,) = planned["stages"]
    assert not compilations and "nothing was compiled" in planned["assumptions"][0]
    # 500M tokens, forward twice and backward, and the teacher, 7.6B weights each: 10 x 7.6e9 at 40% of the peak.
    assert only["chip_hours"] == pytest.approx(500e6 * 10 * 7.6e9 / (0.4 * 989e12) / 3600, rel=0.1)
    # 16 bytes for each of the student's parameters and 2 for each of the teacher's, over 8 devices.
    held = 4 * only["parameter_bytes"] + only["teacher_bytes"]
    assert held == pytest.approx((16 + 2) * 7.7e9 / 8, rel=0.03)
    assert held < only["peak_bytes"] < 2 * held


def test_a_step_is_compiled_with_the_options_of_its_chips(monkeypatch):
    """The compiler refuses what it does not know, so that a made up option shows that it was asked."""
    monkeypatch.setitem(program.COMPILER_OPTIONS, "cpu", {"xla_made_up": "true"})
    recipe = StageConfig(tokens=2 * 16 * 10, batch_size=2, seq_len=16)
    run = dataclasses.replace(RunConfig(), stages=("stage3",), stage3=recipe)
    student = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32))
    mesh = sharding.one_device_mesh(jax.devices()[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_made_up"):
        stage_lib.compiled(program.StagePlan(run, "stage3", student, TEACHER.as_teacher_of(student), mesh))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra tpu)")
@pytest.mark.parametrize(("topology", "price"), [("v5e:2x2", 1.2), ("v6e:2x2", 2.7), ("tpu7x:2x2x1", None)])
def test_a_plan_for_a_pod_that_is_not_there(tmp_path, topology, price):
    """The JSON of a small model on four chips, and of one that is too large for them.

    Of four layers: with two, split over four devices, libtpu 0.0.48 aborts (in ring_sum_emitter.cc).
    """
    sizes = {"batch_size": 8, "seq_len": 128, "tokens": 8 * 128 * 10}
    flat = [
        f"--config.{stage}.{key}={value}" for stage in ("stage1", "stage2", "stage3") for key, value in sizes.items()
    ]
    (tmp_path / "config.json").write_text(
        json.dumps(KNOWN_CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": 4})
    )
    done = launch_plan(topology, f"--config.teacher.path={tmp_path}", "--config.stage3.accumulate=1", *flat)
    assert [stage["name"] for stage in done["stages"]] == ["stage1", "stage2", "stage3"]
    # A student with a softmax layer, at a length from which attention is the library's kernel.
    long = ("--config.stages=stage2", "--config.stage2.seq_len=2048", "--config.student.attention_layers=1")
    hybrid = launch_plan(topology, f"--config.teacher.path={tmp_path}", *flat, *long)["stages"]
    assert {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"} < hybrid[0]["counts"]["kernels"].keys()
    for stage in done["stages"] + hybrid:
        assert stage["fits"] and stage["loops_of_unknown_length"] == 0
        assert 0.95 < stage["compiled_flops"] / stage["ideal_flops"] < 2
        held = sum(stage[f"{part}_bytes"] for part in ("parameter", "optimizer", "teacher"))
        assert held < stage["peak_bytes"] < 8 * 2**30
        assert stage["chip_hours"] == pytest.approx(4 * stage["steps"] * stage["step_seconds"] / 3600)
    assert done["usd"] == (price and pytest.approx(price * done["chip_hours"]))
    too_large = launch_plan(topology, "--config.teacher.path=Qwen/Qwen2.5-72B-Instruct", "--config.stages=stage2")
    assert not too_large["stages"][0]["fits"] and too_large["stages"][0]["peak_bytes"] > 94.75 * 2**30
    assert too_large["usd"] is None


def launch_plan(topology: str, *arguments: str) -> dict:
    config = ["--config", "configs/qwen2_5_0_5b_rad_rwkv7.py", "--topology", topology, "--json"]
    done = command(*config, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = processes.environ()
    line = [sys.executable, "-m", "radlads_jax.plan", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--where=stage1"], "--where=stage1 with --topology=v6e:2x4; expected one of config.stages stage2"),
        (["--where=stage2", "--results=plans.jsonl"], "--where with --price or --results"),
    ],
)
def test_what_where_can_not_do_is_refused(more, words):
    done = command("--config", "configs/demo.py", "--config.stages=stage2", "--topology", "v6e:2x4", *more)
    assert done.returncode == 1 and words in " ".join(done.stderr.split())


def test_the_command_reads_a_config_and_plans_it():
    done = command("--config", "configs/demo.py", "--config.stages=stage2", "--topology", "h100:2", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [stage["name"] for stage in plan["stages"]] == ["stage2"] and plan["chips"] == 2

"""RAD-RWKV7 behind a window: it begins as the window, and what it adds is RAD-RWKV7's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import TEACHER, random_params, student_of

from radlads_jax.models import MIXERS, bind
from radlads_jax.models.window import untrained_control
from radlads_jax.models.window_rwkv7 import WindowRwkv7Options
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.student import init_mixers, whole_student

SIGHT = {"sinks": 2, "window": 5}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, TEACHER.vocab_size, (2, 40)))


@jax.jit(static_argnums=0)
def logits(cfg, params):
    decoder = bind(cfg, params)
    return decoder.logits(decoder.hidden(TOKENS)[0])


def test_it_begins_as_its_window():
    """To the share of the recurrence, of which nothing comes yet; without that share exactly."""
    cfg, control = student_of(TEACHER, "window_rwkv7", **SIGHT), student_of(TEACHER, "window", **SIGHT)
    teacher = random_params(TEACHER)
    mixers = init_mixers(cfg, teacher, 0)
    share = mixers["stacks"][0]["mixer"]["share"]
    np.testing.assert_array_equal(share["kernel"], 0)
    np.testing.assert_array_equal(share["bias"], -4)
    expected = logits(control, whole_student(control, teacher, init_mixers(control, teacher, 0)))
    near = np.abs(logits(cfg, whole_student(cfg, teacher, mixers)) - expected).max()
    assert 0 < near < 0.1 * np.abs(expected).max()
    share["bias"] = jnp.full_like(share["bias"], -1e4)
    exact = logits(cfg, whole_student(cfg, teacher, mixers))
    np.testing.assert_allclose(exact, expected, atol=1e-5 * np.abs(expected).max())


def test_without_a_share_of_the_window_it_is_rad_rwkv7():
    cfg = student_of(TEACHER, "window_rwkv7", **SIGHT)
    alone = student_of(TEACHER, "rad_rwkv7", group_norm=True, balance_state=False)
    params = random_params(cfg)
    mixer = params["stacks"][0]["mixer"]
    mixer["share"]["bias"] = jnp.full_like(mixer["share"]["bias"], 1e4)
    got = logits(cfg, params)
    del mixer["share"]
    expected = logits(alone, params)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_what_it_is_asked_and_what_config_json_says():
    cfg = student_of(TEACHER, "window_rwkv7", (1,), **SIGHT)
    said = hf_config_from_model(cfg, {"model_type": "qwen2"})
    assert (said["attention_sinks"], said["attention_window"]) == (2, 5)
    assert model_config_from_hf(said).mixer == cfg.mixer
    del said["use_rope"]
    assert model_config_from_hf(said).mixer == cfg.mixer
    with pytest.raises(ValueError, match="use_rope"):
        model_config_from_hf(said | {"use_rope": False})
    assert MIXERS["window_rwkv7"].choose(32).group_norm and MIXERS["window_rwkv7"].choose(32).window == 64
    for wrong, named in (({"use_rope": False}, "use_rope"), ({"gate": "full"}, "gate"), ({"window": 0}, "window")):
        with pytest.raises(ValueError, match=named):
            MIXERS["window_rwkv7"].choose(32, **wrong)
    with pytest.raises(ValueError, match="sinks"):
        dataclasses.replace(WindowRwkv7Options.for_width(32), sinks=-1)


def test_the_control_of_any_student():
    deep = dataclasses.replace(TEACHER, stacks=(("attention", 4),))
    control = untrained_control(deep, student_of(deep, "gdn", (1,)))
    assert control.stacks == (("window", 1), ("attention", 1), ("window", 2))
    assert (control.mixer.sinks, control.mixer.window) == (4, 64)

"""Layers that are swapped by data are the decoder with a student's mixers there; what windows cost, by length."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from untrained import TEACHER, random_params, student_of

from pallas_kernels.testing import rms_ratio
from radlads_jax.models import bind, sharding
from radlads_jax.models.placement import shardings
from radlads_jax.models.swapped import hidden_from, layer_inputs
from radlads_jax.models.window import WindowOptions, with_windows

CFG = dataclasses.replace(TEACHER, stacks=(("attention", 4),))
OPTIONS = WindowOptions(sinks=2, window=5)


def packed(rows: int = 2, length: int = 33):
    """Tokens, segments that change, and padding at the end of the first row."""
    rng = np.random.default_rng(0)
    segments = 1 + np.cumsum(rng.random((rows, length)) < 0.05, axis=1)
    segments[0, -3:] = 0
    begun = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=segments[:, :1]) != 0, np.arange(length), 0), axis=1
    )
    return tuple(map(jnp.asarray, (rng.integers(1, 300, (rows, length)), segments, np.arange(length) - begun)))


def student(mixer: str):
    """A student of another seed, all of whose layers are converted, and its parameters; of windows the teacher's."""
    if mixer == "window":
        return with_windows(CFG, OPTIONS), random_params(CFG)
    cfg = student_of(CFG, mixer)
    return cfg, random_params(cfg, seed=1)


def hybrid(swapped: tuple[int, ...], params, mixer: str):
    """The decoder whose stacks are cut so that these layers have the student's mixer, and the norm before it."""
    cfg, of_student = student(mixer)
    stacks = [jax.tree.map(lambda x, i=i: x[i : i + 1], params["stacks"][0]) for i in range(4)]
    for i in swapped:
        own = {name: of_student["stacks"][0][name] for name in ("mixer", "input_norm")}
        stacks[i] = stacks[i] | jax.tree.map(lambda x, i=i: x[i : i + 1], own)
    names = tuple((mixer if i in swapped else "attention", 1) for i in range(4))
    return bind(dataclasses.replace(CFG, stacks=names, mixer=cfg.mixer), params | {"stacks": dict(enumerate(stacks))})


def flags(layers):
    return jnp.isin(jnp.arange(4), jnp.asarray(layers, int))


# The values that RAD-RWKV7's layers share are those of the student's first layer.
@pytest.mark.parametrize(
    ("mixer", "swapped"),
    [
        *(("window", layers) for layers in [(), (2,), (0, 3), (0, 1, 2, 3)]),
        ("gdn", (1, 2)),
        ("rad_rwkv7", (0, 3)),
        ("rad_rwkv6", (2,)),
    ],
)
def test_it_is_the_decoder_with_mixers_there(mixer, swapped):
    params, (tokens, segments, positions) = random_params(CFG), packed()
    expected, _ = hybrid(swapped, params, mixer).hidden(tokens, segment_ids=segments, positions=positions)
    decoder, other = bind(CFG, params), bind(*student(mixer))
    found = jax.jit(lambda layers: layer_inputs(decoder, other, layers, tokens, segments, positions))(flags(swapped))
    assert rms_ratio(found.hidden, expected) < 1e-5


def begun_at(cuts):
    return [(sum(cuts[:i]), n) for i, n in enumerate(cuts)]


@pytest.mark.parametrize(("mixer", "cuts"), [("window", (4,)), ("window", (1, 2, 1)), ("rad_rwkv7", (4,))])
def test_a_pass_that_begins_in_the_middle_is_the_whole_one(mixer, cuts):
    params, rows = random_params(CFG), packed()
    cfg, other = (
        dataclasses.replace(c, stacks=tuple((c.stacks[0][0], n) for n in cuts)) for c in (CFG, student(mixer)[0])
    )

    def cut(params):
        pieces = [jax.tree.map(lambda x, s=s, n=n: x[s : s + n], params["stacks"][0]) for s, n in begun_at(cuts)]
        return params | {"stacks": dict(enumerate(pieces))}

    decoder, of_student = bind(cfg, cut(params)), bind(other, cut(student(mixer)[1]))
    begun = layer_inputs(decoder, of_student, flags((0,)), *rows)
    later = jax.jit(lambda w, first: hidden_from(decoder, of_student, w, begun.layers, first, *rows))
    for first in range(1, 4):
        whole = layer_inputs(bind(CFG, params), bind(*student(mixer)), flags((0, first)), *rows).hidden
        assert rms_ratio(later(flags((0, first)), first), whole) < 1e-5
    assert later._cache_size() == 1


@pytest.mark.parametrize("mixer", ["window", "gdn"])
def test_eight_devices_find_what_one_does(mixer):
    params, rows = random_params(CFG), packed()
    cfg, of_student = student(mixer)
    mesh = jax.make_mesh((2, 2, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    placed = [jax.device_put(x, shardings(mesh, x, c)) for x, c in ((params, CFG), (of_student, cfg))]

    def both(params, of_student):
        decoder, other = bind(CFG, params), bind(cfg, of_student)
        begun = layer_inputs(decoder, other, flags((0,)), *rows)
        return begun.hidden, hidden_from(decoder, other, flags((0, 2)), begun.layers, jnp.int32(2), *rows)

    one = jax.jit(both)(params, of_student)
    with sharding.traced_over(mesh):
        eight = jax.jit(both)(*placed)
    assert max(rms_ratio(np.asarray(a), np.asarray(b)) for a, b in zip(eight, one, strict=True)) < 1e-5


def products(jaxpr, times: int = 1) -> int:
    """Multiplications of all matrix products, a scan's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        inside = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        total += sum(products(inner, inside) for inner in jaxprs_in_params(equation.params))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = (v.aval.shape for v in (equation.invars[0], equation.outvars[0]))
            total += times * math.prod(out) * math.prod(left[i] for i in contracted)
    return total


def test_the_window_mixers_cost_is_linear_in_the_length_where_attentions_is_not():
    params = random_params(dataclasses.replace(CFG, stacks=(("attention", 1),)))

    def cost(mixer, length):
        cfg = dataclasses.replace(CFG, stacks=((mixer, 1),), mixer=WindowOptions())
        tokens = jnp.zeros((1, length), jnp.int32)
        return products(jax.make_jaxpr(lambda tokens: bind(cfg, params).hidden(tokens)[0])(tokens).jaxpr)

    assert cost("window", 2048) == 2 * cost("window", 1024)
    assert cost("attention", 2048) > 2.5 * cost("attention", 1024)

"""A window that is data is the decoder with `window` mixers in those layers; its cost, and theirs, by length."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from untrained import TEACHER, random_params

from pallas_kernels.testing import rms_ratio
from radlads_jax.models import bind, sharding
from radlads_jax.models.placement import shardings
from radlads_jax.models.swapped import hidden_from, layer_inputs
from radlads_jax.models.window import WindowOptions

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


def with_windows(windowed: tuple[int, ...], params):
    """The decoder whose stacks are cut so that these layers have the mixer `window`, of the same weights."""
    names = ["window" if i in windowed else "attention" for i in range(4)]
    stacks = [jax.tree.map(lambda x, i=i: x[i : i + 1], params["stacks"][0]) for i in range(4)]
    cfg = dataclasses.replace(CFG, stacks=tuple((name, 1) for name in names), mixer=OPTIONS)
    return bind(cfg, params | {"stacks": dict(enumerate(stacks))})


def flags(layers):
    return jnp.isin(jnp.arange(4), jnp.asarray(layers, int))


@pytest.mark.parametrize("windowed", [(), (2,), (0, 3), (0, 1, 2, 3)])
def test_it_is_the_decoder_with_windows_there(windowed):
    params, (tokens, segments, positions) = random_params(CFG), packed()
    expected, _ = with_windows(windowed, params).hidden(tokens, segment_ids=segments, positions=positions)
    found = jax.jit(lambda w: layer_inputs(bind(CFG, params), OPTIONS, w, tokens, segments, positions))(flags(windowed))
    assert rms_ratio(found.hidden, expected) < 1e-5


def begun_at(cuts):
    return [(sum(cuts[:i]), n) for i, n in enumerate(cuts)]


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 1)])
def test_a_pass_that_begins_in_the_middle_is_the_whole_one(cuts):
    params, rows = random_params(CFG), packed()
    cfg = dataclasses.replace(CFG, stacks=tuple(("attention", n) for n in cuts))
    pieces = [jax.tree.map(lambda x, s=s, n=n: x[s : s + n], params["stacks"][0]) for s, n in begun_at(cuts)]
    decoder = bind(cfg, params | {"stacks": dict(enumerate(pieces))})
    begun = layer_inputs(decoder, OPTIONS, flags((0,)), *rows)
    later = jax.jit(lambda w, first: hidden_from(decoder, OPTIONS, w, begun.layers, first, *rows))
    for first in range(1, 4):
        whole = layer_inputs(bind(CFG, params), OPTIONS, flags((0, first)), *rows).hidden
        assert rms_ratio(later(flags((0, first)), first), whole) < 1e-5
    assert later._cache_size() == 1


def test_eight_devices_find_what_one_does():
    params, rows = random_params(CFG), packed()
    mesh = jax.make_mesh((2, 2, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    placed = jax.device_put(params, shardings(mesh, params, CFG))

    def both(params):
        decoder = bind(CFG, params)
        begun = layer_inputs(decoder, OPTIONS, flags((0,)), *rows)
        return begun.hidden, hidden_from(decoder, OPTIONS, flags((0, 2)), begun.layers, jnp.int32(2), *rows)

    one = jax.jit(both)(params)
    with sharding.traced_over(mesh):
        eight = jax.jit(both)(placed)
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

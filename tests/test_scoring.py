"""Scores of tokens against full forward passes."""

import jax
import numpy as np
import pytest
from untrained import random_params, save_tokenizer

from radlads_jax.decoding.generation import generate
from radlads_jax.decoding.loaded import Model
from radlads_jax.decoding.loop import empty_sequences, left_padded, prefill
from radlads_jax.evaluation.scoring import padded_width, score_continuations, score_rows
from radlads_jax.models import MIXERS, ModelConfig, bind
from radlads_jax.porting.hub import load_tokenizer

TEACHER = ModelConfig("qwen2", 300, 32, 48, 4, 2, 8, (("attention", 2),), qkv_bias=True, max_position_embeddings=128)
STUDENT = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32))
HYBRID = TEACHER.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(32), (0,))


@pytest.mark.parametrize("cfg", [STUDENT, HYBRID], ids=["rad_rwkv7", "hybrid"])
def test_scores_are_those_of_a_full_forward_pass(cfg):
    params, rng = random_params(cfg), np.random.default_rng(0)
    lengths, starts = (5, 700, 40, 2, 33), (1, 600, 39, 1, 10)
    rows = [rng.integers(0, 300, n).tolist() for n in lengths]
    scores = score_rows(cfg, params, rows, starts, batch_size=2)
    padded = np.zeros((5, 700), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    decoder = bind(cfg, params)
    logits = np.asarray(jax.jit(lambda t: decoder.logits(decoder.hidden(t)[0]))(padded), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        before = logs[i, start - 1 : len(row) - 1]
        expected = before[np.arange(len(before)), row[start:]]
        np.testing.assert_allclose(scores[i].log_probabilities, expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_array_equal(scores[i].is_best, before.argmax(-1) == row[start:])


@pytest.mark.parametrize("cfg", [STUDENT, HYBRID], ids=["rad_rwkv7", "hybrid"])
def test_continuations_have_the_scores_of_whole_rows(cfg, tmp_path):
    """Some begin within the tokens that `prefill` leaves unread, one is read in several chunks."""
    params, rng = random_params(cfg), np.random.default_rng(0)
    prompts, continuations = (
        [rng.integers(0, 300, n).tolist() for n in lengths] for lengths in ((70, 1, 600, 3), (5, 560, 1, 2))
    )
    read = prefill(cfg, params, empty_sequences(cfg, 4, 600 + 1024), left_padded(prompts))
    for _ in range(2):
        scores = score_continuations(cfg, params, *read, continuations)
        for score, prompt, continuation in zip(scores, prompts, continuations, strict=True):
            (expected,) = score_rows(cfg, params, [prompt + continuation], [len(prompt)])
            np.testing.assert_allclose(score.log_probabilities, expected.log_probabilities, rtol=2e-4, atol=2e-4)
            np.testing.assert_array_equal(score.is_best, expected.is_best)
    # And what was read goes on as if nobody had scored.
    model = Model(tmp_path, cfg, params, load_tokenizer(save_tokenizer(tmp_path)), stop_ids=())
    goes_on, alone = (
        [step.tokens for step in generate(model, prompts, max_tokens=20, **options)] for options in ({"read": read}, {})
    )
    assert goes_on == alone and sum(len(tokens[1]) for tokens in alone) == 20


def test_rows_are_padded_to_few_widths():
    assert [padded_width(n) for n in (1, 32, 33, 500, 512, 513, 1025)] == [32, 32, 64, 512, 512, 1024, 1536]
    with pytest.raises(ValueError, match=r"\b2 tokens\b.*\btoken 0\b.*\b1 to 1\b"):
        score_rows(STUDENT, {}, [[1, 2]], [0])

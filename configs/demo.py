"""The demo: a small real model, shipped with the repository, converted to RAD-RWKV7 on a laptop's CPU in minutes.

    python -m radlads_jax.launch --config configs/demo.py --workdir runs/demo

A hybrid, whose one softmax layer of four is chosen by forward passes of the teacher:

    python -m radlads_jax.launch --config configs/demo.py:hybrid=true --workdir runs/demo_chosen

The same with stage 1 skipped and its tokens given to stage 2:

    python -m radlads_jax.launch --config configs/demo.py:skip_stage1=true --workdir runs/demo_skip_stage1

The recipe is the paper's in small: with so few tokens the learning rates are larger and fall in every stage. How much
stage 1 matters depends on stage 2's rate, `lr` (2e-3): the paper's is a hundredth of stage 1's, too low to find the
mixers from nothing. With a tenth,

    python -m radlads_jax.launch --config configs/demo.py:lr=3e-4 --workdir runs/demo_low
    python -m radlads_jax.launch --config configs/demo.py:lr=3e-4,skip_stage1=true --workdir runs/demo_low_skip_stage1
"""

from ml_collections import ConfigDict

from radlads_jax.config import defaults, parse_arg
from radlads_jax.recipes import let_documents_follow


def get_config(arg: str = "") -> ConfigDict:
    known = parse_arg(arg, hybrid=False, skip_stage1=False, lr=2e-3)
    config = defaults()
    config.dtype = "float32"
    config.teacher.path = "configs/demo_teacher"
    config.teacher.dtype = "float32"
    config.export.dtype = "float32"
    config.data.source = "synthetic"
    # Other tales than the teacher was trained on.
    config.data.seed = 1
    let_documents_follow(config.data, 10_000)
    config.train.sample_prompts = (
        "This is a tale of the miller and the queen. We pay Emil seven. We pay Dora twelve. We pay Otto three. What do "
        "we pay Dora?",
        "This is a tale of the king and the nurse. The king says: knife red market soup. The nurse repeats in pairs: "
        "market soup, knife red, red",
        "This is a tale of the smith and the weaver. The weaver counts by two from four to eighteen: four, six,",
    )
    config.train.sample_tokens = 16
    config.train.answer_tales = 192
    config.train.log_every = 5
    recipe = {"stage1": (600_000, 3e-3, 0.1), "stage2": (1_200_000, known.lr, 0.1), "stage3": (200_000, 2e-4, 1.0)}
    for name, (tokens, lr, lasting) in recipe.items():
        stage = config[name]
        stage.tokens, stage.seq_len, stage.batch_size, stage.remat = tokens, 256, 16, "none"
        stage.lr = stage.mixer_lr = lr
        stage.lr_final = stage.mixer_lr_final = lasting * lr
        stage.warmup_steps = 10
    config.stage3.seq_len, config.stage3.batch_size = 512, 8
    if known.hybrid:
        config.student.attention_layers = ("auto:1",)
    if known.skip_stage1:
        config.stages = ("stage2", "stage3")
        config.stage2.tokens += config.stage1.tokens
    return config

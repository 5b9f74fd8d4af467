r"""Bring your own teacher: stages 1 and 2 of the paper's recipe on your text.

    python -m radlads_jax.launch --config configs/convert.py --workdir runs/mine \
        --config.teacher.path=Qwen/Qwen2.5-0.5B-Instruct --config.data.path=corpus.txt

A first try on a CPU, to RAD-RWKV6; few tokens want small batches:

    python -m radlads_jax.launch --config configs/convert.py --workdir runs/try \
        --config.teacher.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.path=corpus.txt \
        --config.student.mixer=rad_rwkv6 --config.dtype=float32 --config.teacher.dtype=float32 \
        --config.stage1.tokens=200000 --config.stage1.batch_size=4 \
        --config.stage2.tokens=100000 --config.stage2.batch_size=4

What one needs, each as --config.<name>=<value> (radlads_jax/config.py has them all):

    teacher.path             a Hugging Face directory or hub id: qwen2, qwen3, llama, mistral or dense qwen3_5 (to gdn)
    student.mixer            rad_rwkv7, rad_rwkv6, or gdn (Gated DeltaNet, exported as Qwen3.5)
    student.attention_layers layers that stay softmax attention, e.g. 3,7,11; none by default
                             auto:N chooses N of them by forward passes of the teacher, before the run
    student.attention_every  or every N-th layer: 4 keeps 3, 7, 11, ...
    student.init_from        a run whose stage 1 has converted all layers of the same teacher to the same mixer: with
                             its mixers the student begins, and auto:N chooses; --config.stages=stage2 is enough then
    data.source, data.path   text (a file or a directory of .txt; documents are parted by data.separator, two empty
                             lines), jsonl or parquet (data.text_field), hf (a dataset's directory or hub id; data.name,
                             data.split, data.streaming), binidx (the prefix of .bin and .idx, or what
                             radlads_jax.prepare made of a text beforehand), synthetic
                             any of these paths, the teacher's and --workdir may be gs:// URLs (the extra gcs)
    data.chats               conversations in .jsonl for stage2c, which adds what a chat model says to what it writes
    stages                   once for each: --config.stages=stage1 --config.stages=stage2 --config.stages=stage3
    <stage>.tokens, .seq_len, .batch_size, .accumulate (parts of a batch, for memory), .lr and .mixer_lr,
                             .warmup_steps (default: a twentieth of the stage's steps, at most 50)
    train.answer_tales       made-up tales in whose answers student, teacher and control are scored at the end, and the
                             student at every train.eval_every steps; the demo has 192
    dtype, teacher.dtype     bfloat16; float32 on a CPU (with AMX, which `lscpu` shows as amx_bf16, bfloat16 trains in
                             half the time)
    export.dtype, .retie     of the exported weights; retie leaves out the head of a teacher with tied embeddings

Behind the config's name, parted by commas: lr, the learning rate after stage 1, and long=true, stage 2a (4096 tokens a
row) in place of stage 2. Without lr, or with 0, stages 2 and 2a take the paper's 1e-5, made for 500M tokens, from 50M
on; with fewer it grows to 1e-4 at 5M (radlads_jax/recipes.py, DISTILLING; try less for 4B parameters and more). Stage 1
begins with the paper's 1e-3 from 3M tokens on; with fewer it grows to 3e-3 at 1M.
"""

from ml_collections import ConfigDict

from radlads_jax.config import defaults, parse_arg
from radlads_jax.recipes import let_aligning_rates_follow, let_rates_follow


def get_config(arg: str = "") -> ConfigDict:
    known = parse_arg(arg, long=False, lr=0.0)
    config = defaults()
    config.stages = ("stage1", "stage2a" if known.long else "stage2")
    let_aligning_rates_follow(config.stage1)
    for stage in (config.stage2, config.stage2a):
        let_rates_follow(stage)
    # Stage 2a keeps the mixers' rate high, and lets it fall near the end.
    config.stage2a.mixer_lr = 1e-4
    if known.lr:
        for stage in (config.stage2, config.stage2a, config.stage2c, config.stage3):
            stage.lr = stage.lr_final = stage.mixer_lr = stage.mixer_lr_final = known.lr
        config.stage2a.mixer_lr = 10 * known.lr
    return config

"""A RAD-RWKV6 export through llama.cpp's own converter and engine: logits and greedy text beside ours, float32.

    python tests/measure/llama_cpp_roundtrip.py [EXPORT_DIR] [--tools DIR] [--prompt TEXT] [--tokens 16]

Without EXPORT_DIR a small random student with a small sentencepiece vocabulary makes the trip. DIR (default
.llama_cpp) gets an environment of its own, in which llama-cpp-python is built from its source package, and llama.cpp's
converter out of the same package; a compiler, CMake and many minutes are needed the first time. Exit code 1 where the
logits differ by more than a relative RMS of 1e-5 or the text by a token.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from radlads_jax.models import MIXERS, ModelConfig, bind
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import nest
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.porting.writers import WRITERS

PACKAGE = "llama-cpp-python==0.3.36"
TOLERANCE = 1e-5
LINES = ("a lamp in the hall", "the river runs to the sea", "seven boats came home late", "she reads what he wrote")

# Runs in the environment of its own: the prompt's ids, all positions' logits, and the greedy continuation.
ENGINE = """
import json, sys
import numpy as np
from llama_cpp import Llama

gguf, request, result = sys.argv[1:]
asked = json.load(open(request))
llama = Llama(gguf, n_ctx=512, n_batch=512, logits_all=True, verbose=False)
ids = asked["ids"]
llama.eval(ids)
logits = np.array(llama.scores[: len(ids)])
text = []
for _ in range(asked["tokens"]):
    text.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
    llama.eval(text[-1:])
read = llama.tokenize(asked["prompt"].encode(), add_bos=False)
np.savez(result, logits=logits, text=text, read=read, shown=llama.detokenize(text).decode(errors="replace"))
"""


def run(*command: str | Path, **options) -> None:
    print("$", " ".join(str(part).strip().split("\n")[0] for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def ready_tools(directory: Path) -> tuple[Path, Path]:
    """The python that has llama_cpp, and llama.cpp's converter; built where they are not there."""
    python, source = directory / "venv" / "bin" / "python", directory / "source"
    if not python.exists():
        venv.create(directory / "venv", with_pip=True)
        # It also sees this environment's packages (torch, transformers), so that they are not installed twice.
        library = next((directory / "venv" / "lib").glob("python*")) / "site-packages"
        (library / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    if not source.exists():
        run(*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", directory, PACKAGE)
        with tarfile.open(next(directory.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(directory / "unpacked", filter="data")
        next((directory / "unpacked").iterdir()).rename(source)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        flags = "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
        run(*pip, "install", "sentencepiece", "requests", source, env=os.environ | {"CMAKE_ARGS": flags})
    return python, source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"


def random_export(directory: Path, python: Path) -> Path:
    """A small student that llama.cpp has a place for, of random weights, with a vocabulary trained on LINES."""
    directory.mkdir()
    text = directory / "lines.txt"
    text.write_text("\n".join(LINES) + "\n")
    train = "import sentencepiece as s; s.SentencePieceTrainer.train(input='lines.txt', model_prefix='tokenizer', "
    train += "vocab_size=320, model_type='bpe', byte_fallback=True, hard_vocab_limit=False, minloglevel=2)"
    run(python, "-c", train, cwd=directory)
    cfg = ModelConfig("qwen2", 320, 64, 96, 4, 2, 16, (("attention", 2),), qkv_bias=True)
    ranks = {"rank_decay": 8, "rank_shift": 4}
    cfg = cfg.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(cfg.hidden_size, **ranks))
    rng = np.random.default_rng(0)

    def value(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        if path[-2:] == ("decay", "base"):
            # Away from the bound of -5, which llama.cpp does not have.
            return jnp.asarray(rng.uniform(-6, 0, shape), jnp.float32)
        return jnp.asarray((path[-1] == "scale") + 0.15 * rng.standard_normal(shape), jnp.float32)

    params = nest({path: value(path, shape) for path, shape in param_shapes(cfg).items()})
    base = {"bos_token_id": 1, "eos_token_id": 2}
    return save_params(params, cfg, directory / "export", base_config=base, tokenizer_from=directory)


def prompt_ids(export: Path, python: Path, prompt: str) -> list[int]:
    """The prompt as the export's own tokenizer reads it."""
    if (export / "tokenizer.json").is_file():
        from radlads_jax.porting.hub import load_tokenizer

        return load_tokenizer(export)(prompt, add_special_tokens=False)["input_ids"]
    encode = "import sentencepiece as s, sys; "
    encode += "print(s.SentencePieceProcessor(model_file='tokenizer.model').encode(sys.argv[1]))"
    return json.loads(subprocess.check_output([python, "-c", encode, prompt], cwd=export, text=True))


def ours(export: Path, ids: list[int], tokens: int) -> tuple[np.ndarray, list[int]]:
    """Logits [T, vocab] of the prompt, and the greedy continuation, every token by reading all before it again."""
    cfg = model_config_from_hf(read_config(export))
    params = load_params(export, cfg, dtype="float32")

    @jax.jit
    def logits(params, rows):
        decoder = bind(cfg, params)
        return decoder.logits(decoder.hidden(rows)[0])[0]

    row, whole = np.zeros((1, len(ids) + tokens), np.int32), list(ids)
    row[0, : len(ids)] = ids
    first = np.asarray(logits(params, row))[: len(ids)]
    for _ in range(tokens):
        row[0, : len(whole)] = whole
        whole.append(int(np.asarray(logits(params, row))[len(whole) - 1].argmax()))
    return first, whole[len(ids) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, nargs="?")
    parser.add_argument("--tools", type=Path, default=Path(".llama_cpp"))
    parser.add_argument("--prompt", default="the river came to the hall")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    args.tools.mkdir(parents=True, exist_ok=True)
    python, converter = ready_tools(args.tools.resolve())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        export = args.export or random_export(scratch / "small", python)
        WRITERS["llama.cpp"].require(model_config_from_hf(read_config(export)), export)
        ids = prompt_ids(export, python, args.prompt)
        gguf, request, result = scratch / "model.gguf", scratch / "request.json", scratch / "result.npz"
        request.write_text(json.dumps({"ids": ids, "tokens": args.tokens, "prompt": args.prompt}))
        run(python, converter, export.resolve(), "--outtype", "f32", "--outfile", gguf)
        run(python, "-c", ENGINE, gguf, request, result)
        theirs = dict(np.load(result))
        return compared(theirs, *ours(export, ids, args.tokens), ids)


def compared(theirs: dict, logits: np.ndarray, text: list[int], ids: list[int]) -> int:
    """Prints both sides; the exit code."""
    error = float(np.sqrt(np.mean((theirs["logits"] - logits) ** 2) / np.mean(logits**2)))
    same = theirs["text"].tolist() == text
    print(f"llama.cpp reads the prompt as {'the same' if theirs['read'].tolist() == ids else 'OTHER'} tokens")
    print(f"logits of {len(ids)} tokens: relative RMS {error:.2e} (at most {TOLERANCE:g})")
    print(f"greedy text of {len(text)} tokens: {'the same' if same else 'OTHER'}: {str(theirs['shown'])!r}")
    return 0 if same and error < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

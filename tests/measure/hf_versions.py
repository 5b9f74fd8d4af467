"""An export under several versions of transformers: python tests/measure/hf_versions.py EXPORT [--versions 5.0.0 ...]

Makes an environment for each version, below --environments, that shares what this interpreter has installed; runs the
same checks in each and prints a table. Needs the package index.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

VERSIONS = ("4.57.6", "5.0.0", "5.6.2", "5.12.1", "5.13.0", "5.24.0")
TEXT = "Once upon a time, it's 12345 o'clock.\n\n  Two spaces"
CHECKS = ("load", "generate", "tokenizer", "autocast", "packed", "trainer")


def environment(parent: Path, version: str) -> Path:
    """The interpreter of an environment with this version, which is made where it is not there."""
    directory = parent / f"transformers-{version}"
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        shared = (
            directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "shared.pth"
        )
        shared.write_text(sysconfig.get_path("purelib") + "\n")
        command = [python, "-m", "pip", "install", "--quiet", f"transformers=={version}", "accelerate"]
        subprocess.run(command, check=True)
    return python


def check_load(model, tokenizer, directory):
    assert next(model.parameters()).shape[0] == model.config.vocab_size


def check_generate(model, tokenizer, directory):
    import torch

    batch = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True, padding_side="left")
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    with_state = model.generate(**batch, **options)
    assert torch.equal(with_state, model.generate(**batch, use_cache=False, **options))
    model.generate(**batch, num_beams=2, max_new_tokens=4, pad_token_id=0)


def check_tokenizer(model, tokenizer, directory):
    import tokenizers

    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids


def check_autocast(model, tokenizer, directory):
    import torch

    rows = torch.randint(0, min(model.config.vocab_size, 200), (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(rows, labels=rows).loss.item()
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                assert abs(model(rows, labels=rows).loss.item() - expected) < 0.03 * expected, dtype


def check_packed(model, tokenizer, directory):
    import torch
    import transformers

    documents = [tokenizer(text)["input_ids"] for text in (TEXT, "The end", TEXT[5:])]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": ids} for ids in documents])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in documents], 1)
        assert (model(**batch).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def check_trainer(model, tokenizer, directory):
    import torch
    import transformers

    rows = [{"input_ids": torch.arange(20) + i, "labels": torch.arange(20) + i} for i in range(4)]
    with tempfile.TemporaryDirectory() as place:
        options = {"report_to": [], "use_cpu": True, "per_device_eval_batch_size": 2, "max_steps": 2}
        arguments = transformers.TrainingArguments(
            place, eval_strategy="steps", eval_steps=1, save_strategy="no", **options
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.predict(rows).predictions.shape == (4, 20, model.config.vocab_size)
        trainer.train()


def run_checks(directory: Path) -> dict[str, str]:
    """What this interpreter's transformers makes of the export: "ok", or the last line of what was raised."""
    import torch
    import transformers

    results = {"transformers": transformers.__version__}
    model = tokenizer = None
    for name in CHECKS:
        try:
            if name == "load":
                options = {"trust_remote_code": True}
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    directory, dtype=torch.float32, **options
                ).eval()
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
                tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            globals()[f"check_{name}"](model, tokenizer, directory)
            results[name] = "ok"
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError) as error:
            results[name] = f"{type(error).__name__}: {error}"
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            results[name] = f"{type(error).__name__}: {error}"
        if model is None:
            break
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "hf_versions")
    parser.add_argument("--here", action="store_true", help="check with this interpreter and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_checks(args.export)))
        return 0
    failed = 0
    print(f"{'transformers':14}" + "".join(f"{name:12}" for name in CHECKS))
    for version in args.versions:
        python = environment(args.environments, version)
        command = [python, __file__, str(args.export.resolve()), "--here"]
        # The code of the export is imported from a cache, which keeps what another version made.
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                command,
                env=os.environ | {"HF_MODULES_CACHE": cache},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(done.stderr)
        results = json.loads(done.stdout.splitlines()[-1])
        wrong = {name: results[name] for name in CHECKS if results.get(name, "ok") != "ok"}
        failed += bool(wrong) and not version.startswith("4.")
        print(f"{version:14}" + "".join(f"{'no' if name in wrong else results.get(name, '-'):12}" for name in CHECKS))
        for name, said in wrong.items():
            print(f"    {name}: {said.strip().splitlines()[-1]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What lm-eval's tasks ask for that is not done here, found before any weights are loaded."""

from collections.abc import Mapping
from typing import Any

from radlads_jax.system.untrusted import listed

_DEFAULT_NEW_TOKENS = 256
# lm-eval's names of one setting, in the order in which it heeds them.
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def new_tokens(task: str, options: Mapping[str, Any], max_length: int) -> int:
    """How many tokens a task may generate, by its generation_kwargs.

    max_length: tokens that the model reads. Raises ValueError where they leave no room for a prompt.
    """
    if options.get("max_length") is not None:
        raise ValueError(
            f"the generation_kwargs of {task} have max_length, which is of prompt and answer together; expected "
            "max_gen_toks, of the answer. Change it in the task's yaml file, or leave the task out."
        )
    asked = next((int(options[name]) for name in _NEW_TOKENS if options.get(name) is not None), _DEFAULT_NEW_TOKENS)
    if not 0 < asked < max_length:
        raise ValueError(
            f"{task} generates up to {asked} tokens, of a model that reads {max_length}; expected at least 1, and "
            "fewer than that, so that there is room for the prompt. Lower generation_kwargs.max_gen_toks in the task's "
            "yaml file, or leave the task out."
        )
    return asked


def check_tasks(
    tasks: Mapping[str, Any], num_fewshot: int | None, max_length: int, *, chat_template: bool = False
) -> None:
    """Raises ValueError for tasks that can not be run as they are asked for.

    tasks: as `tasks.load_tasks` gives them. max_length: tokens that the models read, all of them.
    """
    parts = {name: task for loaded in tasks.values() for name, task in loaded["tasks"].items()}
    running = [name for name, task in parts.items() if getattr(task, "UNSAFE_CODE", False)]
    if running:
        raise ValueError(
            f"{listed(running)} would run the code that a model writes on this machine, which is not done here; "
            "expected tasks that compare texts. Leave it out of --tasks."
        )
    if chat_template and all(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in parts.values()):
        raise ValueError(
            f"--apply_chat_template changes nothing for {listed(parts)}, which scores a text by itself; expected tasks "
            "with prompts. Leave it out."
        )
    fixed = [name for name, task in parts.items() if num_fewshot and task.get_config("num_fewshot") == 0]
    if fixed:
        raise ValueError(
            f"--num_fewshot={num_fewshot} is not heeded by lm-eval for {listed(fixed)}, of which its own "
            "configuration says 0; expected --num_fewshot=0 or none. Leave it out, or evaluate the other tasks by "
            "themselves."
        )
    for name, task in parts.items():
        if task.OUTPUT_TYPE == "generate_until":
            new_tokens(name, task.get_config("generation_kwargs") or {}, max_length)

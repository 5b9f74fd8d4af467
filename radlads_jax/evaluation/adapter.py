"""Our models under lm-eval (the extra `eval`): its LM interface over `score_rows` and `generate`."""

import itertools
import json
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from radlads_jax.data.chat_template import rendered
from radlads_jax.data.tokenise import before_all
from radlads_jax.decoding.generation import generate
from radlads_jax.decoding.loaded import Model
from radlads_jax.decoding.sampling import Sampling
from radlads_jax.evaluation.scoring import score_rows
from radlads_jax.evaluation.task_checks import new_tokens
from radlads_jax.evaluation.tasks import console
from radlads_jax.porting.hub import check_ids

# What a task may say of its generation, beside where it stops.
_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p")


class RadladsLM(TemplateLM):
    """A teacher or a student for lm-eval.

    max_length: tokens of a request that are read, the last ones (default: the model's max_position_embeddings, for a
    student too, so that it reads what its teacher reads).
    """

    def __init__(self, model: Model, *, batch_size: int = 8, max_length: int | None = None):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self.max_length = max_length or model.cfg.max_position_embeddings
        self._told_of_system = False

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return next(iter(before_all(self.tokenizer)), self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        """What tells one tokenizer's prompts from another's where lm-eval keeps them; it asks beside a template."""
        return str(self.model.directory).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt up to where the answer begins, or behind the beginning that a task gives it.

        Where the template refuses a system's message, which a task's description is, without it, as lm-eval's own
        models have it. Raises ValueError where it refuses the others too.
        """
        begins = {"begins_answer": add_generation_prompt, "stays_open": not add_generation_prompt}
        try:
            return rendered(self.tokenizer, chat_history, None, self.model.directory, **begins)
        except ValueError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = rendered(self.tokenizer, others, None, self.model.directory, **begins)
        if not self._told_of_system:
            said = f"the chat template of {self.model.directory} takes no system's message; the tasks' descriptions are"
            console.print(f"{said} left out.", markup=False, soft_wrap=True)
            self._told_of_system = True
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            # As the tokenizer has it by itself, but never two beginnings.
            add_special_tokens = not (begin and string.startswith(begin))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        check_ids(ids, self.tokenizer, self.model.cfg.vocab_size)
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every text, each token predicted once with as much before it as fits."""
        del disable_tqdm
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    self.prefix_token_id,
                    self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        flat = [(("", ""), before, predicted) for text in windows for before, predicted in text]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(score for score, _ in itertools.islice(scores, len(text))) for text in windows]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows, starts = [], []
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests):
            said = f"{cut} of {len(requests)} prompts with their answers are longer than the {self.max_length} tokens"
            console.print(f"{said} that the model reads, of which the last are scored.", markup=False)
        for _texts, context, continuation in requests:
            row = (context + continuation)[-(self.max_length + 1) :]
            rows.append(row)
            starts.append(max(1, len(row) - len(continuation)))
        scores = score_rows(self.model.cfg, self.model.params, rows, starts, self.batch_size, bar=True)
        return [(float(score.log_probabilities.sum(dtype="float64")), bool(score.is_best.all())) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to the task's stop strings; greedy, unless the task says otherwise.

        Raises ValueError for a task that generates as many tokens as the model reads.
        """
        del disable_tqdm
        texts: dict[int, str] = {}
        settings = [json.dumps([request.task_name, request.args[1]], sort_keys=True) for request in requests]
        for setting in dict.fromkeys(settings):
            same = [i for i, other in enumerate(settings) if other == setting]
            texts |= self._generate(same, [requests[i].args[0] for i in same], *json.loads(setting))
        return [texts[i] for i in range(len(requests))]

    def _generate(self, numbers: list[int], contexts: list[str], task: str, options: dict[str, Any]) -> dict[int, str]:
        until = options.get("until") or []
        stop = [s for s in ([until] if isinstance(until, str) else until) if s]
        max_tokens = new_tokens(task, options, self.max_length)
        rows = {n: self.tok_encode(text) for n, text in zip(numbers, contexts, strict=True)}
        room = self.max_length - max_tokens
        if cut := sum(len(row) > room for row in rows.values()):
            said = f"{task}: {cut} of {len(rows)} prompts are longer than {room} tokens, of which the last are read"
            console.print(f"{said}: {max_tokens} of the model's {self.max_length} are for the answer.", markup=False)
        order = sorted(numbers, key=lambda n: -len(rows[n]))
        texts = dict.fromkeys(numbers, "")
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            filled = batch + [batch[-1]] * (self.batch_size - len(batch))
            prompts = [rows[n][-room:] or [self.prefix_token_id] for n in filled]
            for step in generate(
                self.model, prompts, max_tokens=max_tokens, sampling=_sampling(options), stop=stop, numbers=filled
            ):
                for n, text in zip(batch, step.texts, strict=False):
                    texts[n] += text
        return texts


def _sampling(options: dict[str, Any]) -> Sampling:
    """What a task's generation_kwargs ask for; without do_sample or with temperature 0, the most likely tokens."""
    known = {key: options[key] for key in _SAMPLING_KEYS if options.get(key) is not None}
    temperature = float(known.get("temperature", 1.0 if known.get("do_sample") else 0.0))
    if not known.get("do_sample", temperature > 0) or temperature == 0:
        return Sampling()
    return Sampling(temperature, int(known.get("top_k", 0)), float(known.get("top_p", 1.0)))

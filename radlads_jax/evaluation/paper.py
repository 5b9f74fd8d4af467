"""The paper's evaluation: its tasks, their metrics and chance levels, and the scores it gives.

Source: RADLADS (arXiv 2505.03005), the tables of zero-shot lm-eval scores; 0 to 100 there, 0 to 1 here.
"""

import dataclasses

from radlads_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class _PaperTask:
    """metric: as lm-eval names it. chance: the score of answers drawn by lot."""

    metric: str
    chance: float


SUITE = {
    "lambada_openai": _PaperTask("acc", 0.0),
    "mmlu": _PaperTask("acc", 0.25),
    "arc_challenge": _PaperTask("acc_norm", 0.25),
    "arc_easy": _PaperTask("acc", 0.25),
    "hellaswag": _PaperTask("acc_norm", 0.25),
    "piqa": _PaperTask("acc", 0.5),
    "winogrande": _PaperTask("acc", 0.5),
}

# Of a task that is none of these: its score is the first of these that it has.
METRICS = ("acc", "exact_match", "f1", "acc_norm")

# (student's, teacher's) scores in the order of SUITE, by the student's mixer, width and number of layers. The teachers
# are Qwen2.5's Instruct models.
_PUBLISHED = {
    ("rad_rwkv6", 3584, 28): (
        "QRWKV6-7B",
        (67.5, 65.7, 56.3, 81.4, 79.0, 80.3, 71.1),
        (69.6, 71.7, 55.0, 81.5, 80.5, 79.4, 71.4),
    ),
    ("rad_rwkv7", 3584, 28): (
        "QRWKV7-7B",
        (68.4, 68.2, 55.8, 81.7, 79.3, 79.8, 71.8),
        (69.6, 71.7, 55.0, 81.5, 80.5, 79.4, 71.4),
    ),
    ("rad_rwkv6", 5120, 64): (
        "QRWKV6-32B",
        (74.2, 76.6, 60.9, 84.3, 83.0, 81.2, 78.2),
        (75.2, 81.8, 58.7, 82.2, 85.2, 81.0, 72.9),
    ),
    ("rad_rwkv6", 8192, 80): (
        "QRWKV6-72B",
        (75.4, 77.5, 63.8, 86.5, 85.7, 82.5, 79.6),
        (75.1, 83.4, 63.2, 85.9, 87.4, 83.6, 76.3),
    ),
}


def relative_score(student: float, teacher: float, chance: float) -> float | None:
    """(student - chance) / (teacher - chance); None where the teacher is not above chance."""
    return (student - chance) / (teacher - chance) if teacher > chance else None


def teacher_of(published: str) -> str:
    """What a student of the paper's was converted from: of QRWKV6-32B, Qwen2.5-32B-Instruct."""
    return f"Qwen2.5-{published.split('-')[1]}-Instruct"


def published_scores(cfg: ModelConfig) -> tuple[str, dict[str, dict[str, float]]] | None:
    """The name of the paper's student of this shape, and {task: {"student", "teacher"}}; None where it has none."""
    published = _PUBLISHED.get((cfg.recurrent_mixer or "", cfg.hidden_size, cfg.num_layers))
    # Its students have no softmax layers.
    if published is None or cfg.softmax_layers:
        return None
    name, student, teacher = published
    pairs = zip(SUITE, student, teacher, strict=True)
    return name, {task: {"student": round(s / 100, 4), "teacher": round(t / 100, 4)} for task, s, t in pairs}

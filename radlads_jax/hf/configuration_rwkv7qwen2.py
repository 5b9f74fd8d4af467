"""Configuration of RAD-RWKV7 students (model_type rwkv7qwen2)."""

from .configuration_student import StudentConfig


class RWKV7Qwen2Config(StudentConfig):
    """A low-rank gate and GroupNorm unless the keys say otherwise; never token shift."""

    model_type = "rwkv7qwen2"
    default_group_norm = True

    # Without a method of its own, transformers would generate one that takes no key.
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

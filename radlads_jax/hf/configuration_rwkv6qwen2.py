"""Configuration of RAD-RWKV6 students (model_type rwkv6qwen2)."""

from .configuration_student import GATE_FULL, StudentConfig


class RWKV6Qwen2Config(StudentConfig):
    """Token shift and a full-rank gate unless the keys say otherwise."""

    model_type = "rwkv6qwen2"
    has_token_shift = True
    default_gate = GATE_FULL

    # Without a method of its own, transformers would generate one that takes no key.
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

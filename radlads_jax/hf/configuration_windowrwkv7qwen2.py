"""Configuration of RAD-RWKV7 students behind a window (model_type windowrwkv7qwen2)."""

from .configuration_rwkv7qwen2 import RWKV7Qwen2Config
from .configuration_student import GATE_LOW_RANK
from .configuration_windowqwen2 import WindowQwen2Config


class WindowRWKV7Qwen2Config(WindowQwen2Config, RWKV7Qwen2Config):
    """Those of both; always RoPE and a low-rank gate."""

    model_type = "windowrwkv7qwen2"

    def __init__(self, use_rope=True, **kwargs):
        super().__init__(use_rope=use_rope, **kwargs)

    def _problems(self) -> dict[str, bool]:
        return super()._problems() | {
            "use_rope false": not self.use_rope,
            f"gate_rank_type {self.gate_rank_type} in {self.model_type}": self.gate_rank_type != GATE_LOW_RANK,
        }

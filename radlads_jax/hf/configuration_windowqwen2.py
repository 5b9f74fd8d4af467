"""Configuration of models with sliding-window attention (model_type windowqwen2)."""

from .configuration_student import StudentConfig


class WindowQwen2Config(StudentConfig):
    """attention_sinks: keys at a document's start that all of it sees. attention_window: the latest keys, the token's
    own among them. The switches of the recurrent mixers say nothing here.
    """

    model_type = "windowqwen2"

    def __init__(self, attention_sinks=4, attention_window=64, **kwargs):
        self.attention_sinks, self.attention_window = attention_sinks, attention_window
        super().__init__(**kwargs)

    def _problems(self) -> dict[str, bool]:
        return super()._problems() | {
            f"attention_sinks {self.attention_sinks} (numbers from 0 on are)": self.attention_sinks < 0,
            f"attention_window {self.attention_window} (numbers from 1 on are)": self.attention_window < 1,
        }

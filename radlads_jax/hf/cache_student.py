"""What a student remembers of the tokens it has read."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration_student import StudentConfig


class RecurrentLayer(CacheLayerMixin):
    """A mixer's state by name, batch leading; {} before the first token.

    wkv [B, heads, K, V] float32: the recurrence's. last_input [B, D]: with token shift. Of a mixer with a window, what
    its file's window_attention keeps.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self.state: dict[str, torch.Tensor] = {}

    def store(self, tokens: int, **state: torch.Tensor) -> None:
        """Puts the state after `tokens` more tokens in the place of the one before them."""
        self.length += tokens
        self.state, self.is_initialized = state, True

    def _change(self, change) -> None:
        self.state = {name: change(x) for name, x in self.state.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        self.length, self.state, self.is_initialized = 0, {}, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("a recurrent state cannot forget its last tokens; read the prompt again.")

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    # Its name until transformers 5.12.
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values.")


class StudentCache(Cache):
    """What a model remembers of the tokens it has read: a state a recurrent layer, keys and values a softmax layer.

    document_start [B]: the number of the token at which every row's last document begins; None where all is one.
    """

    def __init__(self, config: StudentConfig):
        self.document_start: torch.Tensor | None = None
        softmax = config.softmax_layers
        super().__init__(
            layers=[DynamicLayer() if i in softmax else RecurrentLayer() for i in range(config.num_hidden_layers)]
        )

    def note_documents(self, starts: torch.Tensor | None, before: int) -> None:
        """Takes in where documents begin in the tokens [B, T] that follow the first `before`."""
        if starts is None:
            return
        numbers = torch.arange(before, before + starts.shape[1], device=starts.device)
        known = 0 if self.document_start is None else self.document_start
        self.document_start = torch.where(starts, numbers, 0).amax(1).clamp(min=known)

    def _change(self, change) -> None:
        self.document_start = None if self.document_start is None else change(self.document_start)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        super().reset()
        self.document_start = None

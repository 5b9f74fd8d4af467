"""The tokenizer of tokenizer.json as it is, where transformers would put a family's rules of splitting in."""

from transformers import PreTrainedTokenizerFast


class FileTokenizer(PreTrainedTokenizerFast):
    """By another name."""

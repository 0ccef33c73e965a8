"""Where text comes from, and how it becomes windows of tokens."""

from hf_blr.text.documents import load_text
from hf_blr.text.kept import keep_windows
from hf_blr.text.named import NAMED
from hf_blr.text.sources import load_windows, reads_text, resolve_dataset, scored_dataset
from hf_blr.text.windows import Tokenizer, sample_windows, tokenize
from hf_blr.text.written import can_write, write_windows

__all__ = [
    "NAMED",
    "Tokenizer",
    "can_write",
    "keep_windows",
    "load_text",
    "load_windows",
    "reads_text",
    "resolve_dataset",
    "sample_windows",
    "scored_dataset",
    "tokenize",
    "write_windows",
]

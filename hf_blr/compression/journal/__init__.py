"""What a compression has done so far, on disk, so that one that was stopped goes on where it was."""

from hf_blr.compression.journal.folder import Journal
from hf_blr.compression.journal.status import status_of
from hf_blr.compression.journal.unkept import Unkept

__all__ = ["Journal", "Unkept", "status_of"]

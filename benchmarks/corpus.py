"""Writes the damaged checkpoints that are kept as files: `python benchmarks/corpus.py tests/corpus`.

One of each kind of damage, with the names of which a refusal has one (`names.json`). What is there already stays: a
file that was once refused must be for good, also by a later version that draws others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from damage import KINDS
from damage_bits import KINDS_OF_BITS
from damage_files import KINDS_OF_FILES, NOT_KEPT
from robustness import damaged_one, quiet, wholes

#: of a model whose files are small
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 8}
#: of what is named, so many are kept: a crowd of modules has a thousand
MOST = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    quiet()
    checkpoints = wholes(SMALL)
    for seed, kind in enumerate(kind for kind in [*KINDS, *KINDS_OF_BITS, *KINDS_OF_FILES] if kind not in NOT_KEPT):
        folder = args.folder / re.sub(r"\W+", "_", kind)
        if not folder.exists():
            folder.mkdir(parents=True)
            checkpoint, names = damaged_one(checkpoints, kind, Random(seed))
            checkpoint.write(folder)
            (folder / "names.json").write_text(json.dumps(names[:MOST]) + "\n")


if __name__ == "__main__":
    main()

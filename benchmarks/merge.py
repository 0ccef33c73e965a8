"""One file of quality rows from several, as `quality.py --shard` writes them.

    python benchmarks/merge.py results/quality_h200.json part1.json part2.json

Rows that the first file holds already stay as they are. Files on other tokens under the same names are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from protocol import check_tokens
from runs import row_key

from hf_blr.bench.report.files import merged, read_result, write_result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, help="result file to add to; made if there is none")
    parser.add_argument("parts", type=Path, nargs="+", help="result files")
    args = parser.parse_args(argv)
    paths = [args.into] * args.into.exists() + args.parts
    result = merged([read_result(path) for path in paths], row_key)
    check_tokens([row for path in paths for row in read_result(path)["rows"]])
    write_result(args.into, result)
    print(f"{args.into} holds {len(result['rows'])} rows")


if __name__ == "__main__":
    main()

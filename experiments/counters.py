"""Hardware counters of the prefill kernels, one row a kernel: where their time goes.

    ncu --clock-control none --cache-control none --profile-from-start off --csv --page raw --metrics METRICS \
        python experiments/counters.py run > counters.csv
    python experiments/counters.py read counters.csv --json benchmarks/results/counters_h100.json

`python experiments/counters.py metrics` prints METRICS. Needs Nsight Compute and a Hopper GPU.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_blr import ops
from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import write_result
from hf_blr.structures import FACTOR, Blast, LowRank, Monarch

TOKENS, FEATURES = 1024, 4096
#: {a row's key: (metric of ncu, factor)}
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "tensor_pct": ("sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    "shared_pct": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed", 1.0),
    "l2_to_sm_mb": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1e-6),
    "l2_mb": ("lts__t_bytes.sum", 1e-6),
    "dram_mb": ("dram__bytes.sum", 1e-6),
}
SPECS = {
    "BLAST 4x16": Blast(FEATURES, FEATURES, 1024, (4, 16)),
    "BLAST 4x4": Blast(FEATURES, FEATURES, 1024, (4, 4)),
    "BLAST 16x16": Blast(FEATURES, FEATURES, 1024, (16, 16)),
    "Monarch 4x4": Monarch(FEATURES, FEATURES, 256, (4, 4)),
    "Monarch 16x16": Monarch(FEATURES, FEATURES, 64, (16, 16)),
    "low-rank": LowRank(FEATURES, FEATURES, 1024),
}
FUNCTIONS = {"blast": ops.blast_linear, "monarch": ops.monarch_linear, "low_rank": ops.low_rank_linear}
PROTOCOL = (
    f"Nsight Compute's counters of each kernel of one forward over {TOKENS} tokens, bfloat16, {FEATURES} x {FEATURES} "
    "at half the parameters, after a warm-up; L2 overwritten before each layer and left as it is between its kernels"
)


def run():
    """Each layer once, after a warm-up, and the dense one, within the profiler's range."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(FEATURES, FEATURES, device="cuda", dtype=torch.bfloat16)
    scratch = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    calls = []
    for spec in SPECS.values():
        factors = {
            name: 0.03 * torch.randn(shape, device="cuda", dtype=x.dtype) for name, shape in spec.shapes(FACTOR).items()
        }
        calls.append(lambda f=FUNCTIONS[spec.structure], factors=factors: f(x, **factors))
    calls.append(lambda: F.linear(x, dense))
    with torch.no_grad():
        for call in calls:
            call()
        for call in calls:
            scratch.zero_()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def rows(path: Path) -> list[dict]:
    """One for each kernel, in the order of `run`; layers are told apart by their number of kernels."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    kernels = list(csv.DictReader(lines))[1:]  # the first line has units
    found = []
    layers = iter([name for name, spec in SPECS.items() for _ in range(kernel_count(spec))] + ["dense"])
    for kernel, layer in zip(kernels, layers, strict=True):
        values = {key: float(kernel[metric].replace(",", "")) * scale for key, (metric, scale) in METRICS.items()}
        found.append({"layer": layer, "kernel": kernel["Kernel Name"], **{k: round(v, 2) for k, v in values.items()}})
    return found


def kernel_count(spec) -> int:
    """Two products, and a mix unless the last product does it."""
    from hf_blr.ops.rules.mix import fuses_mix

    (b1, b2), (_, q) = spec.num_blocks, spec.block_shape
    apart = spec.structure == "blast" and not fuses_mix(b1, b2, q, spec.rank, TOKENS)
    return 3 if apart else 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "read", "metrics"))
    parser.add_argument("csv", type=Path, nargs="?")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "run":
        run()
    elif args.what == "metrics":
        print(",".join(metric for metric, _ in METRICS.values()))
    else:
        where = environment()
        write_result(args.json, {"environment": where, "protocol": PROTOCOL, "rows": rows(args.csv)})


if __name__ == "__main__":
    main()

"""Result files: written by the benchmarks, read by the report."""

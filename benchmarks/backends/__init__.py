"""The stores the benchmarks run on, one file each."""

"""bayestie beside its peers, in one run: `python -m benchmarks`, `python -m benchmarks.scaling`, `gpu.py`."""

"""How fast the rebuild is, and what the suite costs: ratios of things run in turn in one process (docs/bench.md).

``python -m benchmarks`` (``make bench``) runs every scenario in a process of its own, since page state and the number
of devices are set before a process starts, and judges the results by the targets that stand beside them.
"""

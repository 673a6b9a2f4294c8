"""Times every operation and the whole training step, on whatever device is there.

    python -m pallas_kernels.bench --list
    python -m pallas_kernels.bench --shapes=cpu,cpu_wide --repeats=30 --json=bench.json
    python -m pallas_kernels.bench --ops=step --shapes=cpu_race --against=torch

Everything that is compared is measured in one run, taking turns, so that what else the machine does
hits both sides of a ratio. Nothing here is imported by the operations themselves.
"""

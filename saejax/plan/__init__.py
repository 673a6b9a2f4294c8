"""What a run will need, before any hardware is rented: memory, FLOPs, collectives, time.

hardware      chips, and the names of topologies
workload      sizes of a step on one device
traffic       collectives of a step, and how long they take
estimate      memory and time, by arithmetic
compiled      the step, compiled ahead of time for hardware that is not there
hlo           collectives of a compiled program
search        mesh shapes and microbatches
describe      all of it as text
"""

from saejax.plan.hardware import only_cpus
from saejax.plan.report import report
from saejax.plan.search import resolve_mesh

__all__ = ["only_cpus", "report", "resolve_mesh"]

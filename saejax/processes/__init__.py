"""Several processes as one run: how they start, agree, and end together.

Each process is told who it is by its environment, and does the same work with its own devices:

    SAEJAX_COORDINATOR=host0:1234 SAEJAX_PROCESSES=4 SAEJAX_PROCESS_ID=2 python -m saejax.main ...

SLURM, Open MPI and GKE TPU slices need none of these; on a Cloud TPU VM, SAEJAX_PROCESSES=auto asks
its metadata. SAEJAX_PROCESSES=1 runs alone, whatever is detected. Others are waited for
SAEJAX_WAIT_SECONDS; one that says nothing for SAEJAX_HEARTBEAT_SECONDS is taken for dead;
SAEJAX_LOCAL=1 says that all are on one machine. `python -m launch.local` starts several on one.

settings    what the environment says
preflight   what is checked in plain Python before JAX joins them
joining     `join`; it calls `jax.distributed`, as `watching` does to leave
group       who this is; the store of keys that they share
barriers    `lead`, `meet`, `gather`, `part`: waiting with names and deadlines
losses      what is said when one is gone
watching    `watched`: the child that works, the parent that watches it, and their exit codes
"""

from saejax.processes.barriers import LeaderError, gather, lead, meet, part
from saejax.processes.group import PreemptedError, count, index
from saejax.processes.joining import join
from saejax.processes.losses import LostError, losses_named
from saejax.processes.settings import Settings, settings
from saejax.processes.watching import watched

__all__ = [
    "LeaderError",
    "LostError",
    "PreemptedError",
    "Settings",
    "count",
    "gather",
    "index",
    "join",
    "lead",
    "losses_named",
    "meet",
    "part",
    "settings",
    "watched",
]

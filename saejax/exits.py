"""Exit codes: what a run tells whoever starts it, a person or a cluster.

    0    done
    1    an error of configuration, data or code: the same command would fail again
    42   preempted: stopped by SIGTERM (or by Ctrl-C in training) with all that was done kept; the
         same command continues. In training the step is finished and saved first, the same one in
         all processes. Before, between and after, in a harvest or an evaluation, there is nothing
         to be finished: shards and checkpoints are whole, and the rest is done again
    124  something waited longer than it may: a phase past its deadline (`watchdog.py`), a process
         that never started, or one that was lost. The same command continues
    130  Ctrl-C where there is no training
    128+n  signal n, which nobody can handle or handles: 137 is SIGKILL, as by a lack of memory;
         129 is SIGHUP

A scheduler should start again after 42, 124 and above, and give up after 1. What JAX does when it
loses a process, an abort (134), is turned into 124.
"""

DONE = 0
ERROR = 1
PREEMPTED = 42
STUCK = 124
INTERRUPTED = 130

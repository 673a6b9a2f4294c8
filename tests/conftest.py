"""Eight CPU devices for every test, configured before anything touches a device."""

import atexit
import os
import shutil
import tempfile

# Eight device threads on few cores: give the runtime threads enough to meet at a rendezvous.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the tests' time is compilation, of programs that run for milliseconds. Long runs of their
# own processes are compiled as for users, and so are the kernels again by `.ci/run`.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Many tests compile the same small programs: share them between tests, workers and subprocesses.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="saejax-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

jax.config.update("jax_num_cpu_devices", 8)

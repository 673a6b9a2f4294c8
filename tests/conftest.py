"""Eight CPU devices for every test, configured before anything touches a device."""

import os

# Eight device threads on few cores: give the runtime threads enough to meet at a rendezvous.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)

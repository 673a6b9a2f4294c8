"""Starting runs: on this machine (`local`). Imports no JAX."""

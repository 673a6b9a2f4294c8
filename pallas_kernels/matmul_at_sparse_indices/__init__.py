"""The `matmul_at_sparse_indices` operation."""

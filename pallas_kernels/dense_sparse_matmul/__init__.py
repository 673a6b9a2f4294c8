"""The `dense_sparse_matmul` operation."""

"""The `sparse_transpose_matmul` operation."""

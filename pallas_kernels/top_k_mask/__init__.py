"""The `top_k_mask` operation."""

"""The `top_k` operation."""

"""The `weight_grads` operation."""

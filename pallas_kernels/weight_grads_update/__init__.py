"""The `weight_grads_update` operation."""

"""Training: loss, optimizer, state, step, loop."""

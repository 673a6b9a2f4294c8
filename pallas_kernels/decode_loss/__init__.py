"""The `decode_loss` operation."""

"""The `topk_encode` operation."""

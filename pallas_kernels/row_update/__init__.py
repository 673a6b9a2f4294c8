"""The `row_update` operation."""

"""Which slice gets which model, and whether an engine really runs there."""

"""Training: a batch in chunks, parameters sharded over processes."""

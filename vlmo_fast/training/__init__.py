"""Training: what pre-training hides and predicts, optimisers, a batch in chunks, parameters sharded over processes."""

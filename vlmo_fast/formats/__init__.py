"""Files that models come from and go to: released checkpoints, BEiT, BERT. Here alone stand other people's names."""

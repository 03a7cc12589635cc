"""Fine-tuning: the loop, its optimiser, its run folder."""

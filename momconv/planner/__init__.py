"""What fits: measured memory, and the micro-batch chosen from it."""

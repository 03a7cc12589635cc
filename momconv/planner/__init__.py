"""What fits: predicted memory and time, and the strategy and micro-batch chosen from them."""

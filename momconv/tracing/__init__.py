"""Finding runs of residual blocks: a network is followed once, on tensors without memory."""

"""The invertible core: the momentum rule, its exact inverse, and autograd around them."""

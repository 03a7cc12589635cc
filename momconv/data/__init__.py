"""Images: the folders they lie in, the splits, decoding, transforms and datasets."""

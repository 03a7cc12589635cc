"""Model files: safetensors with what is needed to rebuild the network, written all or nothing."""

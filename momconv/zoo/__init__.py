"""Names to networks: torchvision's residual networks and the CIFAR family, with their weights."""

"""Recipes for ``momconv finetune``, and the figures and tables of the paper (paper/)."""

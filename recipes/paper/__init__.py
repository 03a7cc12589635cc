"""Every figure and table of Sander et al. 2021, one command each; results in docs/paper.md."""

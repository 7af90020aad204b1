"""`--mode evaluate` and `--mode stats`: scores of images against a reference, and their report."""

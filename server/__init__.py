"""The Flower server: it aggregates released updates and never sees anything else."""

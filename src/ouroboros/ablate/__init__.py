"""Comparisons and ablations: several recipes, trained with paired seeds and judged together."""

"""Checkpoints of published systems become models of this library, and the way back."""

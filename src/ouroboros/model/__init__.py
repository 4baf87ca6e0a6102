"""Topology, caches and the transformers rim: the envelope in which standard tools load and run a model."""

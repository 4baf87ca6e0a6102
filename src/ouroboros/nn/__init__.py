"""Parts: plain torch modules. A part knows its own sizes, never its place in the schedule.

Shape suffixes used throughout: B batch, T query length, S key length (cached and new), R registers, D model width,
H query heads, K key/value heads, C channels per head, F feed-forward width, V vocabulary.
"""

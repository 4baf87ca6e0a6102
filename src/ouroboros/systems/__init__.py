"""Published systems, one folder each: recipes, readers of their checkpoints, published modes, pictures.

A folder's ``__init__`` holds ``SYSTEM``, see :mod:`ouroboros.registry`; nothing outside a folder names it.
"""

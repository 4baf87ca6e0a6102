"""Training: the loop and what makes a run safe to stop, resume and trust."""

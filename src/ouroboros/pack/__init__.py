"""The best model in so many bytes: codes for weights, a coder for codes, one file, and a budget that is kept."""

"""Studies: a control and arms that change one thing each, trained on the same text and compared seed by seed."""

"""Post-hoc corrections of the classifier."""

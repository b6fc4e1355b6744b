"""Classification by class means."""

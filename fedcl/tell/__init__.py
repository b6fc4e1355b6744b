"""How a run tells people where it stands."""

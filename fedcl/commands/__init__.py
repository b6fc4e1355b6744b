"""What the commands do between their arguments and what they print."""

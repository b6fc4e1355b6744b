"""``fedcl bench``: ours and the installed peers on the same work, round by round in one call."""

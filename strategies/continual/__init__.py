"""Methods against forgetting, and the bounds they are measured against."""

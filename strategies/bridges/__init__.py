"""Methods of other libraries as strategies."""

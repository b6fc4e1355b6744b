"""Built-in strategies, one method a file, by family; found through entry points like anyone else's."""

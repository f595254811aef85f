"""Older interfaces, with their names, arguments and errors: what is called changes, what calls it does not."""

"""Bridges to the libraries that hold data and models; each module imports its own library, and no other does."""

"""The mutations of each op on each backend."""

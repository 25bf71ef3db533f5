"""Models: tokens, pixels or ratings in, features out."""

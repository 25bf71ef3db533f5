"""What accelerate.py is made of: how a module changes its class, and the rules that say which and into what."""

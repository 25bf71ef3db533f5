"""What accelerate.py is made of: how a module changes its class, and which becomes what."""

"""Tasks: the head and the loss that give a model its job."""

"""Production: the gates before it, the registry that names the model in it, and the way back."""

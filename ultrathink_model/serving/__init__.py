"""Using a finished model: a conversation in the terminal or on a page, and an endpoint for other programs."""

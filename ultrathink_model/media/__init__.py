"""Images and sound on their way to the model: how they are read, counted in tokens and handed over."""

"""The encoders that bring images and sound into the decoder's sequence."""

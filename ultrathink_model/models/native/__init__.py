"""Operators in C++ for training in float32 on a processor, compiled when a run first asks for them."""

"""Settings of the property tests: no deadline, since other processes share the machine."""

from hypothesis import settings

settings.register_profile("data", deadline=None, max_examples=40)
settings.load_profile("data")

"""Importing this module makes the Auto classes of `transformers` load our own architecture without remote code.

It is a module of its own, and `import ultrathink_model` does not import it, because `transformers` takes seconds.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from ultrathink_model.models.configuration_ultrathink import UltrathinkConfig
from ultrathink_model.models.modeling_ultrathink import UltrathinkForCausalLM
from ultrathink_model.models.processing_ultrathink import UltrathinkProcessor

AutoConfig.register(UltrathinkConfig.model_type, UltrathinkConfig, exist_ok=True)
AutoModelForCausalLM.register(UltrathinkConfig, UltrathinkForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(UltrathinkConfig, UltrathinkForCausalLM, exist_ok=True)
AutoProcessor.register(UltrathinkConfig, UltrathinkProcessor, exist_ok=True)

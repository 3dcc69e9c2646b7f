"""flexgen: batch inference for language models that are larger than the memory of the device that runs them."""

"""The stored bytes of each parameter: safetensors headers, transformers' conversions applied to them, random weights.  Reads no weights."""

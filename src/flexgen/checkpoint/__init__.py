"""Where each parameter's bytes are: safetensors headers, transformers' conversions run on them, random weights.  Reads no weights."""

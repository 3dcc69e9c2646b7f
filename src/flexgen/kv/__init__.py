"""The KV cache: the pages of each tier, the views of a pass, and the places that attend to them."""

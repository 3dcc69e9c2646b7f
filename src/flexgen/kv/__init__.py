"""The KV cache: pages per tier, the views of a pass, and the places that attend to them."""

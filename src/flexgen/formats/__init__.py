"""Number formats, one per file: how weights are stored, what crosses a link to a device, and what they are decoded to."""

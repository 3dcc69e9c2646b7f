"""Number formats: how numbers are stored, and what they become."""

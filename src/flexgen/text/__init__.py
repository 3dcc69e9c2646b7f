"""Text to token ids and back: tokenizer, stop strings, what prompts have in common."""

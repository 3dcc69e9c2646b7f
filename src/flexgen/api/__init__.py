"""How requests and answers are written: bare JSONL, OpenAI's batch lines, vLLM's keywords.  Knows no files and no engines."""

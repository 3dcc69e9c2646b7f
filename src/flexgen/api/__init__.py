"""The forms of requests and answers: bare JSON lines, OpenAI's batch lines, vLLM's keywords.  Knows nothing of files and engines."""

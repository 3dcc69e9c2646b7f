"""Tokens and text: tokenizing, decoding as tokens come, stop strings, defaults of requests, common beginnings of prompts."""

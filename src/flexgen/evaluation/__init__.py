"""Evaluation of models: perplexity and LAMBADA by themselves, and models for lm-evaluation-harness, HELM and inspect-ai.

All requests of an evaluation are lines of durable jobs, so that an interrupted evaluation goes on and scores nothing twice.  What is
measured is defined as in lm-evaluation-harness, which is needed by `lm_eval.py` and `lm_eval_command.py` only (the extra `eval`).
"""

"""Other systems on the same GPU: a launcher for each, which runs in the peer's own Python, and the steps that call them.

Launchers (`run_*.py`) never import flexgen, whose name the original has, too.  A peer's packages may lie in a folder (`--packages`), so
that they can be brought to a machine without a network.  Each launcher prints one JSON object, all else goes to stderr.
"""

"""The best policy: a linear program, points near its answers, and moves between them."""

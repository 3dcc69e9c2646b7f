"""Prices a pass: the bytes it moves and FLOPs it computes, the time these take, and the memory that a policy needs."""

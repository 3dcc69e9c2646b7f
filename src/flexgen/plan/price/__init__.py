"""What a pass moves and computes, what that takes, and the memory that a policy needs."""

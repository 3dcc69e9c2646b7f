"""What a plan says: the forecast, what would help, what it costs to finish sooner."""

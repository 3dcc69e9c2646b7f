"""Pipeline stages: ranks and the channels between them, what travels there, and how the first stage leads the others."""

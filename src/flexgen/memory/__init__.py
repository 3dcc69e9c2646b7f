"""Where bytes live and how they move: files, rings, homes, pages."""

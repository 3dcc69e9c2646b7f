"""A job played through a policy: who is admitted when, and what each pass does."""

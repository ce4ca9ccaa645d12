"""Mixed load on the real services for minutes: nothing leaks, and nothing fails that was not asked to."""

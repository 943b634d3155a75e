"""What the machine says of itself. Absent is None, never 0."""

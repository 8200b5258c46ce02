"""What comes from outside: files that others wrote, conventions that others keep."""
